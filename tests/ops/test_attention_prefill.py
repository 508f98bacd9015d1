# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from attention_helpers import CASES, HALF_CASES, halves, naive, widened
from backends import CUDA, EMULATED
from fullbeam import ops, reference
from op_helpers import (
    HALF_DTYPES,
    Array,
    PagedKv,
    assert_accurate,
    guarded,
    num_threads,
    paged_kv,
)

pytestmark = pytest.mark.usefixtures("backend")


def prefill(q: Array, kv: PagedKv, query_starts: Any, **options: Any) -> Any:
    starts = np.asarray(query_starts, np.int32)
    return ops.attention_prefill(
        q, kv.k_pages, kv.v_pages, kv.page_table, kv.seq_lens, starts, **options
    )


def oracle(q: Array, kv: PagedKv, query_starts: Any, **options: Any) -> Any:
    return reference.attention_prefill(
        q, kv.k_pages, kv.v_pages, kv.page_table, kv.seq_lens, query_starts, **options
    )


def shortened(kv: PagedKv, seq_lens: Any) -> PagedKv:
    return PagedKv(kv.k_pages, kv.v_pages, kv.page_table, np.asarray(seq_lens, np.int32))


@pytest.mark.parametrize("case", CASES)
def test_attention_prefill_is_accurate(rng: Any, case: tuple[Any, ...]) -> None:
    num_q_heads, num_kv_heads, head_dim, page_size, window, softcap, dtype = case
    # Whole prompts and chunks behind a prefix; ragged, on and around tile and page edges.
    seq_lens, num_queries = [1, 33, 70, 64, 17, 129], [1, 33, 3, 64, 5, 31]
    kv = paged_kv(
        rng,
        seq_lens,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        dtype=dtype,
    )
    starts = np.concatenate([[0], np.cumsum(num_queries)]).astype(np.int32)
    q = rng.standard_normal((starts[-1], num_q_heads, head_dim)).astype(np.float32)
    options = {"scale": head_dim**-0.5, "window": window, "softcap": softcap}
    with guarded(q.shape) as out:
        prefill(q, kv, starts, out=out, **options)
        assert_accurate(out, oracle(q, kv, starts, **options), naive(q, kv, starts, **options))


def test_attention_prefill_takes_queries_inside_a_wider_row(rng: Any) -> None:
    kv = paged_kv(rng, [40, 9])
    qkv = rng.standard_normal((20, 12, 32)).astype(np.float32)
    starts = [0, 11, 20]
    out = prefill(qkv[:, :4], kv, starts, scale=0.2)
    np.testing.assert_array_equal(out, prefill(qkv[:, :4].copy(), kv, starts, scale=0.2))


def test_attention_prefill_takes_bfloat16_pages(rng: Any) -> None:
    torch = pytest.importorskip("torch")
    kv = paged_kv(rng, [50])
    q = rng.standard_normal((5, 4, 32)).astype(np.float32)
    k_half, v_half = (torch.from_numpy(p).bfloat16() for p in (kv.k_pages, kv.v_pages))
    wide = PagedKv(k_half.float().numpy(), v_half.float().numpy(), kv.page_table, kv.seq_lens)
    starts = np.array([0, 5], np.int32)
    out = ops.attention_prefill(q, k_half, v_half, kv.page_table, kv.seq_lens, starts, scale=0.2)
    np.testing.assert_array_equal(out, prefill(q, wide, starts, scale=0.2))


@pytest.mark.parametrize("window", [0, 20])
def test_attention_prefill_in_chunks_is_the_same_bits(rng: Any, window: int) -> None:
    kv = paged_kv(rng, [150], page_size=32)
    q = rng.standard_normal((150, 4, 32)).astype(np.float32)
    whole = prefill(q, kv, [0, 150], scale=0.2, window=window)
    for edges in ([0, 64, 128, 150], [0, 1, 2, 33, 100, 149, 150], [0, 149, 150]):
        for begin, end in itertools.pairwise(edges):
            part = prefill(
                q[begin:end], shortened(kv, [end]), [0, end - begin], scale=0.2, window=window
            )
            np.testing.assert_array_equal(part, whole[begin:end])


