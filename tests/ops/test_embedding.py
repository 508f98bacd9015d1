# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from backends import CPU, CUDA
from fullbeam import ops, reference
from op_helpers import HALF_DTYPES, as_activation, assert_accurate, guarded, wide

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("backend", CPU, indirect=True)
@pytest.mark.parametrize("kind", reference.WEIGHT_TYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 13])
def test_embedding_gives_the_dequantised_rows(rng: Any, num_tokens: int, kind: str) -> None:
    data = reference.quantize(rng.standard_normal((37, 512)), kind)
    table = ops.pack_weight([(data, kind, (37, 512))])
    token_ids = rng.integers(0, 37, num_tokens).astype(np.int32)
    rows = reference.dequantize(data, kind, (37, 512))[token_ids]
    with guarded((num_tokens, 512)) as out:
        ops.embedding(token_ids, table, out=out)
        np.testing.assert_array_equal(out, rows)
    scaled = ops.embedding(token_ids, table, scale=22.5)
    np.testing.assert_array_equal(scaled, rows * np.float32(22.5))


@pytest.mark.parametrize("backend", CPU, indirect=True)
def test_embedding_finds_the_part_of_a_stacked_table(rng: Any) -> None:
    kinds = ["Q6_K", "F16", "Q8_0"]
    parts = [(reference.quantize(rng.standard_normal((9, 256)), k), k, (9, 256)) for k in kinds]
    dense = np.concatenate([reference.dequantize(*part) for part in parts])
    token_ids = np.array([0, 8, 9, 17, 18, 26, 3], np.int32)
    out = ops.embedding(token_ids, ops.pack_weight(parts))
    np.testing.assert_array_equal(out, dense[token_ids])


@pytest.mark.parametrize("backend", CPU, indirect=True)
@pytest.mark.parametrize("token_id", [-1, 5, 16, 2**31 - 1, -(2**31)])
def test_embedding_of_an_id_outside_the_table_is_zero(token_id: int) -> None:
    table = ops.pack_weight([(reference.quantize(np.ones((5, 32)), "Q8_0"), "Q8_0", (5, 32))])
    out = ops.embedding(np.array([0, token_id], np.int32), table)
    assert (out[0] != 0).all()
    np.testing.assert_array_equal(out[1], 0)


@pytest.mark.parametrize("backend", CPU, indirect=True)
def test_embedding_adds_the_residual_and_may_write_over_it(rng: Any) -> None:
    data = reference.quantize(rng.standard_normal((9, 64)), "Q8_0")
    table, ids = ops.pack_weight([(data, "Q8_0", (9, 64))]), np.array([3, 9, 0], np.int32)
    hidden = rng.standard_normal((3, 64), np.float32)
    expected = hidden + ops.embedding(ids, table, scale=2.0)
    assert ops.embedding(ids, table, scale=2.0, residual=hidden, out=hidden) is hidden
    np.testing.assert_array_equal(hidden, expected)


@pytest.mark.parametrize("dtype", ["float32", *HALF_DTYPES])
@pytest.mark.parametrize("size", [1, 24, 2056])
def test_embedding_takes_a_dense_table(rng: Any, size: int, dtype: str) -> None:
    table = as_activation(rng.standard_normal((6, size)), dtype)
    ids = np.array([5, 0, -1, 6, 2**31 - 1, 5], np.int32)
    residual = rng.standard_normal((6, size), np.float32)
    rows = np.zeros((6, size), np.float32)
    rows[[0, 1, 5]] = wide(table)[[5, 0, 5]]
    with guarded((6, size)) as out:
        ops.embedding(ids, table, scale=3.0, residual=residual, out=out)
        np.testing.assert_array_equal(out, rows * np.float32(3) + residual)
        ops.embedding(ids, table, out=out)
        np.testing.assert_array_equal(out, rows)


@pytest.mark.parametrize("backend", CUDA, indirect=True)
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_embedding_gives_half_floats_on_cuda(rng: Any, dtype: str) -> None:
    table = rng.standard_normal((6, 40)).astype(np.float32)
    ids, residual = np.array([1, 5], np.int32), as_activation(rng.standard_normal((2, 40)), dtype)
    out = ops.embedding(ids, table, residual=residual)
    assert out.dtype == residual.dtype
    expected = table[ids] + wide(residual).astype(np.float32)
    assert_accurate(out, table[ids] + wide(residual), expected)


@pytest.mark.parametrize("backend", CUDA, indirect=True)
def test_embedding_takes_no_packed_table_on_cuda() -> None:
    table = ops.pack_weight([(np.zeros(5 * 128, np.uint8), "F32", (5, 32))])
    with pytest.raises(ValueError, match=r"^embedding: table must be an array on the device of "):
        ops.embedding(np.zeros(2, np.int32), table)


def test_embedding_refuses_what_does_not_fit() -> None:
    table = np.zeros((5, 32), np.float32)
    with pytest.raises(TypeError, match=r"^embedding: token_ids must be int32, got int64$"):
        ops.embedding(np.zeros(2, np.int64), table)
    with pytest.raises(
        ValueError, match=r"^embedding: out must be \[num_tokens=2, 32\], got \[2, 31\]$"
    ):
        ops.embedding(np.zeros(2, np.int32), table, out=np.zeros((2, 31), np.float32))
    with pytest.raises(
        TypeError, match=r"^embedding: table must be a PackedWeight, or .* got NoneType$"
    ):
        ops.embedding(np.zeros(2, np.int32), None, out=np.zeros((2, 32), np.float32))
