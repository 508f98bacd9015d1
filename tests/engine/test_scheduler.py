# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fake_model
from engine_harness import Harness
from fullbeam.engine.sequence import RequestCancelled, pages_needed

GREEDY: dict[str, Any] = {"ignore_eos": True, "temperature": 0}


def random_fields(draw: random.Random) -> dict[str, Any]:
    """A request's parameters; a few kinds of everything."""
    fields: dict[str, Any] = {
        "max_tokens": draw.choice([0, 1, 2, 5, 12, 25]),
        "seed": draw.randrange(1000),
        "n": draw.choice([1, 1, 1, 2, 3]),
        "temperature": draw.choice([0, 1, 1, 0.5]),
        "ignore_eos": draw.random() < 0.7,
        "echo": draw.random() < 0.3,
        "stream": draw.random() < 0.5,
        "prompt_index": draw.randrange(3),
    }
    if draw.random() < 0.5:
        fields["logprobs"] = draw.choice([0, 1, 4])
    if draw.random() < 0.4:  # a text that repeats itself, so that drafts hold
        fields["allowed_token_ids"] = draw.sample([1, 2, 3, 9, 20], 3)
    if draw.random() < 0.3:
        fields["stop"] = draw.sample(["ab", "é", "c", "dab", " a"], 2)
    return fields


@pytest.mark.parametrize("seed", range(24))
def test_random_submit_step_cancel(seed: int) -> None:
    draw = random.Random(seed)
    page_size = draw.choice([1, 3, 4, 4, 8])
    harness = Harness(
        context=64,
        max_rows=draw.choice([3, 5, 8]),
        num_pages=draw.choice([66, 80, 120, 200]) // page_size,
        page_size=page_size,
        token_budget=draw.choice([8, 16, 64]),
        max_scored_tokens=draw.choice([1, 5, 64]),
    )
    engine = harness.engine
    stems = [[draw.randrange(2, fake_model.VOCAB_SIZE) for _ in range(30)] for _ in range(3)]
    live, cancelled = [], []
    for _ in range(150):
        action = draw.random()
        if action < 0.25 and len(live) < 12:
            prompt = draw.choice(stems)[: draw.randrange(1, 30)]
            if draw.random() < 0.5:
                prompt = prompt + [draw.randrange(2, 9) for _ in range(draw.randrange(4))]
            live.append(harness.submit(prompt, **random_fields(draw)))
        elif action < 0.3 and live:
            request = live.pop(draw.randrange(len(live)))
            if not request.closed:
                cancelled.append(request)
            engine.cancel(request)
        else:
            engine.step()
        engine.check()
    harness.run()
    stats = engine.stats()
    assert stats.num_used_pages == stats.num_rows == stats.num_waiting == 0
    for request in live:
        harness.verify(request)
    for request in cancelled:
        assert isinstance(harness.events[request][-1], RequestCancelled)


def test_random_runs_meet_preemption_reuse_and_drafts() -> None:
    """The run above is only worth its name if it gets there."""
    harness = Harness(num_pages=12, max_rows=8, context=64)
    for idx in range(6):
        fields = {"allowed_token_ids": (2, 3)} if idx % 2 else {}
        harness.submit(
            [2, 3, 4, 5, 6], seed=idx, max_tokens=25, ignore_eos=True, logprobs=2, **fields
        )
    harness.run()
    stats = harness.engine.stats()
    assert stats.num_preemptions > 3
    assert stats.num_reused_tokens > 0
    assert stats.num_drafted_tokens > stats.num_accepted_tokens > 0
    for request in harness.events:
        harness.verify(request)


@pytest.mark.parametrize("fields", [{"n": 1}, {"n": 3}, {"n": 2, "logprobs": 2, "echo": True}])
def test_preemption_changes_no_token_no_logprob_and_no_piece(fields: dict[str, Any]) -> None:
    fields = {"seed": 3, "max_tokens": 20, "ignore_eos": True, "stream": True, **fields}
    harness = Harness(num_pages=9 if fields["n"] == 1 else 20)
    first = harness.submit([2] * 9, **fields)
    second = harness.submit([3] * 9, **fields)
    harness.run()
    assert harness.engine.stats().num_preemptions > 0
    alone = Harness()
    request = alone.submit([3] * 9, **fields)
    alone.run()
    assert harness.choices(second) == alone.choices(request)
    harness.verify(first)
    harness.verify(second)


