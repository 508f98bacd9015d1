# SPDX-License-Identifier: Apache-2.0
"""Attention refuses page tables, lengths and offsets that would read somebody else's memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fullbeam import ops

PAGES = np.zeros((4, 1, 16, 16), np.float32)


def decode(page_table: list[list[int]], seq_lens: list[int]) -> Any:
    q = np.zeros((len(seq_lens), 1, 16), np.float32)
    table, lens = np.array(page_table, np.int32), np.array(seq_lens, np.int32)
    return ops.attention_decode(q, PAGES, PAGES, table, lens, scale=1.0)


def prefill(num_tokens: int, seq_lens: list[int], query_starts: list[int]) -> Any:
    q = np.zeros((num_tokens, 1, 16), np.float32)
    table = np.zeros((len(seq_lens), 2), np.int32)
    lens, starts = np.array(seq_lens, np.int32), np.array(query_starts, np.int32)
    return ops.attention_prefill(q, PAGES, PAGES, table, lens, starts, scale=1.0)


@pytest.mark.parametrize("page", [-1, 4, 2**31 - 1])
def test_attention_refuses_a_page_outside_the_cache(page: int) -> None:
    with pytest.raises(ValueError, match=rf"page_table must be in 0\.\.3 .*, got {page}$"):
        decode([[0, page]], [17])


def test_attention_reads_no_page_beyond_the_length() -> None:
    assert decode([[0, 2**31 - 1]], [16]).shape == (1, 1, 16)


@pytest.mark.parametrize("length", [0, 33, -5])
def test_attention_refuses_a_length_that_does_not_fit(length: int) -> None:
    with pytest.raises(ValueError, match=rf"seq_lens must be .*, got {length}$"):
        decode([[0, 1]], [length])


@pytest.mark.parametrize("starts", [[0, 3, 2], [1, 2, 4], [0, 2, 5], [0, 1, 3]])
def test_attention_refuses_query_starts_out_of_order(starts: list[int]) -> None:
    with pytest.raises(ValueError, match="query_starts must be"):
        prefill(4, [8, 8], starts)


def test_attention_refuses_more_queries_than_keys() -> None:
    with pytest.raises(ValueError, match="seq_lens must be"):
        prefill(4, [3], [0, 4])


def test_attention_takes_pages_at_any_distance() -> None:
    rng = np.random.default_rng(5)
    memory = rng.standard_normal((5, 3, 2, 4, 16), dtype=np.float32)
    memory[:, 0] = np.nan
    q = rng.standard_normal((1, 4, 16), dtype=np.float32)
    table, lens = np.array([[3, 1]], np.int32), np.array([7], np.int32)
    apart = ops.attention_decode(q, memory[:, 1], memory[:, 2], table, lens, scale=0.25)
    dense = [np.ascontiguousarray(memory[:, layer]) for layer in (1, 2)]
    together = ops.attention_decode(q, *dense, table, lens, scale=0.25)
    np.testing.assert_array_equal(apart, together)
    assert np.isfinite(apart).all()