def test_attention_prefill_of_a_sequence_ignores_the_other_sequences(rng: Any) -> None:
    seq_lens, starts = [70, 5, 130, 33], [0, 30, 35, 100, 133]
    kv = paged_kv(rng, seq_lens)
    q = rng.standard_normal((133, 4, 32)).astype(np.float32)
    together = prefill(q, kv, starts, scale=0.2)
    for seq in range(4):
        rows = slice(starts[seq], starts[seq + 1])
        alone = PagedKv(
            kv.k_pages, kv.v_pages, kv.page_table[seq : seq + 1], kv.seq_lens[seq : seq + 1]
        )
        part = prefill(q[rows], alone, [0, starts[seq + 1] - starts[seq]], scale=0.2)
        np.testing.assert_array_equal(part, together[rows])
    for count in (1, 3):
        with num_threads(count):
            np.testing.assert_array_equal(prefill(q, kv, starts, scale=0.2), together)


def test_attention_prefill_takes_sequences_without_queries(rng: Any) -> None:
    kv = paged_kv(rng, [20, 0, 40])
    q = rng.standard_normal((10, 4, 32)).astype(np.float32)
    out = prefill(q, kv, [0, 0, 0, 10], scale=0.2)
    assert not np.isnan(out).any()
    assert prefill(q[:0], kv, [0, 0, 0, 0], scale=0.2).shape == (0, 4, 32)


def test_attention_prefill_takes_large_scores(rng: Any) -> None:
    kv = paged_kv(rng, [100])
    q = (rng.standard_normal((7, 4, 32)) * 1e4).astype(np.float32)
    options: dict[str, Any] = {"scale": 1.0}
    out = prefill(q, kv, [0, 7], **options)
    assert_accurate(out, oracle(q, kv, [0, 7], **options), naive(q, kv, [0, 7], **options))


def test_attention_prefill_refuses_what_does_not_fit(rng: Any) -> None:
    kv = paged_kv(rng, [20])
    q = np.zeros((5, 4, 32), np.float32)
    with pytest.raises(
        ValueError, match=r"^attention_prefill: query_starts must be \[2\], got \[3\]$"
    ):
        prefill(q, kv, [0, 3, 5], scale=1.0)
    with pytest.raises(ValueError, match=r"^attention_prefill: num_q_heads must be a multiple of"):
        prefill(q[:, :3], kv, [0, 5], scale=1.0)
    with pytest.raises(ValueError, match=r"^attention_prefill: scale must be finite, got inf"):
        prefill(q, kv, [0, 5], scale=float("inf"))
    with pytest.raises(ValueError, match=r"^attention_prefill: window must be at least 0, got -1"):
        prefill(q, kv, [0, 5], scale=1.0, window=-1)
    with pytest.raises(
        ValueError, match=r"^attention_prefill: softcap must be finite and at least"
    ):
        prefill(q, kv, [0, 5], scale=1.0, softcap=-1.0)
    with pytest.raises(
        ValueError, match=r"^attention_prefill: k_pages must be \[num_pages, num_kv"
    ):
        prefill(np.zeros((5, 4, 16), np.float32), kv, [0, 5], scale=1.0)
    narrow = paged_kv(rng, [20], head_dim=24)
    with pytest.raises(ValueError, match=r"^attention_prefill: head_dim must be a multiple of 16"):
        prefill(np.zeros((5, 4, 24), np.float32), narrow, [0, 5], scale=1.0)


# ---- CUDA: halves, on tensor cores

on_cuda = pytest.mark.parametrize("backend", CUDA, indirect=True)


