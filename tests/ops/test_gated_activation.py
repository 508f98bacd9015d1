# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from backends import CUDA
from fullbeam import ops, reference
from op_helpers import HALF_DTYPES, as_activation, assert_accurate, guarded, strided, wide

pytestmark = pytest.mark.usefixtures("backend")
KINDS = ["silu", "gelu", "gelu_tanh"]


def naive(x: Any, activation: str) -> Any:
    gate, up = np.split(x, 2, axis=1)
    if activation == "silu":
        with np.errstate(over="ignore"):
            return gate / (1 + np.exp(-gate)) * up
    if activation == "gelu_tanh":
        inner = np.float32(math.sqrt(2 / math.pi)) * (gate + np.float32(0.044715) * gate**3)
        return np.float32(0.5) * gate * (1 + np.tanh(inner)) * up
    erf = np.vectorize(math.erf, otypes=[np.float32])(gate * np.float32(math.sqrt(0.5)))
    return np.float32(0.5) * gate * (1 + erf) * up


@pytest.mark.parametrize("activation", KINDS)
@pytest.mark.parametrize(("num_tokens", "size"), [(0, 8), (1, 1), (3, 15), (2, 16), (5, 133)])
def test_gated_activation_is_accurate(
    rng: Any, num_tokens: int, size: int, activation: str
) -> None:
    x = strided((rng.standard_normal((num_tokens, 2 * size)) * 4).astype(np.float32))
    with guarded((num_tokens, size)) as out:
        ops.gated_activation(x, activation=activation, out=out)
        assert_accurate(
            out, reference.gated_activation(x, activation=activation), naive(x, activation)
        )


@pytest.mark.parametrize("activation", KINDS)
def test_gated_activation_keeps_relative_accuracy_of_small_results(activation: str) -> None:
    gate = np.linspace(-5, 5, 1001, dtype=np.float32)
    x = np.concatenate([gate, np.ones_like(gate)])[None]
    oracle = reference.gated_activation(x, activation=activation)
    out = ops.gated_activation(x, activation=activation)
    np.testing.assert_allclose(out, oracle, rtol=1e-5)


@pytest.mark.parametrize("activation", KINDS)
def test_gated_activation_has_its_limits(activation: str) -> None:
    gate = np.array([-3e38, -1e10, -200, -90, 0, 90, 200, 1e10, np.nan], np.float32)
    x = np.concatenate([gate, np.ones_like(gate)])[None]
    out = ops.gated_activation(x, activation=activation)[0]
    np.testing.assert_array_equal(out[5:8], gate[5:8])
    np.testing.assert_allclose(out[:5], 0, atol=2)
    np.testing.assert_allclose(out[2:5], 0, atol=1e-30)
    assert np.isnan(out[8])


def test_gated_activation_of_a_row_ignores_the_other_rows(rng: Any) -> None:
    x = rng.standard_normal((300, 70)).astype(np.float32)
    together = ops.gated_activation(x)
    np.testing.assert_array_equal(ops.gated_activation(x[123:124])[0], together[123])


@pytest.mark.parametrize("backend", CUDA, indirect=True)
@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("activation", KINDS)
@pytest.mark.parametrize("size", [7, 64, 2056])
def test_gated_activation_of_half_floats_is_accurate_on_cuda(
    rng: Any, size: int, activation: str, dtype: str
) -> None:
    x = as_activation(rng.standard_normal((2, 2 * size)) * 4, dtype)
    out = ops.gated_activation(x, activation=activation)
    assert out.dtype == x.dtype
    oracle = reference.gated_activation(wide(x), activation=activation)
    assert_accurate(out, oracle, naive(wide(x).astype(np.float32), activation))


def test_gated_activation_refuses_what_does_not_fit() -> None:
    x = np.zeros((2, 8), np.float32)
    with pytest.raises(
        ValueError,
        match=r"^gated_activation: activation must be silu, gelu or gelu_tanh, got relu$",
    ):
        ops.gated_activation(x, activation="relu")
    with pytest.raises(
        ValueError, match=r"^gated_activation: out must be \[num_tokens=2, 4\], got \[2, 5\]$"
    ):
        ops.gated_activation(x, out=np.zeros((2, 5), np.float32))
    with pytest.raises(ValueError, match=r"^gated_activation: x must be"):
        ops.gated_activation(np.zeros((2, 7), np.float32))
