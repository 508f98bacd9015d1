# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import threading
from typing import Any

import pytest

import fake_model
from engine_harness import Harness
from fullbeam.engine.engine import Engine
from fullbeam.engine.loop import EngineLoop
from fullbeam.engine.sequence import RequestCancelled
from fullbeam.params import CompletionParams, ContextLengthError

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
    assert len(harness.events[whole]) == 1
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
    assert len(harness.events[first]) == 1


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


def test_stop_token_outside_the_vocabulary() -> None:
    with pytest.raises(ValueError, match=r"stop_token_ids must be in 0..22, got 23"):
        Harness().submit("a", stop_token_ids=[23])


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
