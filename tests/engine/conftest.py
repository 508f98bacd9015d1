# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

import fake_ops


@pytest.fixture(autouse=True)
def _ops(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ops.install(monkeypatch)
