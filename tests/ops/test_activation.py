# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from backends import CUDA
from fullbeam import ops, reference
from op_helpers import HALF_DTYPES, as_activation, assert_accurate, guarded, strided, wide

pytestmark = pytest.mark.usefixtures("backend")
KINDS = ["silu", "gelu", "gelu_tanh"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_tokens", "size"), [(0, 8), (1, 1), (3, 15), (2, 16), (5, 133)])
def test_activation_is_a_gate_before_ones(rng: Any, num_tokens: int, size: int, kind: str) -> None:
    x = strided((rng.standard_normal((num_tokens, size)) * 4).astype(np.float32))
    gated = np.concatenate([x, np.ones_like(x)], axis=1)
    with guarded((num_tokens, size)) as out:
        ops.activation(x, activation=kind, out=out)
        np.testing.assert_array_equal(out, ops.gated_activation(gated, activation=kind))
    np.testing.assert_allclose(out, reference.activation(x, activation=kind), rtol=1e-5, atol=1e-15)


def test_activation_may_write_over_its_input(rng: Any) -> None:
    x = rng.standard_normal((300, 70), np.float32)
    expected = ops.activation(x)
    assert ops.activation(x, out=x) is x
    np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize("backend", CUDA, indirect=True)
@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("activation", KINDS)
@pytest.mark.parametrize("size", [7, 64, 2056])
def test_activation_of_half_floats_is_accurate_on_cuda(
    rng: Any, size: int, activation: str, dtype: str
) -> None:
    x = as_activation(rng.standard_normal((2, size)) * 4, dtype)
    out = ops.activation(x, activation=activation)
    assert out.dtype == x.dtype
    oracle = reference.activation(wide(x), activation=activation)
    assert_accurate(out, oracle, ops.activation(wide(x).astype(np.float32), activation=activation))


def test_activation_refuses_what_does_not_fit() -> None:
    x = np.zeros((2, 8), np.float32)
    with pytest.raises(
        ValueError, match=r"^activation: activation must be silu, gelu or gelu_tanh, got relu$"
    ):
        ops.activation(x, activation="relu")
    with pytest.raises(
        ValueError, match=r"^activation: out must be \[num_tokens=2, size=8\], got \[2, 5\]$"
    ):
        ops.activation(x, out=np.zeros((2, 5), np.float32))
