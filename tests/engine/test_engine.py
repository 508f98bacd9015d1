# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest

import fake_model
from engine_harness import Harness, prompt_logprobs
from fullbeam import _core, ops
from fullbeam.engine import intake
from fullbeam.engine.engine import Engine
from fullbeam.engine.loop import EngineLoop
from fullbeam.engine.runner import Interrupted
from fullbeam.engine.sequence import Finished, RequestCancelled
from fullbeam.engine.sorted_tokens import SortedTokens
from fullbeam.engine.text import Piece, TokenNames
from fullbeam.models.vocabulary import InfillTokens
from fullbeam.params import CompletionParams, ContextLengthError, ParameterError

LONG: dict[str, Any] = {"ignore_eos": True, "temperature": 0}


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"seed": 1},
        {"seed": 1, "temperature": 0.7, "top_p": 0.8},
        {"seed": 2, "top_k": 3},
        {"seed": 3, "min_p": 0.2},
        {"seed": 4, "top_p": 0},
        {"seed": -5, "n": 3},
        {"seed": 6, "logprobs": 0},
        {"seed": 7, "logprobs": 3, "n": 2, "echo": True},
        {"seed": 8, "stop": ["ab", "é"], "logprobs": 2, "ignore_eos": True},
        {"seed": 9, "stop_token_ids": [2, 3], "logprobs": 1},
        {"seed": 10, "ignore_eos": True, "max_tokens": 60},
        {"seed": 11, "echo": True},
        {"seed": 12, "min_tokens": 20},
        {"seed": 13, "min_tokens": 9, "stop_token_ids": [2, 8], "ignore_eos": True},
        {"seed": 14, "presence_penalty": 1.5, "ignore_eos": True},
        {"temperature": 0, "frequency_penalty": 0.75, "ignore_eos": True},
        {"temperature": 0, "frequency_penalty": -2, "ignore_eos": True},
        {"temperature": 0, "repetition_penalty": 1.5, "ignore_eos": True, "n": 2},
        {"seed": 15, "repetition_penalty": 0.5, "presence_penalty": -1, "logprobs": 2},
        {"seed": 16, "logit_bias": {1: -100, 3: 3, 8: 2.5}, "logprobs": 1},
        {"seed": 17, "allowed_token_ids": [1, 2, 3, 9, 20], "n": 2},
        {"seed": 18, "bad_words": ["a", "dd", "€", "b c"], "ignore_eos": True},
        {"seed": 19, "prefix": "abcd", "logprobs": 0, "stop": "b"},
        {"seed": 20, "stop": ["ab", "d"], "include_stop_str_in_output": True, "logprobs": 0},
        {"seed": 21, "include_stop_str_in_output": True, "stop_token_ids": [3, 20], "logprobs": 0},
        {"seed": 22, "skip_special_tokens": False, "ignore_eos": True, "stop": "<eos>"},
        {"seed": 23, "skip_special_tokens": False, "include_stop_str_in_output": True},
        {"seed": 24, "logprobs": 100},
        {"seed": 25, "n": 2, "best_of": 2},
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_answers_are_those_of_the_plain_loop(fields: dict[str, Any], stream: bool) -> None:
    harness = Harness()
    requests = [
        harness.submit(text, prompt_index=idx, stream=stream, **{"max_tokens": 24, **fields})
        for idx, text in enumerate(["a", "abc dd", "éab" * 9, ""])
    ]
    harness.run()
    for request in requests:
        harness.verify(request)


def test_stream_gives_text_as_it_comes_and_otherwise_one_piece_a_choice() -> None:
    harness = Harness()
    streamed = harness.submit("abc", max_tokens=20, stream=True, **LONG)
    whole = harness.submit("abc", max_tokens=20, **LONG)
    harness.run()
    assert len(harness.events[streamed]) > 8
    assert [type(event) for event in harness.events[whole]] == [Piece, Finished]
    assert harness.choices(streamed) == harness.choices(whole)


def test_end_token_is_counted_and_listed_but_not_shown() -> None:
    for seed in range(50):
        piece = Harness().complete("ab", max_tokens=200, seed=seed, logprobs=0)[0]
        if piece.finish_reason == "stop":
            assert piece.stop_reason is None
            assert piece.token_ids[-1] == fake_model.EOS
            assert piece.num_tokens == len(piece.token_ids)
            assert piece.logprobs is not None
            assert piece.logprobs.tokens[-1] == "<eos>"
            assert piece.logprobs.text_offset[-1] == len("ab" + piece.text)
            return
    raise AssertionError("no text ended by itself")


