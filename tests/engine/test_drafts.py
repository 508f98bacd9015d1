# SPDX-License-Identifier: Apache-2.0
"""Drafts: tokens that are guessed and computed ahead, without a change to any answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine_harness import Harness
from fullbeam.engine.drafts import Allowance, Drafter, index_prompt
from fullbeam.engine.rules import has_token
from fullbeam.engine.sequence import Request

REPEATING: dict[str, Any] = {"logit_bias": {2: 7, 3: 7}, "max_tokens": 40, "ignore_eos": True}
"""Text of two tokens, but for a few."""


def counts(harness: Harness) -> tuple[int, int]:
    stats = harness.engine.stats()
    return stats.num_drafted_tokens, stats.num_accepted_tokens


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"seed": 1},
        {"seed": 2, "top_p": 0.7, "temperature": 0.5},
        {"seed": 3, "top_k": 3, "min_p": 0.1},
        {"seed": 4, "n": 3, "logprobs": 2},
        {"seed": 5, "n": 2, "best_of": 4},
        {"seed": 6, "echo": True, "logprobs": 3},
        {"seed": 7, "stop": ["abb", "baab"], "logprobs": 0},
        {"seed": 8, "stop": ["aaa"], "include_stop_str_in_output": True},
        {"seed": 9, "logit_bias": {2: 7, 3: 7, 5: 5}, "stop_token_ids": [5]},
        {"seed": 10, "logit_bias": {1: 3, 2: 7, 3: 7}, "ignore_eos": False},
        {"seed": 11, "logit_bias": {1: 7, 2: 7}, "ignore_eos": False, "min_tokens": 20},
        {"seed": 12, "presence_penalty": 1.5, "logprobs": 1},
        {"temperature": 0, "frequency_penalty": 0.5},
        {"seed": 13, "repetition_penalty": 1.3, "frequency_penalty": -0.5, "n": 2},
        {"seed": 14, "allowed_token_ids": [2, 3, 9], "logit_bias": None},
        {"seed": 15, "bad_words": ["abab", "bb"], "logprobs": 1},
        {"seed": 16, "prefix": "abaabaab", "logprobs": 0},
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_drafts_hold_and_change_nothing(fields: dict[str, Any], stream: bool) -> None:
    harness = Harness(max_rows=8)
    requests = [
        harness.submit(text, prompt_index=idx, stream=stream, **{**REPEATING, **fields})
        for idx, text in enumerate(["abab", "abaabb" * 3])
    ]
    harness.run()
    for request in requests:
        harness.verify(request)
    num_drafted, num_accepted = counts(harness)
    assert num_drafted >= num_accepted > 0


def test_drafts_spare_steps() -> None:
    def num_steps(draft_tokens: int) -> int:
        harness = Harness(draft_tokens=draft_tokens)
        harness.complete("abab", temperature=0, **REPEATING | {"logit_bias": {2: 9}})
        assert (counts(harness)[1] > 0) == (draft_tokens > 0)
        return harness.decoder.num_calls

    assert num_steps(0) == 40
    assert num_steps(1) < 24
    assert num_steps(15) < 9


def test_at_most_so_many_tokens_are_computed_ahead() -> None:
    harness = Harness(draft_tokens=3)
    harness.complete("abab", temperature=0, **REPEATING | {"logit_bias": {2: 9}})
    assert max(num_tokens for num_tokens, _, _ in harness.decoder.batches[1:]) == 4


def test_nothing_is_computed_behind_the_last_token() -> None:
    harness = Harness(page_size=1)
    request = harness.submit("abab", temperature=0, **REPEATING)
    harness.run()
    num_tokens = request.num_prompt_tokens + 40
    assert harness.engine.stats().num_cached_pages == num_tokens - 1
    assert len(request.sequences[0].rows[0].ids) == num_tokens


def test_rejected_tokens_are_in_no_cached_page() -> None:
    harness = Harness(page_size=2)
    fields = REPEATING | {"logit_bias": {2: 4, 3: 4}, "seed": 3}
    first = harness.submit("abab", **fields)
    harness.run()
    num_drafted, num_accepted = counts(harness)
    assert 0 < num_accepted < num_drafted
    ids = first.sequences[0].rows[0].ids.tolist()
    again = harness.submit(ids, max_tokens=12, seed=4)
    harness.run()
    harness.verify(again)
    assert harness.engine.stats().num_reused_tokens > 30


def test_drafts_stop_where_guesses_fail() -> None:
    harness = Harness(context=512)
    harness.engine._scheduler._row_cost = 0.3
    request = harness.submit("abab", seed=1, max_tokens=400, ignore_eos=True)
    while request.num_generated < 200:
        harness.engine.step()
    num_drafted, _ = counts(harness)
    harness.run()
    assert counts(harness)[0] - num_drafted <= 2
    harness.verify(request)


@pytest.mark.parametrize(("num_rows", "drafts"), [(4, True), (13, False)])
def test_wide_batches_draft_nothing(num_rows: int, drafts: bool) -> None:
    harness = Harness(max_rows=num_rows)
    harness.engine._scheduler._row_cost = 0.15
    for idx in range(num_rows):
        harness.submit("abab", prompt_index=idx, temperature=0, **REPEATING)
    for _ in range(10):  # all of them run
        harness.engine.step()
    assert (counts(harness)[0] > 0) == drafts
    harness.run()
    for request in harness.events:
        harness.verify(request)


def test_searches_draft_nothing_and_rows_beside_them_do() -> None:
    def texts(draft_tokens: int) -> tuple[Harness, Request, list[str]]:
        harness = Harness(draft_tokens=draft_tokens)
        search = harness.submit("abab", beam_size=3, n=3, **REPEATING)
        row = harness.submit("abab", seed=1, **REPEATING)
        harness.run()
        return harness, row, [piece.text for piece in harness.choices(search)]

    harness, row, found = texts(15)
    harness.verify(row)
    assert counts(harness)[1] > 0
    assert found == texts(0)[2]
    alone = Harness()
    alone.complete("abab", beam_size=3, n=3, **REPEATING)
    assert counts(alone) == (0, 0)


def test_drafts_with_few_pages_and_a_small_budget() -> None:
    harness = Harness(num_pages=20, max_rows=5, token_budget=8, page_size=4)
    fields = REPEATING | {"logprobs": 2, "stream": True}
    requests = [harness.submit("ab" * (3 + idx), seed=idx, **fields) for idx in range(5)]
    harness.run()
    assert harness.engine.stats().num_preemptions > 0
    assert counts(harness)[1] > 0
    for request in requests:
        harness.verify(request)


def test_no_row_is_sent_back_for_a_draft() -> None:
    def num_preemptions(draft_tokens: int) -> int:
        harness = Harness(num_pages=26, page_size=2, draft_tokens=draft_tokens)
        for idx in range(2):
            fields = REPEATING | {"max_tokens": 18}
            harness.submit("abababab", temperature=0, prompt_index=idx, **fields)
        harness.run()
        return harness.engine.stats().num_preemptions

    assert num_preemptions(15) == num_preemptions(0) == 0


def test_a_token_that_cannot_be_drawn_fails_behind_those_that_can() -> None:
    def events(draft_tokens: int) -> list[str]:
        harness = Harness(draft_tokens=draft_tokens)
        harness.decoder.nan_after = 5
        bias = {2: 6, 3: 6, 5: 3}
        fields = REPEATING | {"logit_bias": bias, "max_tokens": 200, "seed": 3, "stream": True}
        request = harness.submit("abab", **fields)
        harness.run()
        assert request.num_generated > 10
        *pieces, error = harness.events[request]
        return ["".join(piece.text for piece in pieces), str(error)]  # type: ignore[union-attr]

    assert events(15) == events(0)
    assert "no token can follow" in events(15)[1]


def test_a_cancelled_draft_gives_everything_back() -> None:
    harness = Harness()
    request = harness.submit("abab", temperature=0, **REPEATING)
    while counts(harness)[1] == 0:
        harness.engine.step()
    harness.engine.cancel(request)
    harness.engine.check()
    assert harness.engine.stats().num_used_pages == 0


def test_counts_and_times_are_per_token() -> None:
    harness = Harness()
    request = harness.submit("abab", temperature=0, **REPEATING)
    harness.run()
    assert harness.engine.stats().num_generated_tokens == 40
    assert request.num_token_places == 40
    assert request.token_interval_s is not None
    assert request.first_token_at is not None
    assert request.token_interval_s * 39 == pytest.approx(
        request.last_token_at - request.first_token_at
    )


# ---- the guesses


def drafter(prompt: list[int], room: int = 40) -> tuple[Drafter, Any]:
    ids = np.zeros(len(prompt) + room, np.int32)
    ids[: len(prompt)] = prompt
    return Drafter(index_prompt(ids[: len(prompt)]), ids[: len(prompt)]), ids


def guess(prompt: list[int], text: list[int], count: int) -> list[int]:
    """What follows a prompt and the text that came, token by token."""
    own, ids = drafter(prompt)
    found = own.look(ids, len(prompt))
    for idx, token_id in enumerate(text, len(prompt)):
        ids[idx] = token_id
        found = own.look(ids, idx + 1)
    num_tokens = len(prompt) + len(text)
    return own.draft(ids, num_tokens, count) if found else []


def test_what_followed_the_last_tokens_is_guessed() -> None:
    assert guess([1, 2, 3, 4, 5, 6, 1, 2], [3], 3) == [4, 5, 6]
    assert guess([1, 2, 3, 4, 5, 6], [9, 2, 3], 2) == [4, 5]  # two tokens suffice
    assert guess([1, 2, 3, 4, 5, 6], [9, 9, 3], 2) == []
    assert guess([], [1, 2, 3, 1, 2], 1) == [3]
    assert guess([7], [], 1) == guess([7, 7], [], 1) == []
    assert guess([7, 7, 7], [], 2) == [7, 7]


def test_more_tokens_in_common_go_before_the_newest_place() -> None:
    assert guess([1, 2, 3, 4, 9, 2, 3, 5, 1], [2, 3], 1) == [4]


def test_the_newest_place_goes_first() -> None:
    assert guess([1, 2, 3, 1, 2, 4, 9], [1, 2], 1) == [4]
    assert guess([1, 2, 3, 9], [1, 2, 5, 1, 2], 1) == [5]


def test_a_guess_that_runs_into_the_text_goes_round() -> None:
    assert guess([5, 1, 2, 3], [1, 2, 3], 8) == [1, 2, 3, 1, 2, 3, 1, 2]


def test_ids_of_large_vocabularies_are_told_apart() -> None:
    high = 2**21 - 1
    assert guess([high, high - 1, 3, 0, 5], [high, high - 1], 1) == [3]
    assert guess([0, 0, 3, 1, 0, 0, 4], [1, 0], 1) == [0]


def test_rows_that_were_not_looked_at_catch_up() -> None:
    own, ids = drafter([1, 2, 3])
    ids[3:9] = [4, 5, 6, 7, 5, 6]
    assert own.look(ids, 9)
    assert own.draft(ids, 9, 2) == [7, 5]


def test_guesses_are_judged_also_where_nothing_is_drafted() -> None:
    own, ids = drafter([1, 2, 3, 4], room=400)
    shares = []
    text = [*np.random.default_rng(1).integers(5, 8, 100), *[9, 10, 11] * 30]
    for idx, token_id in enumerate(text, 4):
        ids[idx] = token_id
        own.look(ids, idx + 1)
        shares.append(own.share)
    assert shares[99] < 0.5
    assert shares[-1] > 0.95


def test_a_second_look_learns_nothing() -> None:
    own, ids = drafter([1, 2, 3, 1, 2])
    assert own.look(ids, 5)
    before = own.share
    assert own.look(ids, 5)
    assert own.share == before
    own.note(4, 2)
    assert own.share != before


def test_allowance_weighs_chance_against_cost() -> None:
    assert Allowance(1, 0.15).take(0.99, 15) == 15
    assert Allowance(1, 0.15).take(0.95, 3) == 3
    assert 0 < Allowance(1, 0.15).take(0.5, 15) < 4
    assert Allowance(1, 0.15).take(0.1, 15) == 0
    assert Allowance(1, 0.75).is_spent
    assert Allowance(32, 0.15).is_spent
    assert Allowance(32, 0.15).take(1.0, 15) == 0
    assert Allowance(13, 0.15).is_spent
    assert not Allowance(12, 0.15).is_spent
    several = Allowance(4, 0.15)
    taken = [several.take(0.9, 15) for _ in range(4)]
    assert taken[0] >= taken[-1]


def test_membership_of_masks() -> None:
    mask = np.array([0, 1 << 31, 5], np.uint32)
    assert [token_id for token_id in range(96) if has_token(mask, token_id)] == [63, 64, 66]
    assert has_token(None, 3)
