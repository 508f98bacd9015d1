# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fullbeam import _core


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--op", default=None, help="only the cases of this op")
    parser.addoption("--threads", type=int, default=None, help="default: physical cores")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if file_path.name != "ops.py" or parent.session.isinitpath(file_path):
        return None  # pytest itself collects a file that is named in the command
    return pytest.Module.from_parent(parent, path=file_path)


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = _core.num_threads()
    count = request.config.getoption("--threads") or _core.num_physical_cores()
    _core.set_num_threads(count)
    yield count
    _core.set_num_threads(before)