def test_ignore_eos_goes_on() -> None:
    for seed in range(50):
        piece = Harness().complete("ab", max_tokens=40, seed=seed, ignore_eos=True)[0]
        assert piece.num_tokens == 40
        if fake_model.EOS in piece.token_ids:
            return
    raise AssertionError("no end token was drawn")


def test_stop_token_is_reported_and_cut() -> None:
    whole = Harness().complete("ab", max_tokens=20, **LONG)[0]
    stop = whole.token_ids[4]
    first = whole.token_ids.index(stop)
    piece = Harness().complete("ab", max_tokens=20, stop_token_ids=[stop], **LONG)[0]
    assert piece.stop_reason == stop
    assert piece.finish_reason == "stop"
    assert piece.token_ids == whole.token_ids[: first + 1]


def test_top_p_zero_is_greedy() -> None:
    greedy = Harness().complete("ab", max_tokens=20, temperature=0)[0]
    assert Harness().complete("ab", max_tokens=20, top_p=0, seed=3)[0] == greedy


def test_without_a_seed_draws_differ_and_with_one_they_do_not() -> None:
    def draw(**fields: Any) -> list[int]:
        return Harness().complete("ab", max_tokens=30, ignore_eos=True, **fields)[0].token_ids

    assert draw() != draw()
    assert draw(seed=5) == draw(seed=5)
    assert draw(seed=5) != draw(seed=6)


def test_choices_and_prompts_draw_differently() -> None:
    harness = Harness()
    pieces = harness.complete("ab", max_tokens=30, seed=1, n=3, ignore_eos=True)
    other = harness.submit("ab", max_tokens=30, seed=1, prompt_index=1, ignore_eos=True)
    harness.run()
    drawn = [tuple(piece.token_ids) for piece in [*pieces, *harness.choices(other)]]
    assert len(set(drawn)) == 4
    assert harness.choices(other)[0].index == 1


def test_the_prompt_of_several_choices_is_computed_once() -> None:
    harness = Harness()
    harness.complete("abcd" * 10, max_tokens=2, n=4, seed=1, ignore_eos=True)
    num_prompt = len(fake_model.FakeTokenizer().encode("abcd" * 10))
    assert sum(batch[0] for batch in harness.decoder.batches) == num_prompt + 4


def test_more_choices_than_rows() -> None:
    harness = Harness(max_rows=3)
    request = harness.submit("abc", n=8, seed=4, max_tokens=12)
    harness.run()
    harness.verify(request)


def test_max_tokens_zero_computes_nothing() -> None:
    harness = Harness()
    request = harness.submit("abc", max_tokens=0, echo=True, n=2)
    assert [piece.text for piece in harness.choices(request)] == ["abc", "abc"]
    assert harness.choices(request)[0].finish_reason == "length"
    assert harness.decoder.num_calls == 0


def test_echo_with_logprobs_and_no_tokens_scores_the_prompt() -> None:
    harness = Harness()
    request = harness.submit("abc" * 30, max_tokens=0, echo=True, logprobs=2)
    harness.run()
    harness.verify(request)
    piece = harness.choices(request)[0]
    assert piece.finish_reason == "length"
    assert piece.num_tokens == 0
    assert piece.logprobs is not None
    assert piece.logprobs.top_logprobs[0] is None
    single = harness.submit([5], max_tokens=0, echo=True, logprobs=2)
    harness.run()
    harness.verify(single)


def test_scored_prompts_hold_few_logits_at_a_time() -> None:
    harness = Harness(max_scored_tokens=7, max_rows=4)
    request = harness.submit("abc" * 30, max_tokens=1, echo=True, logprobs=1, seed=1)
    harness.run()
    harness.verify(request)
    assert max(batch[2] for batch in harness.decoder.batches) <= 7 + 4


def test_evaluation_harness_contract() -> None:
    harness = Harness()
    ids = [0, 2, 3, 8, 2, 6, 13, 2]
    fields = {"max_tokens": 1, "temperature": 0, "logprobs": 1, "seed": 1234}
    piece = harness.complete(ids, echo=True, **fields)[0]
    greedy = harness.complete(ids, **fields)[0]
    assert piece.logprobs is not None
    assert len(piece.logprobs.tokens) == len(ids) + 1
    assert piece.logprobs.token_logprobs[0] is None
    for idx in range(1, len(ids) + 1):
        top, value = piece.logprobs.top_logprobs[idx], piece.logprobs.token_logprobs[idx]
        assert top is not None
        assert piece.logprobs.tokens[idx] in top
        logits = fake_model.history_logits([*ids, greedy.token_ids[0]][:idx])
        is_greedy = [*ids, greedy.token_ids[0]][idx] == logits.argmax()
        assert (value == max(top.values())) == is_greedy
    assert piece.logprobs.token_logprobs[-1] == max(piece.logprobs.top_logprobs[-1].values())


