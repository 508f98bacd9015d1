# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from attention_helpers import CASES, naive
from fullbeam import ops, reference
from op_helpers import Array, PagedKv, assert_accurate, guarded, num_threads, paged_kv

pytestmark = pytest.mark.usefixtures("isa")


def decode(q: Array, kv: PagedKv, **options: Any) -> Any:
    return ops.attention_decode(q, kv.k_pages, kv.v_pages, kv.page_table, kv.seq_lens, **options)


@pytest.mark.parametrize("case", CASES)
def test_attention_decode_is_accurate(rng: Any, case: tuple[Any, ...]) -> None:
    num_q_heads, num_kv_heads, head_dim, page_size, window, softcap, dtype = case
    kv = paged_kv(
        rng, [1, 31, 32, 33, 200, 16, 129],
        num_kv_heads=num_kv_heads, head_dim=head_dim, page_size=page_size, dtype=dtype,
    )  # fmt: skip
    q = rng.standard_normal((7, num_q_heads, head_dim)).astype(np.float32)
    options = {"scale": head_dim**-0.5, "window": window, "softcap": softcap}
    oracle = reference.attention_decode(
        q, kv.k_pages, kv.v_pages, kv.page_table, kv.seq_lens, **options
    )
    with guarded(q.shape) as out:
        decode(q, kv, out=out, **options)
        assert_accurate(out, oracle, naive(q, kv, range(8), **options))


@pytest.mark.parametrize("case", CASES)
def test_attention_decode_is_the_same_bits_as_prefill(rng: Any, case: tuple[Any, ...]) -> None:
    num_q_heads, num_kv_heads, head_dim, page_size, window, softcap, dtype = case
    kv = paged_kv(
        rng, [100], num_kv_heads=num_kv_heads, head_dim=head_dim, page_size=page_size, dtype=dtype
    )
    q = rng.standard_normal((100, num_q_heads, head_dim)).astype(np.float32)
    options = {"scale": head_dim**-0.5, "window": window, "softcap": softcap}
    starts = np.array([0, 100], np.int32)
    whole = ops.attention_prefill(
        q, kv.k_pages, kv.v_pages, kv.page_table, kv.seq_lens, starts, **options
    )
    for position in (0, 1, 15, 31, 32, 50, 99):
        seq_lens = np.array([position + 1], np.int32)
        alone = PagedKv(kv.k_pages, kv.v_pages, kv.page_table, seq_lens)
        out = decode(q[position : position + 1], alone, **options)
        np.testing.assert_array_equal(out[0], whole[position])


def test_attention_decode_of_a_sequence_ignores_the_other_sequences(rng: Any) -> None:
    kv = paged_kv(rng, [300, 1, 77, 16, 150])
    q = rng.standard_normal((5, 8, 32)).astype(np.float32)
    together = decode(q, kv, scale=0.2)
    for seq in range(5):
        one = slice(seq, seq + 1)
        alone = PagedKv(kv.k_pages, kv.v_pages, kv.page_table[one], kv.seq_lens[one])
        np.testing.assert_array_equal(decode(q[one], alone, scale=0.2), together[one])
    for count in (1, 3):
        with num_threads(count):
            np.testing.assert_array_equal(decode(q, kv, scale=0.2), together)


def test_attention_decode_ignores_where_the_pages_are(rng: Any) -> None:
    kv = paged_kv(rng, [100, 40])
    q = rng.standard_normal((2, 4, 32)).astype(np.float32)
    order = rng.permutation(len(kv.k_pages))
    place = np.argsort(order).astype(np.int32)
    used = kv.page_table < 2**31 - 1
    table = np.where(used, place[np.where(used, kv.page_table, 0)], -1).astype(np.int32)
    moved = PagedKv(kv.k_pages[order], kv.v_pages[order], table, kv.seq_lens)
    np.testing.assert_array_equal(decode(q, moved, scale=0.2), decode(q, kv, scale=0.2))


def test_attention_decode_takes_no_sequences(rng: Any) -> None:
    kv = paged_kv(rng, [5])
    none = PagedKv(kv.k_pages, kv.v_pages, kv.page_table[:0], kv.seq_lens[:0])
    assert decode(np.zeros((0, 4, 32), np.float32), none, scale=0.2).shape == (0, 4, 32)


def test_attention_decode_refuses_what_does_not_fit(rng: Any) -> None:
    kv = paged_kv(rng, [20, 30])
    q = np.zeros((2, 4, 32), np.float32)
    with pytest.raises(
        ValueError, match=r"^attention_decode: q must be one row per sequence, num_seqs=2, got 3$"
    ):
        decode(np.zeros((3, 4, 32), np.float32), kv, scale=1.0)
    with pytest.raises(TypeError, match=r"^attention_decode: page_table must be int32, got int64$"):
        ops.attention_decode(
            q, kv.k_pages, kv.v_pages, kv.page_table.astype(np.int64), kv.seq_lens, scale=1.0
        )
    with pytest.raises(TypeError, match=r"^attention_decode: v_pages must be float32, got float16"):
        ops.attention_decode(
            q, kv.k_pages, kv.v_pages.astype(np.float16), kv.page_table, kv.seq_lens, scale=1.0
        )
    q.flags.writeable = False
    with pytest.raises(
        ValueError, match=r"^attention_decode: out must be writable, got a read-onl"
    ):
        decode(q, kv, scale=1.0, out=q)
