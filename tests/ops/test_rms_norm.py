# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from backends import CPU, CUDA
from fullbeam import ops, reference
from op_helpers import HALF_DTYPES, as_activation, assert_accurate, guarded, strided, wide

pytestmark = pytest.mark.usefixtures("backend")


def naive(x: Any, weight: Any, eps: float, offset: float) -> Any:
    scale = 1 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + np.float32(eps))
    return x * scale * (weight + np.float32(offset))


@pytest.mark.parametrize("size", [1, 3, 15, 16, 17, 64, 640])
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_rms_norm_is_accurate(rng: Any, num_tokens: int, size: int) -> None:
    x = strided(rng.standard_normal((num_tokens, size)).astype(np.float32))
    weight = rng.standard_normal(size).astype(np.float32)
    with guarded((num_tokens, size)) as out:
        ops.rms_norm(x, weight, eps=1e-5, weight_offset=1.0, out=out)
        oracle = reference.rms_norm(x, weight, eps=1e-5, weight_offset=1.0)
        assert_accurate(out, oracle, naive(x, weight, 1e-5, 1.0))


def test_rms_norm_takes_heads_inside_a_wider_row(rng: Any) -> None:
    qkv = rng.standard_normal((5, 8, 32)).astype(np.float32)
    weight = rng.standard_normal(32).astype(np.float32)
    heads = qkv[:, 2:6]
    oracle = reference.rms_norm(heads, weight)
    expected = naive(heads, weight, 1e-6, 0.0)
    others = qkv[:, :2].copy(), qkv[:, 6:].copy()
    assert ops.rms_norm(heads, weight, out=heads) is heads
    assert_accurate(heads, oracle, expected)
    np.testing.assert_array_equal(qkv[:, :2], others[0])
    np.testing.assert_array_equal(qkv[:, 6:], others[1])


def test_rms_norm_adds_the_residual_and_may_write_over_it(rng: Any) -> None:
    x, residual = rng.standard_normal((2, 4, 48)).astype(np.float32)
    weight = rng.standard_normal(48).astype(np.float32)
    oracle = reference.rms_norm(x, weight, residual=residual)
    expected = naive(x, weight, 1e-6, 0.0) + residual
    ops.rms_norm(x, weight, residual=residual, out=residual)
    assert_accurate(residual, oracle, expected)


@pytest.mark.parametrize("backend", CUDA, indirect=True)
@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("size", [5, 64, 1032, 4104])
def test_rms_norm_of_half_floats_is_accurate_on_cuda(rng: Any, size: int, dtype: str) -> None:
    x, residual = (as_activation(rng.standard_normal((3, size)), dtype) for _ in range(2))
    weight = rng.standard_normal(size).astype(np.float32)
    oracle = reference.rms_norm(wide(x), weight, residual=wide(residual))
    expected = naive(wide(x).astype(np.float32), weight, 1e-6, 0.0) + wide(residual)
    out = ops.rms_norm(x, weight, residual=residual)
    assert out.dtype == x.dtype
    assert_accurate(out, oracle, expected.astype(np.float32))


def test_rms_norm_of_zeros_is_zero() -> None:
    out = ops.rms_norm(np.zeros((2, 40), np.float32), np.ones(40, np.float32))
    np.testing.assert_array_equal(out, 0)


def test_rms_norm_of_a_row_ignores_the_other_rows(rng: Any) -> None:
    x = rng.standard_normal((9, 100)).astype(np.float32)
    weight = rng.standard_normal(100).astype(np.float32)
    together = ops.rms_norm(x, weight)
    x[4] = np.nan
    for row in (0, 3, 5, 8):
        np.testing.assert_array_equal(ops.rms_norm(x[row : row + 1], weight)[0], together[row])
        np.testing.assert_array_equal(ops.rms_norm(x, weight)[row], together[row])


@pytest.mark.parametrize("backend", CPU, indirect=True)
def test_rms_norm_takes_float32_only_on_the_cpu() -> None:
    with pytest.raises(TypeError, match=r"^rms_norm: x must be float32, got float16$"):
        ops.rms_norm(np.zeros((2, 8), np.float16), np.ones(8, np.float32))


def test_rms_norm_refuses_what_does_not_fit() -> None:
    x, weight = np.zeros((2, 8), np.float32), np.ones(8, np.float32)
    with pytest.raises(ValueError, match=r"^rms_norm: weight must be \[size=8\], got \[7\]$"):
        ops.rms_norm(x, weight[:7])
    with pytest.raises(ValueError, match=r"^rms_norm: eps must be at least 0, got -1"):
        ops.rms_norm(x, weight, eps=-1.0)
    with pytest.raises(ValueError, match=r"^rms_norm: x must be contiguous in its last dimension"):
        ops.rms_norm(np.zeros((2, 16), np.float32)[:, ::2], weight)
    x.flags.writeable = False
    with pytest.raises(ValueError, match=r"^rms_norm: out must be writable, got a read-only array"):
        ops.rms_norm(x, weight, out=x)