def test_a_scored_prompt_takes_no_prefix_hit() -> None:
    harness = Harness()
    harness.complete("abcd" * 10, max_tokens=4)
    request = harness.submit("abcd" * 10, max_tokens=2, echo=True, logprobs=1, seed=1)
    harness.run()
    harness.verify(request)


def test_prefix_hit_spares_all_but_the_last_page_and_changes_nothing() -> None:
    harness = Harness()
    first = harness.complete("abcd" * 10, max_tokens=8, logprobs=1, temperature=0)
    before = harness.engine.stats().num_computed_tokens
    again = harness.complete("abcd" * 10, max_tokens=8, logprobs=1, temperature=0)
    assert again == first
    stats = harness.engine.stats()
    num_prompt = len(fake_model.FakeTokenizer().encode("abcd" * 10))
    assert stats.num_reused_tokens == (num_prompt - 1) // 4 * 4
    assert stats.num_computed_tokens - before == before - stats.num_reused_tokens


def test_prefix_hit_covers_generated_text_too() -> None:
    harness = Harness()
    first = harness.complete("ab", max_tokens=30, **LONG)[0]
    request = harness.submit([0, 8, *first.token_ids], max_tokens=3, **LONG)
    harness.run()
    harness.verify(request)
    assert harness.engine.stats().num_reused_tokens >= 28


def test_long_prompts_are_cut_and_do_not_stop_the_others() -> None:
    harness = Harness(token_budget=8, max_rows=4)
    first = harness.submit("ab", max_tokens=20, stream=True, **LONG)
    harness.engine.step()
    second = harness.submit("abcd" * 20, max_tokens=3, **LONG)
    seen = len(harness.events[first])
    for _ in range(4):
        harness.engine.step()
    assert len(harness.events[first]) > seen
    harness.run()
    assert max(batch[0] for batch in harness.decoder.batches) <= 8
    harness.verify(first)
    harness.verify(second)


def test_cancel_frees_rows_and_pages_at_once() -> None:
    harness = Harness()
    request = harness.submit("abc", n=3, max_tokens=50, **LONG)
    for _ in range(5):
        harness.engine.step()
    assert harness.engine.stats().num_used_pages > 0
    harness.engine.cancel(request)
    stats = harness.engine.stats()
    assert stats.num_used_pages == 0
    assert stats.num_rows == 0
    harness.engine.check()
    assert isinstance(harness.events[request][-1], RequestCancelled)
    assert not harness.engine.step()


def test_cancel_of_a_waiting_and_of_a_finished_request() -> None:
    harness = Harness(max_rows=1)
    first = harness.submit("abc", max_tokens=5, **LONG)
    second = harness.submit("abc", max_tokens=5, **LONG)
    harness.engine.step()
    harness.engine.cancel(second)
    harness.run()
    harness.verify(first)
    assert [type(event) for event in harness.events[second]] == [RequestCancelled]
    harness.engine.cancel(first)
    harness.run()
    assert [type(event) for event in harness.events[first]] == [Piece, Finished]


def test_only_requests_of_its_own_are_cancelled() -> None:
    harness, other = Harness(), Harness()
    harness.submit("a", **LONG)
    foreign = other.engine.submit("a", CompletionParams(**LONG), on_event=lambda event: None)
    for wrong in (None, "a", foreign):
        kind = type(wrong).__name__
        with pytest.raises(ValueError, match=f"^cancel: request must be .* own, got {kind}$"):
            harness.engine.cancel(wrong)  # type: ignore[arg-type]
    assert harness.engine.step()
    assert not foreign.closed


def test_events_need_a_receiver() -> None:
    with pytest.raises(TypeError, match=r"^submit: on_event must be callable, got NoneType$"):
        Harness().engine.submit("a", on_event=None)  # type: ignore[arg-type]


