# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from attention_helpers import CASES, HALF_CASES, halves, naive, searches, widened
from backends import CPU, CUDA, EMULATED
from fullbeam import ops, reference
from op_helpers import (
    HALF_DTYPES,
    Array,
    PagedKv,
    as_activation,
    assert_accurate,
    guarded,
    num_threads,
    paged_kv,
    wide,
)

pytestmark = pytest.mark.usefixtures("backend")


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


@pytest.mark.parametrize("case", CASES)
def test_attention_decode_of_sequences_that_share_pages_is_the_same_bits_as_alone(
    rng: Any, case: tuple[Any, ...]
) -> None:
    num_q_heads, num_kv_heads, head_dim, page_size, window, softcap, dtype = case
    kv = paged_kv(
        rng, [200, 160, 190, 129, 258, 40, 20, 17, 300, 150, 290, 300],
        num_kv_heads=num_kv_heads, head_dim=head_dim, page_size=page_size, dtype=dtype,
    )  # fmt: skip
    for first, others in ((0, range(1, 8)), (8, (9, 10))):
        for seq in others:
            num_pages = min(kv.seq_lens[[first, seq]]) // page_size
            kv.page_table[seq, :num_pages] = kv.page_table[first, :num_pages]
    kv.page_table[11] = kv.page_table[10]
    kv.seq_lens[11] = kv.seq_lens[10]
    q = rng.standard_normal((12, num_q_heads, head_dim)).astype(np.float32)
    options = {"scale": head_dim**-0.5, "window": window, "softcap": softcap}
    alone = [
        decode(
            q[[seq]],
            PagedKv(kv.k_pages, kv.v_pages, kv.page_table[[seq]], kv.seq_lens[[seq]]),
            **options,
        )[0]
        for seq in range(12)
    ]
    for count in (1, 2, 5):
        with num_threads(count), guarded(q.shape) as out:
            decode(q, kv, out=out, **options)
            np.testing.assert_array_equal(out, np.stack(alone))


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


# ---- searches: rows that see their own of a sequence's slots

MIXED = [(40, 5, 12), (70, 1, 0), (129, 8, 30), (1, 1, 0), (16, 20, 3), (33, 1, 40)]


@pytest.mark.parametrize("case", CASES)
def test_attention_decode_of_searches_is_accurate(rng: Any, case: tuple[Any, ...]) -> None:
    num_q_heads, num_kv_heads, head_dim, page_size, window, softcap, dtype = case
    several = searches(
        rng, MIXED, num_kv_heads=num_kv_heads, head_dim=head_dim, page_size=page_size, dtype=dtype
    )
    num_rows = len(several.chains.seq_lens)
    q = rng.standard_normal((num_rows, num_q_heads, head_dim)).astype(np.float32)
    options = {"scale": head_dim**-0.5, "window": window, "softcap": softcap}
    oracle = several.oracle(q, **options)
    chains = naive(q, several.chains, range(num_rows + 1), **options)
    with guarded(q.shape) as out:
        several.decode(q, out=out, **options)
        assert_accurate(out, oracle, chains)
    # Each row's keys as a plain sequence: the same numbers in another order.
    assert_accurate(decode(q, several.chains, **options), oracle, chains)


@pytest.mark.parametrize("window", [0, 20])
def test_attention_decode_of_a_row_ignores_the_other_rows(rng: Any, window: int) -> None:
    several = searches(rng, MIXED)
    starts = several.slots["query_starts"]
    q = rng.standard_normal((starts[-1], 8, 32)).astype(np.float32)
    together = several.decode(q, scale=0.2, window=window)
    for seq in range(len(MIXED)):
        for row in range(starts[seq + 1] - starts[seq]):
            own = starts[seq] + row
            alone = several.only(seq, [row]).decode(q[own : own + 1], scale=0.2, window=window)
            np.testing.assert_array_equal(alone[0], together[own])
    for count in (1, 3):
        with num_threads(count):
            np.testing.assert_array_equal(several.decode(q, scale=0.2, window=window), together)


