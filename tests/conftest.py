# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import secrets
import zlib
from collections.abc import Iterator

import numpy as np
import pytest

import backends
from fullbeam import _core, ops

ISAS = ["portable", "avx2", "avx512"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--emulate-seed",
        type=int,
        default=secrets.randbelow(2**31),
        help="order in which emulated CUDA threads run; random unless given",
    )

    parser.addoption("--backend", help="run only the tests of this backend")
    parser.addoption("--sample", type=int, help="run only this many tests, evenly spread")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = items
    if backend := config.getoption("--backend"):
        kept = [
            i
            for i in kept
            if hasattr(i, "callspec") and i.callspec.params.get("backend") == backend
        ]
    if (sample := config.getoption("--sample")) and len(kept) > sample:
        kept = [kept[idx * len(kept) // sample] for idx in range(sample)]
    if kept is not items:
        config.hook.pytest_deselected(items=[*{*items} - {*kept}])
        items[:] = kept


def pytest_report_header(config: pytest.Config) -> str:
    present = _core.available_isas()
    absent = [name for name in ISAS if name not in present]
    skipped = f"; not tested, absent here: {' '.join(absent)}" if absent else ""
    return (
        f"fullbeam: CPU kernels for {' '.join(present)}{skipped}; cuda {_core.build_info()['cuda']}"
        f"; --emulate-seed {config.getoption('--emulate-seed')}"
    )


@pytest.fixture(params=_core.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each CPU instruction set that the processor has, in use during the test."""
    before = _core.cpu_isa()
    _core.set_isa(request.param)
    yield request.param
    _core.set_isa(before)


@pytest.fixture(params=[*backends.CPU, *backends.CUDA])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What `fullbeam.ops` runs on during the test: tests/backends.py says what the names mean.

    A test of some of them says so: ``@pytest.mark.parametrize("backend", CUDA, indirect=True)``.
    """
    if request.param in backends.EMULATED:
        core = backends.emulated_core()
        seed = request.config.getoption("--emulate-seed")
        core.emulate_set_seed(seed, zlib.crc32(request.node.nodeid.encode()))
        core.emulate_set_device(*backends.EMULATED[request.param])
        monkeypatch.setattr(ops, "_core", core)
    elif request.param == "cuda":
        monkeypatch.setattr(ops, "_core", backends.OnDevice())
    before = _core.cpu_isa()
    if request.param in backends.CPU:
        _core.set_isa(request.param)
    yield request.param
    _core.set_isa(before)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20240229)


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """Threads of torch would wait for each other longer than they compute tiny products."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