def test_cancel_from_a_callback() -> None:
    harness = Harness()
    events: list[Any] = []

    def on_event(event: Any) -> None:
        events.append(event)
        harness.engine.cancel(request)

    request = harness.engine.submit(
        "abc", CompletionParams(max_tokens=50, **LONG), on_event=on_event, stream=True
    )
    harness.run()
    assert len(events) == 2
    assert harness.engine.stats().num_used_pages == 0


def test_a_failed_step_fails_its_requests_and_the_engine_goes_on() -> None:
    harness = Harness(max_rows=2)
    first = harness.submit("abc", max_tokens=10, **LONG)
    second = harness.submit("a", max_tokens=10, **LONG)
    third = harness.submit("ab", max_tokens=10, **LONG)
    harness.decoder.fail_at = 4
    harness.run()
    for request in (first, second):
        with pytest.raises(RuntimeError, match="step failed: FloatingPointError: on demand"):
            harness.choices(request)
    harness.verify(third)
    assert harness.engine.stats().num_used_pages == 0


def test_logits_without_a_finite_value_fail_their_request_only() -> None:
    harness = Harness()
    harness.decoder.nan_after = 13
    bad = harness.submit([2, 13], max_tokens=5, **LONG)
    good = harness.submit([2, 3], max_tokens=1, **LONG)
    harness.run()
    with pytest.raises(RuntimeError, match="no finite logit"):
        harness.choices(bad)
    harness.verify(good)
    assert harness.engine.stats().num_used_pages == 0


def test_a_receiver_that_fails_loses_its_request_only() -> None:
    harness = Harness()

    def on_event(event: Any) -> None:
        raise RuntimeError("event loop is closed")

    harness.engine.submit("a", CompletionParams(max_tokens=9), on_event=on_event, stream=True)
    other = harness.submit("ab", max_tokens=9, seed=1)
    harness.run()
    harness.verify(other)
    assert harness.engine.stats().num_rows == 0


def test_prompt_of_ids_is_taken_as_it_is_and_echoed_by_decoding() -> None:
    piece = Harness().complete([3, 19, 8], max_tokens=0, echo=True)[0]
    assert piece.text == "béab"


@pytest.mark.parametrize("prompt", ["", None])
def test_empty_prompt_is_the_start_of_a_document(prompt: str | None) -> None:
    harness = Harness()
    request = harness.submit(prompt, max_tokens=5, echo=True, seed=1)
    assert request.prompt_ids.tolist() == [fake_model.BOS]
    harness.run()
    harness.verify(request)


def test_max_tokens_is_16_or_what_the_context_leaves() -> None:
    harness = Harness(context=40)
    assert harness.submit([2] * 10).max_tokens == 16
    assert harness.submit([2] * 30).max_tokens == 10
    assert harness.submit([2] * 40).max_tokens == 0
    harness.run()


def test_context_is_used_to_its_last_token() -> None:
    harness = Harness(context=40)
    request = harness.submit([2] * 30, max_tokens=10, **LONG)
    harness.run()
    harness.verify(request)


def test_too_long_is_refused_with_the_numbers() -> None:
    harness = Harness(context=40)
    text = (
        r"prompt \+ max_tokens must be at most 40 tokens \(the context\), got 41 "
        r"\(30 in the prompt, 11 in the completion\)"
    )
    with pytest.raises(ContextLengthError, match=text) as caught:
        harness.submit([2] * 30, max_tokens=11)
    assert caught.value.field == "max_tokens"
    with pytest.raises(ContextLengthError, match="got 41") as caught:
        harness.submit([2] * 41)
    assert caught.value.field == "prompt"


def test_a_request_that_never_fits_into_the_pages_is_refused() -> None:
    harness = Harness(num_pages=4)
    with pytest.raises(ValueError, match="KV cache of 16 tokens, got 12 \\+ 6"):
        harness.submit([2] * 12, max_tokens=6)
    request = harness.submit([2] * 12, max_tokens=5, **LONG)
    harness.run()
    harness.verify(request)


def test_choices_that_do_not_fit_together_run_one_after_the_other() -> None:
    harness = Harness(num_pages=5)
    request = harness.submit([2] * 6, max_tokens=11, n=3, seed=1, ignore_eos=True)
    harness.run()
    harness.verify(request)