def test_attention_decode_of_a_row_ignores_slots_that_only_others_see(rng: Any) -> None:
    several = searches(rng, [(40, 6, 25)])
    q = rng.standard_normal((6, 4, 32)).astype(np.float32)
    before = several.decode(q, scale=0.2)
    slots = np.arange(several.slots["num_slots"][0])
    bits = several.slots["visible"][:, slots // 32] >> (slots % 32).astype(np.uint32) & 1
    slot = slots[bits.sum(axis=0) == 1][0]
    page, offset = several.slot_pages(0, slot)
    for poison in (np.nan, np.inf):
        several.kv.k_pages[page, :, offset] = several.kv.v_pages[page, :, offset] = poison
        after = several.decode(q, scale=0.2)
        sees = bits[:, slot] == 1
        assert np.isnan(after[sees]).all()
        np.testing.assert_array_equal(after[~sees], before[~sees])


def test_attention_decode_without_slots_is_the_same_bits_as_without_the_arguments(rng: Any) -> None:
    kv = paged_kv(rng, [100, 1, 40])
    q = rng.standard_normal((3, 4, 32)).astype(np.float32)
    slots = {
        "query_starts": np.arange(4, dtype=np.int32),
        "slot_starts": np.full(3, 2**31 - 1, np.int32),
        "num_slots": np.zeros(3, np.int32),
        "positions": np.full(3, -1, np.int32),
    }
    plain = decode(q, kv, scale=0.2, window=30)
    for num_words in (0, 2):
        out = decode(
            q, kv, scale=0.2, window=30, **slots,
            visible=np.full((3, num_words), 2**32 - 1, np.uint32),
            slot_positions=np.zeros((3, 32 * num_words), np.int32),
        )  # fmt: skip
        np.testing.assert_array_equal(out, plain)


def test_attention_decode_takes_a_search_without_prompt(rng: Any) -> None:
    alone = searches(rng, [(0, 3, 9)])
    q = rng.standard_normal((3, 4, 32)).astype(np.float32)
    oracle = alone.oracle(q, scale=0.2)
    assert_accurate(alone.decode(q, scale=0.2), oracle, naive(q, alone.chains, range(4), scale=0.2))


def test_attention_decode_of_a_row_that_sees_nothing_is_nan(rng: Any) -> None:
    alone = searches(rng, [(40, 3, 9)])
    q = rng.standard_normal((3, 4, 32)).astype(np.float32)
    before = alone.decode(q, scale=0.2, window=4)
    alone.slots["visible"][1] = 0
    after = alone.decode(q, scale=0.2, window=4)
    assert np.isnan(after[1]).all()
    np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])


def test_attention_decode_of_searches_takes_bfloat16_pages(rng: Any) -> None:
    torch = pytest.importorskip("torch")
    several = searches(rng, MIXED)
    kv, q = several.kv, rng.standard_normal((36, 4, 32)).astype(np.float32)
    halves = [torch.from_numpy(pages).bfloat16() for pages in (kv.k_pages, kv.v_pages)]
    wide = [pages.float().numpy() for pages in halves]
    narrow_out, wide_out = (
        ops.attention_decode(q, *pages, kv.page_table, kv.seq_lens, scale=0.2, **several.slots)
        for pages in (halves, wide)
    )
    np.testing.assert_array_equal(narrow_out, wide_out)


def run_with(rng: Any, changes: dict[str, Any]) -> None:
    kv = paged_kv(rng, [120])
    values: dict[str, Any] = {
        "query_starts": [0, 4],
        "slot_starts": [48],
        "num_slots": [64],
        "visible": np.ones((4, 2), np.uint32),
        "slot_positions": np.zeros((1, 64), np.int32),
        "positions": [40] * 4,
    }
    arrays = {
        key: np.array(item, np.int32) if isinstance(item, list) else item
        for key, item in (values | changes).items()
    }
    q, lens = np.zeros((4, 4, 32), np.float32), np.array([40], np.int32)
    decode(q, PagedKv(kv.k_pages, kv.v_pages, kv.page_table, lens), scale=1, **arrays)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("query_starts", None, "query_starts must be given where slots are, got None"),
        (
            "positions",
            None,
            "query_starts must be given with slot_starts, .*, got it without one of them",
        ),
        ("query_starts", [0, 3, 4], r"query_starts must be \[2\], got \[3\]"),
        (
            "visible",
            np.zeros((3, 2), np.uint32),
            r"visible must be \[num_tokens=4, num_words\], .*",
        ),
        ("slot_positions", np.zeros((1, 32), np.int32), r"slot_positions must be .* 64\], got .*"),
    ],
)
def test_attention_decode_refuses_searches_that_do_not_fit(
    rng: Any, name: str, value: Any, message: str
) -> None:
    run_with(rng, {})
    with pytest.raises(ValueError, match=f"^attention_decode: {message}$"):
        run_with(rng, {name: value})


