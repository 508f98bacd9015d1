# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from backends import CUDA
from fullbeam import ops, reference
from op_helpers import HALF_DTYPES, as_activation, assert_accurate, wide

pytestmark = pytest.mark.usefixtures("backend")


def inv_freqs(num_freqs: int, base: float = 10000.0) -> Any:
    return (base ** (-np.arange(num_freqs) / max(num_freqs, 1))).astype(np.float32)


def naive(x: Any, positions: Any, inv_freq: Any, interleaved: bool, scale: float) -> Any:
    """Angles in float64 (float32 ones are wrong by many ulp), all else in float32."""
    n, out = len(inv_freq), x.copy()
    angles = positions[:, None, None] * inv_freq.astype(np.float64)
    cos, sin = (f(angles).astype(np.float32) * np.float32(scale) for f in (np.cos, np.sin))
    first = slice(0, 2 * n, 2) if interleaved else slice(0, n)
    second = slice(1, 2 * n, 2) if interleaved else slice(n, 2 * n)
    a, b = x[..., first], x[..., second]
    out[..., first], out[..., second] = a * cos - b * sin, a * sin + b * cos
    return out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "head_dim", "num_freqs"),
    [(0, 2, 8, 4), (1, 1, 2, 1), (3, 2, 10, 3), (5, 4, 64, 32), (7, 3, 256, 128), (2, 1, 6, 0)],
)
def test_rope_is_accurate(
    rng: Any, num_tokens: int, num_heads: int, head_dim: int, num_freqs: int, interleaved: bool
) -> None:
    x = rng.standard_normal((num_tokens, num_heads, head_dim)).astype(np.float32)
    positions = rng.integers(0, 131072, num_tokens).astype(np.int32)
    inv_freq = inv_freqs(num_freqs)
    oracle = reference.rope(x, positions, inv_freq, interleaved=interleaved, scale=1.25)
    expected = naive(x, positions, inv_freq, interleaved, 1.25)
    assert ops.rope(x, positions, inv_freq, interleaved=interleaved, scale=1.25) is x
    assert_accurate(x, oracle, expected)


def test_rope_rotates_only_the_given_heads_and_dimensions(rng: Any) -> None:
    qkv = rng.standard_normal((4, 6, 20)).astype(np.float32)
    before, positions = qkv.copy(), np.arange(4, dtype=np.int32)
    ops.rope(qkv[:, 1:3], positions, inv_freqs(8))
    np.testing.assert_array_equal(qkv[:, [0, 3, 4, 5]], before[:, [0, 3, 4, 5]])
    np.testing.assert_array_equal(qkv[..., 16:], before[..., 16:])
    np.testing.assert_array_equal(qkv[0], before[0])
    assert (qkv[1:, 1:3, :8] != before[1:, 1:3, :8]).all()


@pytest.mark.parametrize("position", [-1, -70001, 2**20 + 1, 2**31 - 1])
def test_rope_takes_any_position(rng: Any, position: int) -> None:
    x = rng.standard_normal((1, 1, 16)).astype(np.float32)
    positions, inv_freq = np.array([position], np.int32), inv_freqs(8)
    oracle = reference.rope(x, positions, inv_freq)
    expected = naive(x, positions, inv_freq, False, 1.0)
    ops.rope(x, positions, inv_freq)
    assert_accurate(x, oracle, expected)


def test_rope_of_a_token_ignores_the_other_tokens(rng: Any) -> None:
    x = rng.standard_normal((40, 2, 32)).astype(np.float32)
    positions = rng.integers(0, 5000, 40).astype(np.int32)
    alone = x[17:18].copy()
    ops.rope(x, positions, inv_freqs(16))
    ops.rope(alone, positions[17:18], inv_freqs(16))
    np.testing.assert_array_equal(alone[0], x[17])


@pytest.mark.parametrize("backend", CUDA, indirect=True)
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_rope_of_half_floats_is_accurate_on_cuda(rng: Any, dtype: str) -> None:
    x = as_activation(rng.standard_normal((4, 3, 40)), dtype)
    positions = rng.integers(0, 131072, 4).astype(np.int32)
    before = wide(x).copy()
    expected = naive(before.astype(np.float32), positions, inv_freqs(16), False, 1.0)
    ops.rope(x, positions, inv_freqs(16))
    assert_accurate(x, reference.rope(before, positions, inv_freqs(16)), expected)


def test_rope_refuses_what_does_not_fit() -> None:
    x, positions = np.zeros((2, 1, 8), np.float32), np.zeros(2, np.int32)
    with pytest.raises(
        ValueError, match=r"^rope: inv_freq must be at most head_dim/2=4 numbers, got 5$"
    ):
        ops.rope(x, positions, inv_freqs(5))
    with pytest.raises(ValueError, match=r"^rope: positions must be \[num_tokens=2\], got \[3\]$"):
        ops.rope(x, np.zeros(3, np.int32), inv_freqs(4))
    with pytest.raises(TypeError, match=r"^rope: positions must be int32, got int64$"):
        ops.rope(x, positions.astype(np.int64), inv_freqs(4))
    with pytest.raises(ValueError, match=r"^rope: scale must be finite, got nan"):
        ops.rope(x, positions, inv_freqs(4), scale=float("nan"))
