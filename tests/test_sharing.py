# SPDX-License-Identifier: Apache-2.0
"""Results must not share memory with what an op reads, but where its docstring says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

from fullbeam import ops

Array = Any
NUM_CASES = 2000
WEIGHT = ops.pack_weight([(np.ones(64, np.float32).view(np.uint8), "F32", (8, 8))])
ONES = np.ones(8, np.float32)
CALLS: dict[str, Callable[[Array, Array], Any]] = {
    "rms_norm": lambda x, out: ops.rms_norm(x, ONES, out=out),
    "layer_norm": lambda x, out: ops.layer_norm(x, ONES, ONES, out=out),
    "activation": lambda x, out: ops.activation(x, out=out),
    "softcap": lambda x, out: ops.softcap(x, 2.0, out=out),
    "linear": lambda x, out: ops.linear(x, WEIGHT, out=out),
}


def rows(count: int, size: int = 8) -> Array:
    return np.random.default_rng(1).standard_normal((count, size)).astype(np.float32)


@pytest.mark.parametrize("op", CALLS)
def test_results_a_row_ahead_are_refused(op: str) -> None:
    x = rows(9)
    with pytest.raises(ValueError, match=rf"^{op}: out must be .* x.* in memory, got memory that"):
        CALLS[op](x[:-1], x[1:])
    with pytest.raises(ValueError, match=rf"^{op}: out must be"):
        CALLS[op](x[:-1], x[:-1][::-1])


@pytest.mark.parametrize("op", CALLS)
def test_results_on_what_is_read_are_for_ops_that_say_so(op: str) -> None:
    x = rows(9)
    if op == "linear":
        with pytest.raises(ValueError, match=r"^linear: out must be apart from x in memory, got "):
            CALLS[op](x, x)
        return
    expected = CALLS[op](x.copy(), np.empty_like(x))
    np.testing.assert_array_equal(CALLS[op](x, x), expected)


def test_results_on_the_residual_or_the_gate_are_fine() -> None:
    x, hidden, gated = rows(3), rows(3), rows(3, 16)
    expected = ops.linear(x, WEIGHT, residual=hidden.copy())
    np.testing.assert_array_equal(ops.linear(x, WEIGHT, residual=hidden, out=hidden), expected)
    expected = ops.gated_activation(gated.copy())
    np.testing.assert_array_equal(ops.gated_activation(gated, out=gated[:, :8]), expected)
    with pytest.raises(ValueError, match=r"^gated_activation: out must be element for element on"):
        ops.gated_activation(gated, out=gated[:, 8:])


def test_a_residual_that_is_checked_after_the_result_is_seen_too() -> None:
    x, hidden = rows(3), rows(4)
    with pytest.raises(ValueError, match=r"^rms_norm: out must be .* on residual"):
        ops.rms_norm(x, ONES, residual=hidden[1:], out=hidden[:3])


def test_keys_and_values_may_take_turns_in_one_array() -> None:
    pages, k, v = np.zeros((5, 2, 1, 2, 16), np.float32), rows(1, 16)[None], rows(1, 16)[None]
    slots = np.array([3])
    ops.kv_write(k, v, pages[:, 0], pages[:, 1], slots)
    np.testing.assert_array_equal(pages[1, :, 0, 1], [k[0, 0], v[0, 0]])
    with pytest.raises(ValueError, match=r"^kv_write: .*_pages must be apart from ._pages"):
        ops.kv_write(k, v, pages[:, 0], pages[:, 0], slots)


def test_slices_of_the_rows_of_one_product_are_apart() -> None:
    qkv = rows(6, 32)
    expected = ops.rms_norm(qkv[:, :8].copy(), ONES)
    ops.rms_norm(qkv[:, :8], ONES, out=qkv[:, 24:])
    np.testing.assert_array_equal(qkv[:, 24:], expected)
    with pytest.raises(ValueError, match=r"^rms_norm: out"):
        ops.rms_norm(qkv[:, :8], ONES, out=qkv[:, 7:15])


def refusal(x: Array, out: Array) -> str:
    try:
        ops.rms_norm(x, ONES, out=out)
    except ValueError as error:
        return str(error)
    return ""


def test_exactly_the_arrays_that_share_memory_are_refused() -> None:
    """Of any two views of one buffer, as numpy's exact and slow test says."""
    rng = np.random.default_rng(2)
    buffer = np.ones(4000, np.float32)
    num_shared = num_apart = 0
    for _ in range(NUM_CASES):
        shape = (int(rng.integers(1, 6)), int(rng.integers(1, 4)), 8)

        def view(shape: tuple[int, ...] = shape) -> Array:
            strides = (4 * int(rng.integers(1, 120)), 4 * int(rng.integers(1, 60)), 4)
            return as_strided(buffer[rng.integers(1000) :], shape, strides)

        x, out = view(), view()
        if rng.random() < 0.3:  # columns of the same rows
            out = as_strided(out, shape, x.strides)
        if x.ctypes.data == out.ctypes.data:  # may be one and the same
            continue
        refused = refusal(x, out).startswith("rms_norm: out must be element for element on x")
        assert refused == np.shares_memory(x, out), (shape, x.strides, out.strides)
        num_shared += refused
        num_apart += not refused and np.may_share_memory(x, out)
    assert min(num_shared, num_apart) > NUM_CASES // 20