@pytest.mark.parametrize("backend", CPU, indirect=True)  # CUDA doesn't read what arrays hold
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("query_starts", [0, 3], "query_starts must be num_tokens=4 at its end, got 3"),
        (
            "slot_starts",
            [40],
            "slot_starts must be a multiple of page_size=16, at least .*, got 40",
        ),
        ("slot_starts", [32], "slot_starts must be .*, at least the sequence's seq_lens=40 and .*"),
        ("slot_starts", [960], "slot_starts must be .* and at most max_pages .*, got 960"),
        ("num_slots", [-1], "num_slots must be at least 0, got -1"),
        ("num_slots", [65], r"num_slots must be in 0..32 \* num_words=64, got 65"),
        ("num_slots", [0], "query_starts must be at most one row apart for a sequence .*, got 4"),
        ("positions", [40, 40, 39, 40], "positions must be at least .* seq_lens=40, got 39"),
    ],
)
def test_attention_decode_refuses_searches_that_hold_what_does_not_fit(
    rng: Any, name: str, value: Any, message: str
) -> None:
    run_with(rng, {})
    with pytest.raises(ValueError, match=f"^attention_decode: {message}$"):
        run_with(rng, {name: value})


@pytest.mark.parametrize("backend", CPU, indirect=True)
def test_attention_decode_refuses_a_slot_outside_the_cache(rng: Any) -> None:
    alone = searches(rng, [(40, 3, 9)])
    alone.kv.page_table[0, alone.slots["slot_starts"][0] // 16] = 2**31 - 1
    with pytest.raises(ValueError, match=r"page_table must be in 0\.\..*, got 2147483647$"):
        alone.decode(np.zeros((3, 4, 32), np.float32), scale=1.0)


# ---- CUDA: halves, on tensor cores; chunks of keys, which several blocks take

on_cuda = pytest.mark.parametrize("backend", CUDA, indirect=True)


@on_cuda
@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("case", HALF_CASES)
def test_attention_decode_of_halves_is_accurate(rng: Any, case: Any, dtype: str) -> None:
    num_q_heads, num_kv_heads, head_dim, page_size, window, softcap = case
    lens = [1, 31, 63, 64, 65, page_size - 1, page_size + 1, 257, 600]
    kv = paged_kv(rng, lens, num_kv_heads=num_kv_heads, head_dim=head_dim, page_size=page_size)
    q, kv = halves(rng.standard_normal((len(lens), num_q_heads, head_dim)), kv, dtype)
    options = {"scale": head_dim**-0.5, "window": window, "softcap": softcap}
    wide_q, wide_kv = widened(q, kv)
    pages = wide_kv.k_pages, wide_kv.v_pages
    oracle = reference.attention_decode(wide_q, *pages, kv.page_table, kv.seq_lens, **options)
    alone = naive(wide_q, wide_kv, range(len(lens) + 1), **options, weights_dtype=dtype)
    if dtype == "float16":
        with guarded(q.shape, dtype) as out:
            assert_accurate(decode(q, kv, out=out, **options), oracle, alone)
    else:
        assert_accurate(decode(q, kv, **options), oracle, alone)


@on_cuda
@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("case", HALF_CASES[1::2])
def test_attention_decode_of_halves_of_searches_is_accurate(
    rng: Any, case: Any, dtype: str
) -> None:
    num_q_heads, num_kv_heads, head_dim, page_size, window, softcap = case
    shapes = [(40, 5, 12), (270, 3, 9), (129, 8, 60), (1, 1, 0), (0, 4, 3)]
    several = searches(
        rng, shapes, num_kv_heads=num_kv_heads, head_dim=head_dim, page_size=page_size
    )
    narrow, several = several.rounded(dtype)
    num_rows = len(several.chains.seq_lens)
    q = as_activation(rng.standard_normal((num_rows, num_q_heads, head_dim)), dtype)
    wide_q = wide(q).astype(np.float32)
    options = {"scale": head_dim**-0.5, "window": window, "softcap": softcap}
    oracle = several.oracle(wide_q, **options)
    chains = naive(wide_q, several.chains, range(num_rows + 1), **options, weights_dtype=dtype)
    assert_accurate(narrow.decode(q, **options), oracle, chains)


@on_cuda
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("window", [0, 20])
def test_attention_decode_of_a_row_of_halves_ignores_the_other_rows(
    rng: Any, window: int, dtype: str
) -> None:
    several = searches(rng, [(40, 5, 12), (300, 1, 0), (260, 8, 70)]).rounded(dtype)[0]
    starts = several.slots["query_starts"]
    q = rng.standard_normal((starts[-1], 8, 32)).astype(dtype)
    together = several.decode(q, scale=0.2, window=window)
    for seq, row in ((0, 0), (0, 4), (1, 0), (2, 3), (2, 7)):
        own = starts[seq] + row
        alone = several.only(seq, [row]).decode(q[own : own + 1], scale=0.2, window=window)
        np.testing.assert_array_equal(alone[0], together[own])


@on_cuda
@pytest.mark.parametrize("num_beams", [2, 6, 20])
def test_attention_decode_of_a_row_of_halves_ignores_slots_that_only_others_see(
    rng: Any, num_beams: int
) -> None:
    several = searches(rng, [(40, num_beams, 25)]).rounded("float16")[0]
    q = rng.standard_normal((num_beams, 4, 32)).astype(np.float16)
    before = several.decode(q, scale=0.2)
    slots = np.arange(several.slots["num_slots"][0])
    bits = several.slots["visible"][:, slots // 32] >> (slots % 32).astype(np.uint32) & 1
    slot = slots[bits.sum(axis=0) == 1][0]
    page, offset = several.slot_pages(0, slot)
    sees = bits[:, slot] == 1
    k, v = several.kv.k_pages[page, :, offset], several.kv.v_pages[page, :, offset]
    kept = v.copy()
    for poison in (np.nan, np.inf, -np.inf):
        v[:, 3] = poison
        after = several.decode(q, scale=0.2)
        np.testing.assert_array_equal(after[~sees], before[~sees])
        assert not np.isfinite(after[sees][..., 3]).any()
        others = np.arange(32) != 3
        np.testing.assert_array_equal(after[sees][..., others], before[sees][..., others])
    v[:] = kept
    k[:] = np.nan
    after = several.decode(q, scale=0.2)
    assert np.isnan(after[sees]).all()
    np.testing.assert_array_equal(after[~sees], before[~sees])


@on_cuda
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("window", [0, 300])
def test_attention_decode_in_chunks_is_the_same_bits_in_any_batch(
    rng: Any, dtype: str, window: int
) -> None:
    lens = [300, 5, 1100, 512, 256, 257, 900]
    kv = paged_kv(rng, lens)
    q, kv = halves(rng.standard_normal((len(lens), 8, 32)), kv, dtype)
    together = decode(q, kv, scale=0.2, window=window)
    np.testing.assert_array_equal(decode(q, kv, scale=0.2, window=window), together)
    for seq in range(len(lens)):
        one = slice(seq, seq + 1)
        alone = PagedKv(kv.k_pages, kv.v_pages, kv.page_table[one], kv.seq_lens[one])
        np.testing.assert_array_equal(
            decode(q[one], alone, scale=0.2, window=window), together[one]
        )
    wide_q, wide_kv = widened(q, kv)
    oracle = reference.attention_decode(
        wide_q, wide_kv.k_pages, wide_kv.v_pages, kv.page_table, kv.seq_lens,
        scale=0.2, window=window,
    )  # fmt: skip
    options: dict[str, Any] = {"scale": 0.2, "window": window, "weights_dtype": dtype}
    assert_accurate(together, oracle, naive(wide_q, wide_kv, range(len(lens) + 1), **options))


@pytest.mark.parametrize("backend", ["emulated"], indirect=True)
def test_attention_decode_is_the_same_bits_on_any_number_of_multiprocessors(rng: Any) -> None:
    kv = paged_kv(rng, [700, 40, 1, 300] * 3)
    q, kv = halves(rng.standard_normal((12, 4, 32)), kv, "float16")
    expected = decode(q, kv, scale=0.2)
    for num_sms in (1, 2, 7, 132):
        ops._core.emulate_set_device(9, 0, num_sms, 227 << 10, 8)
        np.testing.assert_array_equal(decode(q, kv, scale=0.2), expected)


# The ring of tiles is as long as shared memory allows; 256 columns take the plain kernel at 99 KB.
@pytest.mark.parametrize("backend", ["emulated"], indirect=True)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_attention_decode_runs_in_any_amount_of_shared_memory(rng: Any, head_dim: int) -> None:
    kv = paged_kv(rng, [300, 40, 1], num_kv_heads=1, head_dim=head_dim)
    q, kv = halves(rng.standard_normal((3, 2, head_dim)), kv, "float16")
    expected = decode(q, kv, scale=head_dim**-0.5)
    for device in ("emulated_sm80", "emulated_sm120"):
        ops._core.emulate_set_device(*EMULATED[device])
        found = decode(q, kv, scale=head_dim**-0.5)
        if device == "emulated_sm120" and head_dim == 256:
            np.testing.assert_allclose(found, expected, rtol=2**-8, atol=2**-10)
            assert (found != expected).any()
        else:
            np.testing.assert_array_equal(found, expected)


@on_cuda
def test_attention_decode_of_more_than_64_chunks_is_accurate(rng: Any) -> None:
    kv = paged_kv(rng, [64 * 256 + 100], num_kv_heads=1, head_dim=16)
    q, kv = halves(rng.standard_normal((1, 2, 16)), kv, "float16")
    wide_q, wide_kv = widened(q, kv)
    pages = wide_kv.k_pages, wide_kv.v_pages
    oracle = reference.attention_decode(wide_q, *pages, kv.page_table, kv.seq_lens, scale=1.0)
    alone = naive(wide_q, wide_kv, [0, 1], scale=1.0, weights_dtype="float16")
    assert_accurate(decode(q, kv, scale=1.0), oracle, alone)


@on_cuda
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_attention_decode_takes_any_scale(rng: Any, dtype: str, scale: float) -> None:
    kv = paged_kv(rng, [70, 9])
    q, kv = halves(rng.standard_normal((2, 4, 32)), kv, dtype)
    wide_q, wide_kv = widened(q, kv)
    pages = wide_kv.k_pages, wide_kv.v_pages
    oracle = reference.attention_decode(wide_q, *pages, kv.page_table, kv.seq_lens, scale=scale)
    alone = naive(wide_q, wide_kv, range(3), scale=scale, weights_dtype=dtype)
    assert_accurate(decode(q, kv, scale=scale), oracle, alone)


@on_cuda
def test_attention_decode_takes_halves_at_odd_addresses(rng: Any) -> None:
    kv = paged_kv(rng, [100, 9])
    q, kv = halves(rng.standard_normal((2, 4, 32)), kv, "float16")
    num_pages, size = len(kv.k_pages), kv.k_pages[0].size
    apart = np.full((2, num_pages, size + 3), np.nan, np.float16)
    apart[:, :, :size] = [kv.k_pages.reshape(num_pages, -1), kv.v_pages.reshape(num_pages, -1)]
    views = [
        np.lib.stride_tricks.as_strided(
            pages, kv.k_pages.shape, (2 * (size + 3), *kv.k_pages.strides[1:])
        )
        for pages in apart
    ]
    odd = PagedKv(*views, kv.page_table, kv.seq_lens)
    aligned, unaligned = decode(q, kv, scale=0.2), decode(q, odd, scale=0.2)
    np.testing.assert_allclose(unaligned, aligned, rtol=2**-8, atol=2**-10)


@on_cuda
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_attention_decode_stays_inside_the_cache(rng: Any, dtype: str) -> None:
    kv = paged_kv(rng, [100, 40, 30])
    q, kv = halves(rng.standard_normal((3, 4, 32)), kv, dtype)
    before = decode(q, kv, scale=0.2)
    kv.page_table[0, 2], kv.page_table[0, 3] = 2**31 - 1, -1
    kv.seq_lens[2] = 2**31 - 1  # of pages that are not there
    after = decode(q, kv, scale=0.2)
    assert np.isfinite(after[0]).all()
    np.testing.assert_array_equal(after[1], before[1])
