# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from fullbeam import _core

ISAS = ["portable", "avx2", "avx512"]


def pytest_report_header() -> str:
    present = _core.available_isas()
    absent = [name for name in ISAS if name not in present]
    skipped = f"; not tested, absent here: {' '.join(absent)}" if absent else ""
    return (
        f"fullbeam: CPU kernels for {' '.join(present)}{skipped}; cuda {_core.build_info()['cuda']}"
    )


@pytest.fixture(params=_core.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each CPU instruction set that the processor has, in use during the test."""
    before = _core.cpu_isa()
    _core.set_isa(request.param)
    yield request.param
    _core.set_isa(before)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20240229)