@pytest.mark.parametrize(
    ("prompt", "error", "text"),
    [
        ([], ValueError, r"at least one token id, got \[\]"),
        ([2, 99], ValueError, r"prompt\[1\] must be in 0..22, got 99"),
        ([-1], ValueError, r"prompt\[0\] must be in 0..22, got -1"),
        ([2, 1.5], TypeError, r"prompt\[1\] must be a token id, got float"),
        ([True], TypeError, r"prompt\[0\] must be a token id, got bool"),
    ],
)
def test_bad_prompts(prompt: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Harness().submit(prompt)


@pytest.mark.parametrize(
    ("field", "value"),
    [("stop_token_ids", [23]), ("allowed_token_ids", [2, 23]), ("logit_bias", {23: 1})],
)
def test_ids_outside_the_vocabulary(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{field} must be in 0..22, got 23"):
        Harness().submit("a", **{field: value})
    Harness().submit("a", stop_token_ids=[22], allowed_token_ids=[22], logit_bias={22: 1})


def test_min_tokens_beyond_the_default_length() -> None:
    with pytest.raises(ParameterError, match="min_tokens must be at most max_tokens = 16, got 17"):
        Harness().submit("a", min_tokens=17)


@pytest.mark.parametrize("fields", [{"beam_size": 2}, {"best_of": 3}, {"prompt_logprobs": 2}])
def test_what_is_known_at_the_end_is_streamed_there(fields: dict[str, Any]) -> None:
    harness = Harness()
    whole = harness.submit("abc", max_tokens=9, seed=1, **fields)
    streamed = harness.submit("abc", max_tokens=9, seed=1, stream=True, **fields)
    harness.run()
    assert harness.choices(streamed) == harness.choices(whole)


def test_when_no_token_is_allowed_the_request_fails() -> None:
    harness = Harness()
    request = harness.submit("a", allowed_token_ids=[2], bad_words="a", max_tokens=3)
    harness.run()
    message = "allowed_token_ids must leave a token that can follow beside bad_words$"
    with pytest.raises(ValueError, match=message):
        harness.choices(request)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prompt_index": -1}, ValueError, "prompt_index must be in 0..4294967295, got -1"),
        ({"prompt_index": 2**32}, ValueError, "prompt_index must be in 0..4294967295, got 42949"),
        ({"prompt_index": "1"}, TypeError, "'str' object cannot be interpreted as an integer"),
        ({"params": {"n": 1}}, TypeError, "params must be CompletionParams, got dict"),
    ],
)
def test_bad_arguments_are_refused_at_the_call(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    engine = Harness().engine
    with pytest.raises(error, match=message):
        engine.submit("a", on_event=lambda event: None, **options)
    assert not engine.step()


def test_an_interrupted_call_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness()
    engine = harness.engine
    step = engine.step

    def interrupted() -> bool:
        step()
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate("abc", CompletionParams(max_tokens=20, ignore_eos=True))
    assert engine.stats().num_running == engine.stats().num_used_pages == 0


@pytest.mark.parametrize("options", [{}, {"max_rows": 2}, {"num_pages": 8}])
@pytest.mark.parametrize("fields", [{}, {"logprobs": 2, "echo": True}, {"stop": ["ab", "d"]}])
def test_best_of_returns_the_likeliest_candidates_best_first(
    options: dict[str, int], fields: dict[str, Any]
) -> None:
    harness = Harness(**options)
    request = harness.submit("abc", best_of=6, n=2, max_tokens=12, seed=3, prompt_index=1, **fields)
    harness.run()
    harness.verify(request)
    pieces = [event for event in harness.events[request] if isinstance(event, Piece)]
    assert [piece.index for piece in pieces] == [2, 3]
    assert pieces[0].score is not None
    assert pieces[1].score is not None
    assert pieces[0].score >= pieces[1].score
    assert (pieces[0].logprobs is not None) == ("logprobs" in fields)


def test_best_of_says_nothing_before_all_candidates_are_done() -> None:
    harness = Harness(max_rows=1)
    request = harness.submit("abc", best_of=3, max_tokens=5, ignore_eos=True, seed=1)
    for _ in range(14):
        harness.engine.step()
        assert harness.events[request] == []
    harness.run()
    harness.verify(request)


def test_best_of_as_many_equals_is_in_the_order_of_drawing() -> None:
    harness = Harness()
    pieces = harness.complete("abc", best_of=3, n=2, max_tokens=5, temperature=0)
    assert pieces[0].token_ids == pieces[1].token_ids


def test_best_of_without_tokens() -> None:
    harness = Harness()
    request = harness.submit("abc", best_of=3, n=2, max_tokens=0)
    assert [piece.text for piece in harness.choices(request)] == ["", ""]


def test_prompt_logprobs_name_the_likeliest_tokens_and_ranks() -> None:
    harness = Harness()
    ids = [0, 2, 3, 8, 16, 6, 13]
    piece = harness.complete(ids, prompt_logprobs=2, max_tokens=1, temperature=0)[0]
    assert piece.logprobs is None
    assert piece.prompt_logprobs is not None
    assert piece.prompt_logprobs[0] is None
    values = prompt_logprobs(ids)
    for idx in range(1, len(ids)):
        found = piece.prompt_logprobs[idx]
        assert found is not None
        logits = fake_model.history_logits(ids[:idx])
        order = sorted(range(len(logits)), key=lambda token_id: -logits[token_id])
        assert set(found) == {ids[idx], *order[:2]}
        for token_id, entry in found.items():
            assert entry.rank == order.index(token_id) + 1
            assert entry.decoded_token == TokenNames(harness.engine.tokenizer)[token_id]
        assert found[ids[idx]].logprob == values[idx]


def test_prompt_logprobs_of_all_tokens() -> None:
    piece = Harness().complete("ab", prompt_logprobs=-1, max_tokens=0)[0]
    assert piece.prompt_logprobs is not None
    assert [len(found or {}) for found in piece.prompt_logprobs] == [0, fake_model.VOCAB_SIZE]


def test_prompt_logprobs_beside_echo_keep_their_own_numbers() -> None:
    fields: dict[str, Any] = {"max_tokens": 2, "temperature": 0}
    both = Harness().complete("abc dd", echo=True, logprobs=1, prompt_logprobs=3, **fields)[0]
    echo = Harness().complete("abc dd", echo=True, logprobs=1, **fields)[0]
    alone = Harness().complete("abc dd", prompt_logprobs=3, **fields)[0]
    assert both.logprobs == echo.logprobs
    assert both.prompt_logprobs == alone.prompt_logprobs


def test_rows_with_and_without_edits_share_a_batch() -> None:
    harness = Harness()
    fields: list[dict[str, Any]] = [
        {"seed": 1},
        {"seed": 2, "presence_penalty": 2, "logprobs": 1},
        {"seed": 3, "logit_bias": {3: 5}},
        {"seed": 4, "allowed_token_ids": [2, 3, 4]},
        {"seed": 5, "repetition_penalty": 1.3, "min_tokens": 5, "n": 2},
        {"temperature": 0, "logprobs": 0, "bad_words": "c"},
    ]
    requests = []
    for each in fields:
        requests.append(harness.submit("abc", max_tokens=15, **each))
        harness.engine.step()
    harness.run()
    for request in requests:
        harness.verify(request)


def test_edits_survive_a_preemption() -> None:
    harness = Harness(num_pages=10, max_rows=3)
    fields: dict[str, Any] = {"presence_penalty": 2, "bad_words": "ab", "prefix": "dcba"}
    requests = [
        harness.submit("abc", max_tokens=24, seed=seed, min_tokens=24, **fields)
        for seed in range(3)
    ]
    harness.run()
    assert harness.engine.stats().num_preemptions > 0
    for request in requests:
        harness.verify(request)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_rows": 0}, "max_rows must be at least 1, got 0"),
        ({"num_pages": 0}, "num_pages must be at least 1, got 0"),
        ({"token_budget": 3, "max_rows": 4}, "token_budget must be at least 4, got 3"),
    ],
)
def test_bad_options(options: dict[str, int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Harness(**options)


def test_generate_drives_the_engine() -> None:
    harness = Harness()
    pieces = harness.engine.generate("ab", CompletionParams(n=2, seed=1, max_tokens=8))
    assert [piece.index for piece in pieces] == [0, 1]
    with pytest.raises(ValueError, match="got 99"):
        harness.engine.generate([99])


def test_close_cancels_and_refuses() -> None:
    harness = Harness()
    request = harness.submit("ab", max_tokens=50, **LONG)
    harness.engine.step()
    harness.engine.close()
    assert isinstance(harness.events[request][-1], RequestCancelled)
    with pytest.raises(RuntimeError, match="closed"):
        harness.submit("ab")


def test_the_loop_sleeps_when_idle_and_wakes_for_requests() -> None:
    decoder = fake_model.FakeDecoder()
    engine = Engine(decoder, fake_model.FakeTokenizer())
    loop = EngineLoop(engine)
    loop.start()
    for _ in range(3):
        done = threading.Event()
        engine.submit("ab", CompletionParams(max_tokens=4), on_event=lambda event, d=done: d.set())
        assert done.wait(10)
    loop.stop()
    assert not any(thread.name == "fullbeam-engine" for thread in threading.enumerate())


def test_token_healing_goes_on_in_the_middle_of_a_token() -> None:
    harness = Harness()
    fields: dict[str, Any] = {"logit_bias": {10: 20}, "max_tokens": 3, "logprobs": 0}
    request = harness.submit("d ab", token_healing=True, echo=True, seed=1, **fields)
    harness.run()
    piece = harness.choices(request)[0]
    assert request.prompt_ids.tolist() == [fake_model.BOS, 5, 6]  # "d", " "
    assert piece.token_ids == [10, 10, 10]  # "abc"
    assert piece.text == "d abcabcabc"
    assert piece.logprobs is not None
    assert piece.logprobs.text_offset == [0, 0, 1, 2, 5, 8]
    plain = harness.submit("d ab", echo=True, seed=1, **fields)
    harness.run()
    assert harness.choices(plain)[0].text == "d ababcabcabc"


def test_healed_text_and_prefix_come_one_after_the_other() -> None:
    harness = Harness()
    request = harness.submit("d a", token_healing=True, prefix="b", max_tokens=2, temperature=0)
    harness.run()
    assert request.prompt_ids.tolist() == [fake_model.BOS, 5, 6]
    assert harness.choices(request)[0].text.startswith("b")


def test_token_healing_of_ids_is_refused() -> None:
    with pytest.raises(ValueError, match="token_healing must be left out"):
        Harness().submit([2, 3], token_healing=True)


def test_a_prefix_that_no_tokens_spell_is_refused() -> None:
    with pytest.raises(ValueError, match="prefix must be text that the tokens can spell, got 'ax'"):
        Harness().submit("a", prefix="ax")


@pytest.mark.parametrize(("context_len", "expected"), [(4, 4), (-1, 30), (100, 30)])
def test_context_len_keeps_the_end_of_the_prompt(context_len: int, expected: int) -> None:
    harness = Harness(context=40)
    request = harness.submit([3] * 50 + [2, 5], max_tokens=10, context_len=context_len)
    assert request.prompt_ids.tolist() == ([3] * 50 + [2, 5])[-expected:]
    with pytest.raises(ContextLengthError):
        harness.submit([3] * 50, max_tokens=10)
    harness.run()


def test_truncation_keeps_the_end_of_a_text_to_the_token() -> None:
    harness = Harness(context=40)
    text = "a\nb\ncd"

    def ids(num_kept: int, **fields: Any) -> list[int]:
        request = harness.submit(text, max_tokens=10, truncate_prompt_tokens=num_kept, **fields)
        return request.prompt_ids.tolist()

    assert ids(100) == ids(-1) == [fake_model.BOS, 2, 7, 3, 7, 11]
    assert ids(3) == [fake_model.BOS, 7, 11]  # whole lines would be one token less
    assert ids(2, add_special_tokens=False) == [7, 11]
    assert len(harness.submit([3] * 50, max_tokens=10, truncate_prompt_tokens=-1).prompt_ids) == 30
    with pytest.raises(ContextLengthError):
        harness.submit([3] * 50, max_tokens=10, truncate_prompt_tokens=31)
    harness.run()


def test_tokens_may_be_named_by_their_ids() -> None:
    fields: dict[str, Any] = {"max_tokens": 2, "echo": True, "logprobs": 30, "temperature": 0}
    piece = Harness().complete([2, 3], return_tokens_as_token_ids=True, **fields)[0]
    assert piece.logprobs is not None
    ids = [2, 3, *piece.token_ids]
    assert piece.logprobs.tokens == [f"token_id:{token_id}" for token_id in ids]
    names = {f"token_id:{token_id}" for token_id in range(fake_model.VOCAB_SIZE)}
    assert [set(top or ()) for top in piece.logprobs.top_logprobs] == [set(), names, names, names]


def test_number_of_scored_values_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "_MAX_SCORED_VALUES", 3 * fake_model.VOCAB_SIZE)
    harness = Harness()
    harness.submit([2, 3, 4], prompt_logprobs=-1)
    harness.submit([2, 3, 4, 5], prompt_logprobs=8)
    with pytest.raises(ValueError, match="prompt_logprobs must be at least 0 for a prompt of more"):
        harness.submit([2, 3, 4, 5], prompt_logprobs=-1)
    harness.run()


def test_offsets_of_a_prompt_whose_end_was_kept() -> None:
    fields: dict[str, Any] = {"max_tokens": 1, "echo": True, "logprobs": 0, "temperature": 0}
    piece = Harness().complete("a\n" * 20 + "cd", context_len=6, **fields)[0]
    assert piece.text.startswith("a\n" * 20 + "cd")
    assert piece.logprobs is not None
    assert piece.logprobs.tokens[-2:-1] == ["cd"]
    assert piece.logprobs.text_offset[-2:] == [40, 42]


def test_add_special_tokens() -> None:
    harness = Harness()
    assert harness.submit("ab", add_special_tokens=False).prompt_ids.tolist() == [8]
    assert harness.submit("ab").prompt_ids.tolist() == [fake_model.BOS, 8]


def test_suffix_fills_the_middle_and_its_marks_end_the_text() -> None:
    harness = Harness()
    harness.engine.tokenizer.infill = InfillTokens(prefix=22, suffix=21, middle=20)  # type: ignore[misc]
    fields: dict[str, Any] = {"max_tokens": 5, "echo": True, "ignore_eos": True, "seed": 1}
    request = harness.submit("ab", suffix="dd", logit_bias={21: 100}, **fields)
    harness.run()
    piece = harness.choices(request)[0]
    assert request.prompt_ids.tolist() == [fake_model.BOS, 22, 8, 21, 13, 20]
    assert (piece.text, piece.token_ids, piece.finish_reason) == ("ab", [21], "stop")


def test_suffix_prefix_and_healing_go_together() -> None:
    harness = Harness()
    harness.engine.tokenizer.infill = InfillTokens(prefix=22, suffix=21, middle=20)  # type: ignore[misc]
    fields: dict[str, Any] = {"suffix": "dd", "prefix": "b", "token_healing": True}
    request = harness.submit("d a", **fields, beam_size=3, mode="FULL_LINE", only_full_lines=False)
    harness.run()
    assert request.prompt_ids.tolist() == [fake_model.BOS, 22, 5, 6, 21, 13, 20]
    assert (request.constraint, request.healed) == (b"ab", b"a")
    texts = [piece.text for piece in harness.choices(request)]
    assert texts
    assert all(text.startswith("b") for text in texts)
    assert {20, 21, 22} <= request.end_ids


def test_prepare_leaves_nothing_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness()
    harness.engine.prepare()
    monkeypatch.delattr(fake_model.FakeTokenizer, "all_token_bytes")
    monkeypatch.delattr(SortedTokens, "characters")
    assert harness.complete("d a", token_healing=True, beam_size=2, mode="ONE_TOKEN") is not None


def test_suffix_needs_infill_tokens() -> None:
    with pytest.raises(ValueError, match="suffix must be left out: the model has no infill tokens"):
        Harness().submit("a", suffix="b")


class Stopped(fake_model.FakeDecoder):
    """Computes until it is stopped, once it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = threading.Event()
        self.stops: list[Any] = []

    def forward(self, batch: Any, kv: Any, stop: Any) -> Any:
        program = recorded_step()
        self.stops.append(stop)
        while self.waits.is_set():
            if not program.run(stop):
                self.waits.clear()
                raise Interrupted
        return super().forward(batch, kv, stop)


def recorded_step() -> Any:
    x = np.ones((1, 32), np.float32)
    _core.start_recording()
    ops.rms_norm(x, np.ones(32, np.float32), out=x)
    return _core.stop_recording()


def test_a_step_ends_early_once_nobody_wants_it() -> None:
    decoder = Stopped()
    engine = Engine(decoder, fake_model.FakeTokenizer(), page_size=4)  # type: ignore[arg-type]
    first: list[Any] = []
    second: list[Any] = []
    requests = [
        engine.submit(
            "abc", CompletionParams(max_tokens=9, ignore_eos=True), on_event=events.append
        )
        for events in (first, second)
    ]
    engine.step()
    decoder.waits.set()
    thread = threading.Thread(target=engine.step)
    thread.start()
    while len(decoder.stops) < 2:
        time.sleep(0.001)
    engine.cancel(requests[0])
    thread.join(0.05)
    assert thread.is_alive()  # the other one is being computed
    engine.cancel(requests[1])
    thread.join(10)
    assert not thread.is_alive()
    assert decoder.num_calls == 1
    while engine.step():
        pass
    assert [type(events[-1]) for events in (first, second)] == [RequestCancelled] * 2
    assert engine.stats().num_used_pages == 0
    engine.check()
    again = engine.generate("abc", CompletionParams(max_tokens=3, ignore_eos=True, temperature=0))
    assert len(again[0].token_ids) == 3
