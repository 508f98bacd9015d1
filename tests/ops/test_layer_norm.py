# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from backends import CUDA
from fullbeam import ops, reference
from op_helpers import HALF_DTYPES, as_activation, assert_accurate, guarded, strided, wide

pytestmark = pytest.mark.usefixtures("backend")


def naive(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    centred = x - x.mean(axis=-1, keepdims=True)
    scale = 1 / np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + np.float32(eps))
    return centred * scale * weight + bias


@pytest.mark.parametrize("mean", [0.0, 1000.0])
@pytest.mark.parametrize("size", [1, 3, 15, 16, 17, 64, 768])
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_layer_norm_is_accurate(rng: Any, num_tokens: int, size: int, mean: float) -> None:
    x = strided((rng.standard_normal((num_tokens, size)) + mean).astype(np.float32))
    weight, bias = rng.standard_normal((2, size)).astype(np.float32)
    with guarded((num_tokens, size)) as out:
        ops.layer_norm(x, weight, bias, eps=1e-5, out=out)
        oracle = reference.layer_norm(x, weight, bias, eps=1e-5)
        assert_accurate(out, oracle, naive(x, weight, bias, 1e-5))


def test_layer_norm_may_write_over_its_input(rng: Any) -> None:
    x, (weight, bias) = rng.standard_normal((5, 70), np.float32), rng.random((2, 70), np.float32)
    expected = ops.layer_norm(x, weight, bias)
    assert ops.layer_norm(x, weight, bias, out=x) is x
    np.testing.assert_array_equal(x, expected)


def test_layer_norm_of_equal_numbers_is_the_bias() -> None:
    bias = np.arange(40, dtype=np.float32)
    out = ops.layer_norm(np.full((2, 40), 3.0, np.float32), np.ones(40, np.float32), bias)
    np.testing.assert_array_equal(out, [bias, bias])


def test_layer_norm_of_a_row_ignores_the_other_rows(rng: Any) -> None:
    x = rng.standard_normal((300, 100), np.float32)
    weight, bias = rng.standard_normal((2, 100), np.float32)
    together = ops.layer_norm(x, weight, bias)
    np.testing.assert_array_equal(ops.layer_norm(x[123:124], weight, bias)[0], together[123])


@pytest.mark.parametrize("backend", CUDA, indirect=True)
@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("size", [5, 64, 4104])
def test_layer_norm_of_half_floats_is_accurate_on_cuda(rng: Any, size: int, dtype: str) -> None:
    x = as_activation(rng.standard_normal((3, size)) + 2, dtype)
    weight, bias = rng.standard_normal((2, size)).astype(np.float32)
    out = ops.layer_norm(x, weight, bias)
    assert out.dtype == x.dtype
    oracle = reference.layer_norm(wide(x), weight, bias)
    assert_accurate(out, oracle, naive(wide(x).astype(np.float32), weight, bias, 1e-5))


def test_layer_norm_refuses_what_does_not_fit() -> None:
    x, ones = np.zeros((2, 8), np.float32), np.ones(8, np.float32)
    with pytest.raises(ValueError, match=r"^layer_norm: weight must be \[size=8\], got \[7\]$"):
        ops.layer_norm(x, ones[:7], ones)
    with pytest.raises(ValueError, match=r"^layer_norm: bias must be \[size=8\], got \[9\]$"):
        ops.layer_norm(x, ones, np.ones(9, np.float32))
    with pytest.raises(TypeError, match=r"^layer_norm: x must be float32.*, got float64$"):
        ops.layer_norm(x.astype(np.float64), ones, ones)
    with pytest.raises(ValueError, match=r"^layer_norm: eps must be at least 0, got -1"):
        ops.layer_norm(x, ones, ones, eps=-1.0)
