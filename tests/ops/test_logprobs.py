# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from backends import CPU, CUDA, CUDA_OLD_AND_NEW, EMULATED
from fullbeam import ops, reference
from op_helpers import HALF_DTYPES, as_activation, assert_accurate, guarded, num_threads, strided
from op_helpers import wide as in_float64

pytestmark = pytest.mark.usefixtures("backend")

NAN, INF = float("nan"), float("inf")


def naive(logits: Any) -> Any:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("vocab_size", [1, 2, 127, 128, 129, 1000, 5003])
@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
def test_logprobs_are_accurate(rng: Any, vocab_size: int, num_top: int) -> None:
    num_top = min(num_top, vocab_size)
    logits = strided((rng.standard_normal((9, vocab_size)) * 4).astype(np.float32))
    token_ids = rng.integers(0, vocab_size, 9).astype(np.int32)
    chosen, ranks, top_ids, top = ops.logprobs(logits, token_ids, num_top=num_top)
    oracle = reference.logprobs(logits, token_ids, num_top=num_top)
    np.testing.assert_array_equal(ranks, oracle[1])
    np.testing.assert_array_equal(top_ids, oracle[2])
    values, rows = naive(logits), np.arange(9)
    assert_accurate(chosen, oracle[0], values[rows, token_ids])
    assert_accurate(top, oracle[3], np.take_along_axis(values, top_ids.astype(np.int64), axis=1))


@pytest.mark.parametrize("sigma", [0.0, 0.1, 10.0])
@pytest.mark.parametrize("num_top", [3, 3000])
def test_logprobs_order_all_tokens_with_ties_by_lower_id(
    rng: Any, sigma: float, num_top: int
) -> None:
    logits = np.round(rng.standard_normal((3, 3000)) * sigma).astype(np.float32)
    token_ids = np.array([0, 1500, 2999], np.int32)
    _, ranks, top_ids, _ = ops.logprobs(logits, token_ids, num_top=num_top)
    order = np.argsort(-logits, axis=1, kind="stable")
    np.testing.assert_array_equal(top_ids, order[:, :num_top])
    np.testing.assert_array_equal(ranks, (order == token_ids[:, None]).argmax(axis=1) + 1)


def test_logprobs_of_a_token_are_the_same_bits_in_both_places(rng: Any) -> None:
    logits = (rng.standard_normal((20, 700)) * 5).astype(np.float32)
    token_ids = rng.integers(0, 700, 20).astype(np.int32)
    chosen, ranks, top_ids, top = ops.logprobs(logits, token_ids, num_top=700)
    rows = np.arange(20)
    np.testing.assert_array_equal(top_ids[rows, ranks - 1], token_ids)
    np.testing.assert_array_equal(top[rows, ranks - 1], chosen)
    best = ops.logprobs(logits, logits.argmax(axis=1).astype(np.int32), num_top=1)
    np.testing.assert_array_equal(best[0], best[3][:, 0])
    np.testing.assert_array_equal(best[1], 1)


def test_logprobs_mark_rows_without_a_distribution() -> None:
    logits = np.zeros((4, 300), np.float32)
    logits[0, 299], logits[1], logits[2, 0] = NAN, -INF, NAN
    logits[2, 1] = INF
    chosen, ranks, top_ids, top = ops.logprobs(logits, np.zeros(4, np.int32), num_top=2)
    assert np.isnan(chosen[:3]).all()
    assert np.isnan(top[:3]).all()
    assert ranks.tolist() == [0, 0, 0, 1]
    assert top_ids.tolist() == [[-1, -1]] * 3 + [[0, 1]]


def test_logprobs_of_no_token_are_nan_with_rank_0() -> None:
    chosen, ranks, top_ids, _ = ops.logprobs(
        np.eye(2, 5, dtype=np.float32), np.array([-1, 1], np.int32), num_top=1
    )
    assert np.isnan(chosen[0])
    assert ranks.tolist() == [0, 1]
    assert top_ids.tolist() == [[0], [1]]


def test_logprobs_of_masked_and_infinite_logits(rng: Any) -> None:
    logits = np.full((2, 1000), -INF, np.float32)
    logits[0, [7, 900]] = [1.0, 1.0]
    logits[1, [3, 500, 600, 999]] = INF
    logits[1, 20] = 5
    token_ids = np.array([8, 500], np.int32)
    chosen, ranks, top_ids, top = ops.logprobs(logits, token_ids, num_top=3)
    np.testing.assert_allclose(chosen, [-INF, -np.log(4)], rtol=1e-6)
    assert ranks.tolist() == [10, 2]
    assert top_ids.tolist() == [[7, 900, 0], [3, 500, 600]]
    np.testing.assert_allclose(top[0], [-np.log(2), -np.log(2), -INF], rtol=1e-6)


def test_logprobs_of_huge_logits_do_not_overflow() -> None:
    logits = np.array([[3e38, 3e38, -3e38, 0.0]], np.float32)
    chosen, _, _, _ = ops.logprobs(logits, np.array([1], np.int32))
    np.testing.assert_allclose(chosen, 0, atol=0)  # ln 2 is far below 3e38's last place