@on_cuda
@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("case", HALF_CASES)
def test_attention_prefill_of_halves_is_accurate(rng: Any, case: Any, dtype: str) -> None:
    num_q_heads, num_kv_heads, head_dim, page_size, window, softcap = case
    seq_lens, num_queries = [1, 33, 70, 64, 17, 129], [1, 33, 3, 64, 5, 31]
    kv = paged_kv(rng, seq_lens, num_kv_heads=num_kv_heads, head_dim=head_dim, page_size=page_size)
    starts = np.concatenate([[0], np.cumsum(num_queries)]).astype(np.int32)
    q, kv = halves(rng.standard_normal((starts[-1], num_q_heads, head_dim)), kv, dtype)
    options = {"scale": head_dim**-0.5, "window": window, "softcap": softcap}
    wide_q, wide_kv = widened(q, kv)
    expected = oracle(wide_q, wide_kv, starts, **options)
    alone = naive(wide_q, wide_kv, starts, **options, weights_dtype=dtype)
    if dtype == "float16":
        with guarded(q.shape, dtype) as out:
            assert_accurate(prefill(q, kv, starts, out=out, **options), expected, alone)
    else:
        assert_accurate(prefill(q, kv, starts, **options), expected, alone)


@on_cuda
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("head_dim", [64, 160])
def test_attention_prefill_of_halves_in_chunks_is_the_same_bits(
    rng: Any, window: int, head_dim: int
) -> None:
    kv = paged_kv(rng, [150], num_kv_heads=1, head_dim=head_dim)
    q, kv = halves(rng.standard_normal((150, 3, head_dim)), kv, "float16")
    options = {"scale": 0.2, "window": window}
    whole = prefill(q, kv, [0, 150], **options)
    for edges in ([0, 64, 128, 150], [0, 1, 2, 33, 100, 149, 150]):
        for begin, end in itertools.pairwise(edges):
            part = prefill(q[begin:end], shortened(kv, [end]), [0, end - begin], **options)
            np.testing.assert_array_equal(part, whole[begin:end])
    for position in (0, 63, 64, 149):
        alone, one = shortened(kv, [position + 1]), slice(position, position + 1)
        out = ops.attention_decode(
            q[one], alone.k_pages, alone.v_pages, alone.page_table, alone.seq_lens, **options
        )
        np.testing.assert_array_equal(out, whole[one])


@on_cuda
def test_attention_prefill_takes_halves_inside_a_wider_row(rng: Any) -> None:
    kv = paged_kv(rng, [40, 9])
    qkv, kv = halves(rng.standard_normal((20, 12, 32)), kv, "float16")
    starts = [0, 11, 20]
    out = prefill(qkv[:, :4], kv, starts, scale=-0.2)
    np.testing.assert_array_equal(out, prefill(qkv[:, :4].copy(), kv, starts, scale=-0.2))
    np.testing.assert_array_equal(out, prefill(-qkv[:, :4], kv, starts, scale=0.2))


@on_cuda
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_attention_prefill_stays_inside_the_cache(rng: Any, dtype: str) -> None:
    kv = paged_kv(rng, [100, 40])
    q, kv = halves(rng.standard_normal((80, 4, 32)), kv, dtype)
    before = prefill(q, kv, [0, 50, 80], scale=0.2)
    kv.page_table[0, 2], kv.page_table[0, 3] = 2**31 - 1, -1
    after = prefill(q, kv, [0, 50, 80], scale=0.2)
    assert np.isfinite(after).all()
    np.testing.assert_array_equal(after[50:], before[50:])


# Of 128 columns a warp takes 16 rows instead of 32 where a block may have 99 KB.
@pytest.mark.parametrize("backend", ["emulated"], indirect=True)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_attention_prefill_runs_in_any_amount_of_shared_memory(rng: Any, head_dim: int) -> None:
    kv = paged_kv(rng, [90, 40], num_kv_heads=1, head_dim=head_dim)
    q, kv = halves(rng.standard_normal((110, 3, head_dim)), kv, "float16")
    expected = prefill(q, kv, [0, 70, 110], scale=head_dim**-0.5)
    for device in ("emulated_sm80", "emulated_sm120"):
        ops._core.emulate_set_device(*EMULATED[device])
        found = prefill(q, kv, [0, 70, 110], scale=head_dim**-0.5)
        np.testing.assert_array_equal(found, expected)