def test_the_latest_is_preempted_and_comes_back_before_those_behind_it() -> None:
    harness = Harness(num_pages=9, max_rows=2)
    first = harness.submit([2] * 8, max_tokens=24, **GREEDY)
    second = harness.submit([3] * 8, max_tokens=24, **GREEDY)
    third = harness.submit([4] * 8, max_tokens=24, **GREEDY)
    waited = False
    while harness.engine.step():
        assert first.closed or first.sequences[0].is_admitted
        if second.sequences[0].has_tokens and not second.closed:
            is_waiting = not second.sequences[0].is_admitted
            waited = waited or is_waiting
            assert not (is_waiting and third.sequences[0].is_admitted)
    assert waited
    assert third.closed


@pytest.mark.parametrize(("num_pages", "num_running"), [(6, 1), (7, 2)])
def test_newcomers_leave_a_page_for_each_running_row(num_pages: int, num_running: int) -> None:
    harness = Harness(num_pages=num_pages)
    harness.submit([2] * 9, max_tokens=12, **GREEDY)  # three pages, soon four
    harness.submit([3] * 9, max_tokens=12, **GREEDY)
    harness.engine.step()
    assert harness.engine.stats().num_running == num_running
    harness.run()


def test_requests_start_in_the_order_they_came() -> None:
    harness = Harness(max_rows=2)
    requests = [harness.submit([2, idx], max_tokens=3 + idx, **GREEDY) for idx in range(2, 8)]
    done = []
    for _ in range(100):
        harness.engine.step()
        done += [r for r in requests if r.closed and r not in done]
    assert done == requests


def test_a_request_joins_while_others_run() -> None:
    harness = Harness()
    long = harness.submit("abc", max_tokens=60, **GREEDY)
    for _ in range(5):
        harness.engine.step()
    short = harness.submit("abd", max_tokens=2, **GREEDY)
    for _ in range(3):
        harness.engine.step()
    assert short.closed
    assert not long.closed
    harness.run()
    harness.verify(long)
    harness.verify(short)


def test_only_partial_pages_are_copied_for_choices() -> None:
    harness = Harness(page_size=4)
    harness.complete([2] * 8, n=4, max_tokens=6, seed=1, ignore_eos=True)
    assert harness.decoder.kv.num_copies == 0
    harness.complete([3] * 9, n=4, max_tokens=6, seed=1, ignore_eos=True)
    assert harness.decoder.kv.num_copies == 3


def test_single_token_prompt_chunks_count_as_decode() -> None:
    harness = Harness()
    harness.submit([2], max_tokens=1, **GREEDY)
    harness.submit([2, 3], max_tokens=1, **GREEDY)
    harness.run()  # the fake model checks the order
    assert harness.decoder.batches == [(3, 2, 2)]


@given(
    num_prompt=st.integers(1, 20),
    max_tokens=st.integers(0, 12),
    num_rows=st.integers(1, 4),
    page_size=st.integers(1, 5),
)
@settings(deadline=None, max_examples=60)
def test_the_pages_that_a_sequence_needs_suffice_and_one_less_does_not(
    num_prompt: int, max_tokens: int, num_rows: int, page_size: int
) -> None:
    num_pages = pages_needed(num_prompt, max_tokens, num_rows, page_size)
    harness = Harness(context=64, num_pages=num_pages, page_size=page_size)
    ids = [2 + idx % 7 for idx in range(num_prompt)]
    request = harness.submit(ids, max_tokens=max_tokens, n=num_rows, seed=1, ignore_eos=True)
    assert len(request.sequences) == 1
    used = 0
    while harness.engine.step():
        used = max(used, harness.engine.stats().num_used_pages)
    harness.verify(request)
    assert harness.engine.stats().num_preemptions == 0
    assert used <= num_pages
