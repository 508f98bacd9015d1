# SPDX-License-Identifier: Apache-2.0
"""The emulation of CUDA finds what a kernel does wrong, and runs right ones as a GPU would."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from backends import EMULATED, emulated_core, is_sanitized

Check = Callable[..., str]


without_sanitizer = pytest.mark.skipif(
    is_sanitized(), reason="the address sanitizer ends the process where the fault is"
)


@pytest.fixture
def check() -> Check:
    """Runs a kernel of tests/emulate/check_kernels.cc; its words, or "" where it found no fault."""
    core = emulated_core()
    core.emulate_set_seed(7, 0)
    core.emulate_set_device(*EMULATED["emulated"])
    function = core.library.emulate_check
    function.restype = ctypes.c_char_p
    empty = np.zeros(1, np.int32)

    def run(name: str, out: Any = empty, first: Any = empty, second: Any = empty) -> str:
        pointers = (ctypes.c_void_p(array.ctypes.data) for array in (first, second, out))
        said: bytes = function(name.encode(), *pointers)
        return said.decode()

    return run


def test_a_barrier_orders_the_threads(check: Check) -> None:
    out = np.zeros(64, np.int32)
    assert check("exchange", out) == ""
    np.testing.assert_array_equal(out, (np.arange(64) + 1) % 64)


def test_a_missing_barrier_shows_the_undefined_start_of_shared_memory(check: Check) -> None:
    out = np.zeros(64, np.int32)
    assert check("exchange without a barrier", out) == ""
    assert (out == -1).sum() > 5  # all bits set: NaN to a float


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        ("half a warp at a barrier", "threads wait for ones that never come: block (0, 0, 0) thre"),
        ("one thread at the barrier", "threads wait for ones that never come"),
        pytest.param(
            "past the end",
            "a thread wrote 0 bytes past the 32 bytes of shared memory",
            marks=without_sanitizer,
        ),
        ("too much shared memory", "failed at"),
        ("overlap without waiting", "without waiting for the launch that its own may overlap"),
        ("allocate in a capture", "operation not permitted when stream is capturing"),
    ],
)
def test_faults_are_found(check: Check, kernel: str, words: str) -> None:
    assert words in check(kernel)


def test_a_launch_may_overlap_the_one_before(check: Check) -> None:
    assert check("overlap") == ""


def test_errors_tell_the_seed(check: Check) -> None:
    assert "(--emulate-seed 7)" in check("half a warp at a barrier")


def test_asynchronous_copies_land_when_they_are_waited_for(check: Check) -> None:
    source, out = np.arange(128, dtype=np.int32), np.zeros(128, np.int32)
    assert check("copy", out, source) == ""
    np.testing.assert_array_equal(out, source)
    assert check("copy without waiting", out, source) == ""
    assert (out == -1).all()


def test_blocks_of_a_cluster_read_each_others_shared_memory(check: Check) -> None:
    out = np.zeros((8, 32), np.int32)
    assert check("ranks", out) == ""
    np.testing.assert_array_equal(out.T, [[1, 2, 3, 0, 5, 6, 7, 4]] * 32)


def test_what_reads_the_shared_memory_of_a_block_that_has_returned_shows(check: Check) -> None:
    out = np.zeros((8, 32), np.int32)
    assert check("ranks without waiting", out) == ""
    assert (out == -1).any()


def test_a_launch_goes_to_the_device_of_its_stream(check: Check) -> None:
    out = np.zeros(2, np.int32)
    assert check("tell the device", out) == ""
    assert out.tolist() == [1, 0]  # in the kernel, and afterwards


@pytest.mark.parametrize("kernel", ["take memory", "take memory in a capture"])
def test_memory_grows_while_a_graph_is_captured_and_counters_are_zero(
    check: Check, kernel: str
) -> None:
    out = np.zeros(2, np.int32)
    assert check(kernel, out) == ""
    assert out.tolist() == [0, 2]  # counters that aren't zero, workspaces that are there


def test_a_block_reduces_to_all_threads(check: Check) -> None:
    out = np.zeros(256, np.float32)
    assert check("sums", out) == ""
    assert (out == np.arange(256).sum()).all()


def test_tensor_core_fragments_have_their_layout(check: Check) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-8, 8, shape).astype(np.float16) for shape in ((16, 16), (8, 16)))
    out = np.zeros((16, 8), np.float32)
    assert check("product", out, a, b) == ""
    np.testing.assert_array_equal(out, a.astype(np.float32) @ b.astype(np.float32).T)
