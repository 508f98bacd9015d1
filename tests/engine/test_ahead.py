# SPDX-License-Identifier: Apache-2.0
"""Steps that start before the tokens of the one before are known."""

from __future__ import annotations

import random
from typing import Any

import pytest

from engine_harness import Harness
from fullbeam.engine.device import CpuDevice
from fullbeam.engine.sequence import RequestCancelled


class AheadDevice(CpuDevice):
    """The CPU, of which the engine believes that it is not done when it returns."""

    runs_ahead = True


@pytest.fixture
def launches() -> list[bool]:
    return []


def harness(launches: list[bool], **options: Any) -> Harness:
    """Notes of each launch whether it went on from a step under way."""
    made = Harness(device=AheadDevice(1), **options)
    launch = made.engine._launch

    def spy(*args: Any) -> Any:
        launches.append(len(args) > 1)
        return launch(*args)

    made.engine._launch = spy  # type: ignore[method-assign]
    return made


def test_a_single_row_is_always_one_step_ahead(launches: list[bool]) -> None:
    h = harness(launches)
    request = h.submit("abcde", max_tokens=12, temperature=0.8, seed=3)
    h.run()
    h.verify(request)
    # The prompt, the first token behind it, then the others; none behind the last.
    assert launches == [False, False, *[True] * 10]


@pytest.mark.parametrize(
    "fields",
    [
        {"frequency_penalty": 2.0, "logit_bias": {7: 6, 9: 6}},  # which keep coming back
        {"presence_penalty": 2.0},
        {"repetition_penalty": 1.5, "temperature": 0.0},
        {"frequency_penalty": -1.0, "n": 3, "best_of": 4, "logprobs": 1},
    ],
)
def test_rows_with_penalties_count_the_token_under_way(
    launches: list[bool], fields: dict[str, Any]
) -> None:
    h = harness(launches)
    plain = h.submit("ba", max_tokens=9, temperature=0.8, seed=5)
    given = {"max_tokens": 12, "temperature": 0.8, "seed": 3, "ignore_eos": True}
    request = h.submit("abcde", **given | fields)
    h.run()
    h.verify(request)
    h.verify(plain)
    assert launches == [False, False, *[True] * 10]


@pytest.mark.parametrize(
    "fields",
    [
        {"bad_words": ["q"]},
        {"min_tokens": 5},
    ],
)
def test_what_hangs_on_the_tokens_waits_for_them(
    launches: list[bool], fields: dict[str, Any]
) -> None:
    h = harness(launches)
    request = h.submit("abcde", max_tokens=12, temperature=0.8, seed=3, **fields)
    h.run()
    h.verify(request)
    assert not any(launches)


def test_drafts_and_steps_ahead_exclude_each_other(launches: list[bool]) -> None:
    h = harness(launches, draft_tokens=4)
    request = h.submit("ab" * 9, max_tokens=20, temperature=0, logit_bias={2: 9})
    h.run()
    h.verify(request)
    assert not any(launches)


@pytest.mark.parametrize("seed", range(12))
def test_requests_of_all_kinds_come_and_go(launches: list[bool], seed: int) -> None:
    rng = random.Random(seed)
    h = harness(launches, max_rows=5, num_pages=rng.choice([None, 40]), context=64)
    kept, dropped = [], []
    for idx in range(40):
        fields: dict[str, Any] = {"max_tokens": rng.randint(1, 20), "seed": idx}
        fields["temperature"] = rng.choice([0.0, 0.7, 1.5])
        if rng.random() < 0.3:
            fields["n"] = rng.randint(2, 4)
        if rng.random() < 0.5:
            name = rng.choice(["frequency_penalty", "presence_penalty", "repetition_penalty"])
            fields[name] = rng.choice([0.5, 1.5])
        if rng.random() < 0.3:
            fields["stop"] = [rng.choice("abcdefgh")]
        if rng.random() < 0.3:
            fields["logprobs"] = 2
        prompt = [rng.randrange(3, 20) for _ in range(rng.randint(1, 30))]
        request = h.submit(prompt, stream=rng.random() < 0.5, **fields)
        if rng.random() < 0.15:
            dropped.append(request)
        else:
            kept.append(request)
        for _ in range(rng.randint(0, 6)):
            h.engine.step()
            h.engine.check()
        if dropped and rng.random() < 0.5:
            h.engine.cancel(rng.choice(dropped))
    for request in dropped:
        h.engine.cancel(request)
    h.run()
    for request in kept:
        h.verify(request)
    for request in dropped:
        last = h.events[request][-1]
        assert isinstance(last, RequestCancelled) or h.choices(request)
    assert h.engine.stats().num_used_pages == 0
    assert sum(launches) > 20


def test_a_model_without_an_answer_fails_its_request_alone(launches: list[bool]) -> None:
    h = harness(launches)
    h.decoder.nan_after = 7
    good = h.submit([3, 4, 5], max_tokens=15, temperature=0, allowed_token_ids=[8, 9])
    bad = h.submit([3, 4, 6], max_tokens=15, temperature=0, logit_bias={7: 100})
    h.run()
    assert isinstance(h.events[bad][-1], RuntimeError)
    assert h.choices(good)[0].num_tokens == 15
    assert h.engine.stats().num_used_pages == 0


def test_closing_drops_the_step_under_way(launches: list[bool]) -> None:
    h = harness(launches)
    request = h.submit("abcde", max_tokens=12, temperature=0.8, seed=3)
    for _ in range(4):
        h.engine.step()
    h.engine.close()
    assert isinstance(h.events[request][-1], RequestCancelled)
    assert not h.engine.step()
    assert h.engine.stats().num_used_pages == 0