def test_logprobs_of_a_row_depend_on_nothing_but_the_row(rng: Any) -> None:
    logits = (rng.standard_normal((7, 2500)) * 3).astype(np.float32)
    token_ids = rng.integers(0, 2500, 7).astype(np.int32)
    together = ops.logprobs(logits, token_ids, num_top=4)
    for row in range(7):
        alone = ops.logprobs(logits[row : row + 1], token_ids[row : row + 1], num_top=4)
        for part, whole in zip(alone, together, strict=True):
            np.testing.assert_array_equal(part[0], whole[row])
    with num_threads(3):
        for part, whole in zip(ops.logprobs(logits, token_ids, num_top=4), together, strict=True):
            np.testing.assert_array_equal(part, whole)


def test_logprobs_write_inside_their_outputs(rng: Any) -> None:
    logits, ids = rng.standard_normal((3, 130)).astype(np.float32), np.zeros(3, np.int32)
    with (
        guarded((3,)) as chosen,
        guarded((3,), "int32") as ranks,
        guarded((3, 130), "int32") as top_ids,
        guarded((3, 130)) as top,
    ):
        ops._core.logprobs(logits, ids, chosen, ranks, top_ids, top)


def test_logprobs_refuse_what_does_not_fit() -> None:
    logits, token_ids = np.zeros((2, 8), np.float32), np.zeros(2, np.int32)
    with pytest.raises(
        ValueError, match=r"^logprobs: num_top must be at most vocab_size=8, got 9$"
    ):
        ops.logprobs(logits, token_ids, num_top=9)
    with pytest.raises(ValueError, match=r"^logprobs: token_ids must be \[num_rows=2\], got \[3\]"):
        ops.logprobs(logits, np.zeros(3, np.int32))


@pytest.mark.parametrize("backend", CPU, indirect=True)
def test_logprobs_refuse_what_the_cpu_can_see() -> None:
    for bad in (8, -2):
        with pytest.raises(
            ValueError, match=rf"^logprobs: token_ids must be -1 or below vocab_size=8, got {bad}$"
        ):
            ops.logprobs(np.zeros((2, 8), np.float32), np.array([0, bad], np.int32))
    with pytest.raises(TypeError, match=r"^logprobs: logits must be float32, got float16$"):
        ops.logprobs(np.zeros((2, 8), np.float16), np.zeros(2, np.int32))


@pytest.mark.parametrize("backend", CUDA_OLD_AND_NEW, indirect=True)
@pytest.mark.parametrize("num_top", [0, 7, 1500])
def test_logprobs_of_several_parts_of_a_row(rng: Any, num_top: int) -> None:
    logits = strided((rng.standard_normal((3, 20001)) * 3).astype(np.float32))
    logits[1] = np.round(logits[1])
    logits[2, 300:] = -INF
    token_ids = np.array([20000, 9000, 299], np.int32)
    found = ops.logprobs(logits, token_ids, num_top=num_top)
    wanted = reference.logprobs(logits, token_ids, num_top=num_top)
    for ours, oracle in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, oracle, rtol=1e-6)
    for part, again in zip(found, ops.logprobs(logits, token_ids, num_top=num_top), strict=True):
        np.testing.assert_array_equal(part, again)


@pytest.mark.parametrize("backend", ["emulated"], indirect=True)
def test_logprobs_are_the_same_bits_where_no_cluster_fits(rng: Any) -> None:
    logits = (rng.standard_normal((3, 9001)) * 3).astype(np.float32)
    token_ids = np.array([9000, -1, 5], np.int32)
    clusters = ops.logprobs(logits, token_ids, num_top=7)
    ops._core.emulate_set_device(*EMULATED["emulated_slice"])
    for ours, theirs in zip(clusters, ops.logprobs(logits, token_ids, num_top=7), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("backend", CUDA_OLD_AND_NEW, indirect=True)
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_logprobs_of_half_floats_are_those_of_the_same_floats(rng: Any, dtype: str) -> None:
    logits = as_activation(rng.standard_normal((4, 2056)) * 4, dtype)
    token_ids = rng.integers(0, 2056, 4).astype(np.int32)
    found = ops.logprobs(logits, token_ids, num_top=3)
    same = ops.logprobs(in_float64(logits).astype(np.float32), token_ids, num_top=3)
    for ours, floats in zip(found, same, strict=True):
        np.testing.assert_array_equal(ours, floats)


@pytest.mark.parametrize("backend", CUDA, indirect=True)
def test_logprobs_on_cuda_say_how_large_a_vocabulary_may_be() -> None:
    logits = np.zeros((1, 2**21 + 1), np.float32)
    with pytest.raises(
        NotImplementedError,
        match=r"^logprobs: vocab_size must be at most 2097152 on CUDA, got 2097153$",
    ):
        ops.logprobs(logits, np.zeros(1, np.int32))
