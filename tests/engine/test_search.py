# SPDX-License-Identifier: Apache-2.0
"""Search through the engine, against a plain loop and the worked examples of the method."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import fake_model
import search_model
from engine_harness import Harness
from fullbeam.engine.engine import Engine
from fullbeam.engine.full_line import length_factor
from fullbeam.engine.search import Search
from fullbeam.engine.sequence import Finished, Request, RequestCancelled
from fullbeam.engine.text import Piece
from fullbeam.params import CompletionParams, ContextLengthError
from table_model import (
    AFTER,
    LETTERS,
    NUMPY,
    NUMPY_AFTER,
    NUMPY_START,
    START,
    TableDecoder,
    TableTokenizer,
)

PROMPT = [2, 3, 4, 5, 6, 2, 9]


def score_of(found: search_model.Found, params: CompletionParams) -> float:
    length = len(found.ids)
    if params.len_norm is None:
        return float(found.logprob / length**params.length_rank)
    return float(np.exp(found.logprob / length_factor(length, *params.len_norm)))


def verify(harness: Harness, request: Request) -> None:
    """Compare a search's results with the plain loop's."""
    params = request.params
    found, num_chosen = search_model.run(request.prompt_ids.tolist(), params)
    found.sort(key=lambda item: -score_of(item, params))
    pieces = [event for event in harness.events[request] if isinstance(event, Piece)]
    end = harness.events[request][-1]
    assert isinstance(end, Finished)
    assert len(pieces) == min(params.n, len(found))
    assert end.num_tokens <= num_chosen  # less where the answer was decided early
    first = request.prompt_index * params.n
    assert [piece.index for piece in pieces] == list(range(first, first + len(pieces)))
    for piece, wanted in zip(pieces, found, strict=False):
        assert piece.score == pytest.approx(score_of(wanted, params), abs=1e-5)
        assert piece.num_tokens == len(wanted.ids)
        kept = wanted.ids[: len(piece.token_ids)]  # a stop string cuts tokens off
        assert tuple(piece.token_ids) == kept
        assert piece.finish_reason == ("stop" if wanted.is_finished else "length")


def random_search(draw: random.Random) -> dict[str, Any]:
    fields: dict[str, Any] = {"max_tokens": draw.choice([1, 2, 5, 9])}
    fields["beam_size"] = draw.choice([1, 2, 3, 4])
    if draw.random() < 0.4:
        fields["diversity_groups"] = draw.choice([2, 3])
        fields["beam_size"] = draw.choice([1, 2])
        fields["diversity_strength"] = draw.choice([0, 0.3, 2.0])
    fields["n"] = draw.randint(1, fields["beam_size"] * fields.get("diversity_groups", 1))
    kind = draw.random()
    if kind < 0.3:
        fields["length_penalty"] = draw.choice([-1.0, 0.0, 0.5, 2.0])
    elif kind < 0.6:
        fields["len_norm_base"] = draw.choice([0.0, 0.3, 2.0])
        fields["len_norm_pow"] = draw.choice([-0.5, 0.0, 0.7, 2.0])
    if draw.random() < 0.5:
        fields["stop_token_ids"] = draw.sample(range(2, fake_model.VOCAB_SIZE), 4)
    if draw.random() < 0.3:
        fields["stop"] = draw.sample(["ab", "bc", "é", "c", "dab", " a", "a"], 2)
    if draw.random() < 0.2:
        fields["prefix"] = draw.choice(["a", "abc", "dé", " ab"])
    if draw.random() < 0.2:
        fields["min_tokens"] = draw.randint(0, fields["max_tokens"])
    if draw.random() < 0.2:
        fields["bad_words"] = ["ab", "d"]
    if draw.random() < 0.2:
        fields["logit_bias"] = {3: 2.0, 5: -100.0}
    if draw.random() < 0.2:
        fields["allowed_token_ids"] = [1, *draw.sample(range(2, fake_model.VOCAB_SIZE), 12)]
    if draw.random() < 0.3:
        fields["ignore_eos"] = True
    return fields


@pytest.mark.parametrize("seed", range(60))
def test_search_equals_the_plain_loop(seed: int) -> None:
    fields = random_search(random.Random(seed))
    harness = Harness(context=64, max_rows=8)
    request = harness.submit(PROMPT, **fields)
    harness.run()
    verify(harness, request)


@pytest.mark.parametrize("seed", range(20))
def test_searches_and_samples_share_batches_and_pages(seed: int) -> None:
    """Tight pages: sequences of both kinds are preempted and cancelled in every step of theirs."""
    draw = random.Random(seed)
    page_size = draw.choice([1, 3, 4])
    harness = Harness(
        context=40,
        max_rows=draw.choice([6, 10]),
        num_pages=draw.choice([66, 80, 120]) // page_size,
        page_size=page_size,
        token_budget=draw.choice([10, 16, 64]),
    )
    live: list[Request] = []
    done: list[Request] = []
    for _ in range(80):
        if draw.random() < 0.3 and len(live) < 8:
            prompt = [draw.randrange(2, 9) for _ in range(draw.randint(1, 20))]
            fields = random_search(draw)
            if draw.random() < 0.4:
                fields = {"max_tokens": 10, "seed": 3, "n": 2, "logprobs": 1}
            live.append(harness.submit(prompt, **fields, prompt_index=draw.randrange(3)))
        elif draw.random() < 0.1 and live:
            harness.engine.cancel(live.pop(draw.randrange(len(live))))
        harness.engine.step()
        harness.engine.check()
        done += [request for request in live if request.closed]
        live = [request for request in live if not request.closed]
    harness.run()
    done += live
    assert done
    for request in done:
        if request.params.is_search:
            verify(harness, request)
        else:
            harness.verify(request)
    stats = harness.engine.stats()
    assert stats.num_used_pages == 0
    assert stats.num_rows == 0


def events_of(fields: dict[str, Any], **options: Any) -> tuple[list[Any], Harness]:
    harness = Harness(context=64, max_rows=8, **options)
    request = harness.submit(PROMPT, **fields)
    harness.run()
    return harness.events[request], harness


def test_a_preempted_search_goes_on_bit_for_bit() -> None:
    fields = {"beam_size": 3, "n": 3, "max_tokens": 20, "ignore_eos": True}
    expected, _ = events_of(fields)
    harness = Harness(context=64, max_rows=8, page_size=1, num_pages=70)
    first = harness.submit([7, 8, 9], max_tokens=40, ignore_eos=True, temperature=0, n=2)
    second = harness.submit(PROMPT, **fields)
    harness.run()
    assert harness.engine.stats().num_preemptions > 0
    assert harness.events[second] == expected
    harness.verify(first)


@pytest.mark.parametrize("seed", range(30))
def test_the_early_exit_changes_nothing(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = random_search(random.Random(seed + 1000)) | {"max_tokens": 16}
    fields["stop_token_ids"] = [3, 5, 8, 11, 13]
    fields["n"] = 1
    early, _ = events_of(fields)
    monkeypatch.setattr(Search, "_is_decided", lambda self: False)
    late, _ = events_of(fields)
    assert early[:-1] == late[:-1]


def test_the_early_exit_saves_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"beam_size": 4, "max_tokens": 30, "stop_token_ids": [*range(2, 14)]}
    early, _ = events_of(fields)
    monkeypatch.setattr(Search, "_is_decided", lambda self: False)
    late, _ = events_of(fields)
    assert early[-1].num_tokens < late[-1].num_tokens


def test_beams_share_the_prompt_and_the_common_past() -> None:
    harness = Harness(context=256, max_rows=8, page_size=4)
    prompt = [2 + idx % 7 for idx in range(200)]
    request = harness.submit(prompt, beam_size=8, max_tokens=20, ignore_eos=True)
    most = 0
    while not request.closed:
        harness.engine.step()
        most = max(most, harness.engine.stats().num_used_pages)
    assert most <= 50 + 8 * 20 // 4  # not 8 * 55
    assert harness.decoder.kv.num_copies == 0
    assert harness.engine.stats().num_computed_tokens <= 200 + 19 * 8


def test_a_search_reuses_a_computed_prompt() -> None:
    harness = Harness(context=256, max_rows=8, page_size=4)
    prompt = [2 + idx % 7 for idx in range(40)]
    harness.complete(prompt, beam_size=2, max_tokens=2)
    harness.complete([*prompt, 3, 4], beam_size=4, max_tokens=2)
    assert harness.engine.stats().num_reused_tokens == 40
    harness.complete([*prompt, 3, 4, 5], beam_size=4, max_tokens=2)
    assert harness.engine.stats().num_reused_tokens == 40 + 42


def test_a_cancelled_search_frees_its_pages() -> None:
    harness = Harness(context=64, max_rows=8)
    request = harness.submit(PROMPT, beam_size=8, max_tokens=30, ignore_eos=True)
    for _ in range(5):
        harness.engine.step()
    assert harness.engine.stats().num_used_pages > 0
    harness.engine.cancel(request)
    assert harness.engine.stats().num_used_pages == 0
    harness.engine.check()
    assert isinstance(harness.events[request][-1], RequestCancelled)


def test_a_streamed_search_delivers_its_results_when_it_is_done() -> None:
    fields = {"beam_size": 3, "n": 2, "max_tokens": 6}
    expected, _ = events_of(fields)
    harness = Harness(context=64, max_rows=8)
    request = harness.submit(PROMPT, stream=True, **fields)
    harness.engine.step()
    harness.engine.step()
    assert harness.events[request] == []
    harness.run()
    assert harness.events[request] == expected


def test_logprobs_of_a_search_are_the_models() -> None:
    """Raw values, also where a bias moves the search."""
    events, _ = events_of(
        {"beam_size": 3, "n": 2, "max_tokens": 6, "logprobs": 2, "logit_bias": {4: 1.5}}
    )
    for piece in events[:-1]:
        ids = list(PROMPT)
        for token_id, value in zip(piece.token_ids, piece.logprobs.token_logprobs, strict=True):
            logits = fake_model.history_logits(ids).astype(np.float64)
            wanted = logits[token_id] - np.log(np.exp(logits).sum())
            assert value == pytest.approx(wanted, abs=1e-5)
            ids.append(token_id)
        assert all(2 <= len(top) <= 3 for top in piece.logprobs.top_logprobs)


def test_a_model_without_finite_logits_fails_the_search() -> None:
    harness = Harness(context=64, max_rows=8)
    harness.decoder.nan_after = PROMPT[-1]
    request = harness.submit(PROMPT, beam_size=2, max_tokens=3)
    other = harness.submit([2, 3], max_tokens=3, temperature=0)
    harness.run()
    assert "no finite logit" in str(harness.events[request][-1])
    harness.verify(other)
    assert harness.engine.stats().num_used_pages == 0


def test_what_cannot_run_is_refused_at_the_door() -> None:
    harness = Harness(context=64, max_rows=4, num_pages=32, page_size=4)
    with pytest.raises(ValueError, match=r"beam_size must be at most 4 \(max_rows\) in all"):
        harness.submit(PROMPT, beam_size=5)
    with pytest.raises(
        ValueError, match="max_tokens must be such that 4 hypotheses fit into the 1"
    ):
        harness.submit(PROMPT, beam_size=4, max_tokens=40)
    with pytest.raises(ContextLengthError):
        harness.submit([2] * 64, beam_size=4)
    assert harness.engine.num_waiting == 0


def suggest(pieces: list[str], start: list[float], after: list[list[float]], **fields: Any) -> Any:
    engine = Engine(TableDecoder(start, after), TableTokenizer(pieces), max_rows=8, page_size=4)
    params = CompletionParams(**{"mode": "FULL_LINE"} | fields)
    found = engine.generate([len(pieces)], params)
    engine.check()
    return [(piece.text, round(piece.score or 0, 6)) for piece in found]


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        ((0.3, 2.0), [("ab", 0.624229), ("ac", 0.611427), ("b", 0.578204)]),
        ((2.0, 0.7), [("b", 0.246098), ("ab", 0.119592), ("ac", 0.108929)]),
        ((0.3, 0.0), [("b", 0.180), ("ab", 0.048), ("ac", 0.042)]),
    ],
)
def test_example_1_beam(norm: tuple[float, float], expected: list[tuple[str, float]]) -> None:
    fields = {
        "beam_size": 2,
        "max_tokens": 3,
        "len_norm_base": norm[0],
        "len_norm_pow": norm[1],
    }
    assert suggest(LETTERS, START, AFTER, **fields) == expected
    assert suggest(LETTERS, START, AFTER, **fields, only_full_lines=False) == expected
    assert suggest(LETTERS, START, AFTER, **fields, top_n=1) == expected[:1]
    assert suggest(LETTERS, START, AFTER, **fields, top_n=None) == expected


def test_example_2_diverse() -> None:
    found = suggest(
        LETTERS,
        START,
        AFTER,
        beam_size=2,
        diversity_groups=2,
        diversity_strength=1.0,
        max_tokens=2,
    )
    assert found == [("b", 0.578204), ("c", 0.390057)]


def test_example_3_the_penalty_is_not_compounded() -> None:
    found = suggest(
        LETTERS,
        START,
        AFTER,
        beam_size=1,
        diversity_groups=3,
        diversity_strength=0.5,
        max_tokens=2,
    )
    assert found == [("b", 0.578204), ("a", 0.479214)]


@pytest.mark.parametrize("mode", ["FULL_LINE", "ONE_TOKEN"])
def test_example_4_prefix_constraint(mode: str) -> None:
    found = suggest(
        NUMPY,
        NUMPY_START,
        NUMPY_AFTER,
        beam_size=2,
        max_tokens=2,
        prefix="num",
        mode=mode,
    )
    assert found == [("numpy", 0.708470)]


def test_a_word_ends_the_search_for_one() -> None:
    """The first finished hypothesis ends it, whatever others might still find."""
    found = suggest(LETTERS, START, AFTER, beam_size=2, max_tokens=5, mode="ONE_TOKEN")
    assert found == [("b", 0.578204)]


def test_one_token_with_a_constraint_that_no_token_ends() -> None:
    fields = {"beam_size": 2, "max_tokens": 1, "prefix": "num", "mode": "ONE_TOKEN"}
    assert suggest(NUMPY, [0.2] * 5, NUMPY_AFTER, **fields) == []


def test_results_do_not_depend_on_the_batch() -> None:
    """Fifteen others, searches and samples, beside each of four."""
    draw = random.Random(5)
    singles = [random_search(draw) for _ in range(16)]
    alone = [events_of(fields)[0] for fields in singles]
    harness = Harness(context=64, max_rows=64, num_pages=2000, token_budget=64)
    requests = [harness.submit(PROMPT, **fields) for fields in singles]
    harness.run()
    for request, expected in zip(requests, alone, strict=True):
        assert harness.events[request] == [
            replace(event) if isinstance(event, Piece) else event for event in expected
        ]
