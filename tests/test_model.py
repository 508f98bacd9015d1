# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

import fake_model
import fullbeam
from fullbeam import _core
from fullbeam.engine.device import why_no_cuda
from fullbeam.engine.engine import Engine
from fullbeam.engine.sequence import Finished, RequestCancelled
from fullbeam.model import Model, load, split_prompt
from fullbeam.params import CompletionParams
from fullbeam.results import Tally, Usage

GREEDY: dict[str, Any] = {"ignore_eos": True, "temperature": 0}
BOS = fake_model.BOS


@pytest.fixture
def model() -> Iterator[Model]:
    with new_model() as model:
        yield model


def new_model(**options: Any) -> Model:
    decoder = fake_model.FakeDecoder(2048)
    engine = Engine(decoder, fake_model.FakeTokenizer(), **{"page_size": 4, **options})
    return Model(engine, name="fake")


def wait_idle(model: Model) -> None:
    """Wait until the engine has nothing to do, and check its books."""
    for _ in range(1000):
        stats = model.engine.stats()
        if stats.num_rows == stats.num_waiting == stats.num_used_pages == 0:
            model.engine.check()
            return
        time.sleep(0.005)
    raise AssertionError("the engine does not come to rest")


def test_best_of_counts_every_candidate_and_reports_scores(model: Model) -> None:
    params = CompletionParams(max_tokens=8, seed=1, n=2, best_of=5)
    result = model.complete("abc", params=params)
    wanted = [fake_model.answer([BOS, 10], params, choice=number) for number in range(5)]
    assert result.usage.completion_tokens == sum(answer["num_tokens"] for answer in wanted)
    wanted.sort(key=lambda answer: -answer["mean"])
    assert [choice.score for choice in result.choices] == [a["mean"] for a in wanted[:2]]
    assert [choice.text for choice in result.choices] == [a["text"] for a in wanted[:2]]
    assert [choice.index for choice in result.choices] == [0, 1]
    assert result.choices[0].logprobs is None


def test_prompt_logprobs_are_in_every_choice(model: Model) -> None:
    result = model.complete("abc", max_tokens=2, n=2, prompt_logprobs=0, seed=1)
    score = model.score("abc")
    assert isinstance(score, fullbeam.Score)
    for choice in result.choices:
        assert choice.prompt_logprobs is not None
        first, second = choice.prompt_logprobs
        assert first is None
        assert second is not None
        assert second[10].decoded_token == "abc"
        assert second[10].logprob == score.logprobs[1]


def test_complete_text(model: Model) -> None:
    result = model.complete("abc", max_tokens=8, seed=1)
    wanted = fake_model.answer([BOS, 10], CompletionParams(max_tokens=8, seed=1))
    choice = result.choices[0]
    assert choice.text == wanted["text"]
    assert choice.token_ids == wanted["token_ids"]
    assert choice.finish_reason == wanted["finish_reason"]
    assert choice.score is None
    assert result.usage.prompt_tokens == 2
    assert result.usage.completion_tokens == wanted["num_tokens"]
    assert result.usage.total_tokens == 2 + wanted["num_tokens"]


def test_several_prompts_and_choices_come_in_order(model: Model) -> None:
    prompts = ["abc", "a", "dd"]
    result = model.complete(prompts, n=2, seed=1, max_tokens=9)
    assert [choice.index for choice in result.choices] == list(range(6))
    params = CompletionParams(n=2, seed=1, max_tokens=9)
    for choice in result.choices:
        ids = fake_model.FakeTokenizer().encode(prompts[choice.index // 2])
        wanted = fake_model.answer(
            ids, params, prompt_index=choice.index // 2, choice=choice.index % 2
        )
        assert choice.text == wanted["text"]
    assert result.usage.prompt_tokens == 6
    lists = model.complete([[BOS, 10], [BOS, 2], [BOS, 13]], n=2, seed=1, max_tokens=9)
    assert lists == result
    assert (
        model.complete([BOS, 10], seed=1).choices[0].text
        == model.complete("abc", seed=1).choices[0].text
    )


def test_score_of_a_choice_is_its_mean_logprob(model: Model) -> None:
    choice = model.complete("abc", max_tokens=5, logprobs=0, **GREEDY).choices[0]
    assert choice.logprobs is not None
    values = [value for value in choice.logprobs.token_logprobs if value is not None]
    assert choice.score == pytest.approx(sum(values) / 5)


def test_stream_joins_to_the_whole(model: Model) -> None:
    fields: dict[str, Any] = {"n": 2, "seed": 3, "max_tokens": 30, "stop": ["ab"], "echo": True}
    whole = model.complete(["abc", "d"], **fields)
    texts = [""] * 4
    stream = model.stream(["abc", "d"], **fields)
    for piece in stream:
        texts[piece.index] += piece.text
    assert texts == [choice.text for choice in whole.choices]
    assert stream.usage == whole.usage


def test_threads_share_a_stream(model: Model) -> None:
    texts: list[str] = []
    stream = model.stream("abc", max_tokens=40, **GREEDY)
    readers = [
        threading.Thread(target=lambda: texts.extend(piece.text for piece in stream), daemon=True)
        for _ in range(4)
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(timeout=30)
        assert not reader.is_alive()
    assert sorted(texts) == sorted(p.text for p in model.stream("abc", max_tokens=40, **GREEDY))


def test_closing_a_stream_stops_the_work(model: Model) -> None:
    with model.stream("abc", max_tokens=1500, **GREEDY) as stream:
        next(stream)
    wait_idle(model)
    assert model.engine.stats().num_generated_tokens < 1500


def test_dropping_a_stream_stops_the_work(model: Model) -> None:
    stream = model.stream("abc", max_tokens=1500, **GREEDY)
    next(stream)
    del stream
    gc.collect()
    wait_idle(model)
    assert model.engine.stats().num_generated_tokens < 1500


def test_interrupt_stops_the_work(model: Model) -> None:
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        model.complete("abc", max_tokens=2000, n=16, **GREEDY)
    timer.join()
    wait_idle(model)


def test_async_completions_share_a_batch(model: Model) -> None:
    async def main() -> list[str]:
        calls = [model.acomplete(text, max_tokens=9, seed=1) for text in ("a", "b", "abc")]
        return [result.choices[0].text for result in await asyncio.gather(*calls)]

    wanted = [
        model.complete(text, max_tokens=9, seed=1).choices[0].text for text in ("a", "b", "abc")
    ]
    assert asyncio.run(main()) == wanted


def test_async_stream(model: Model) -> None:
    async def main() -> str:
        return "".join([piece.text async for piece in model.astream("abc", max_tokens=20, seed=2)])

    assert asyncio.run(main()) == model.complete("abc", max_tokens=20, seed=2).choices[0].text


def test_cancelling_a_task_stops_the_work(model: Model) -> None:
    async def main() -> None:
        task = asyncio.create_task(model.acomplete("abc", max_tokens=1500, n=8, **GREEDY))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    wait_idle(model)


def test_a_task_cancelled_with_its_loop_leaves_no_warning(
    model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        work = model.acomplete("abc", max_tokens=1500, n=8, **GREEDY)
        await asyncio.wait_for(work, 0.05)

    for _ in range(5):
        with pytest.raises(TimeoutError):
            asyncio.run(main())
        wait_idle(model)
    assert not caplog.records


def test_leaving_an_async_stream_stops_the_work(model: Model) -> None:
    async def main() -> None:
        async with model.astream("abc", max_tokens=1500, **GREEDY) as stream:
            async for _ in stream:
                break
        closed = model.astream("abc", max_tokens=1500, **GREEDY)
        await closed.aclose()

    asyncio.run(main())
    wait_idle(model)


def test_async_stream_needs_an_event_loop(model: Model) -> None:
    with pytest.raises(RuntimeError, match="no running event loop"):
        model.astream("abc")


def test_async_bad_arguments_are_refused_at_the_call(model: Model) -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="top_p"):
            model.astream("abc", top_p=2)

    asyncio.run(main())


def test_score(model: Model) -> None:
    score = model.score("abcab")
    assert not isinstance(score, list)
    assert score.token_ids == [BOS, 10, 8]
    assert score.tokens == ["<bos>", "abc", "ab"]
    assert score.logprobs[0] is None
    assert score.is_greedy[0] is None
    assert score.text_offset == [0, 0, 3]
    assert score.total == pytest.approx(score.logprobs[1] + score.logprobs[2])  # type: ignore[operator]
    best = int(fake_model.history_logits([BOS, 10]).argmax())
    several = model.score([[BOS, 10, best], [BOS, 10, 5 if best != 5 else 6]])
    assert isinstance(several, list)
    assert [item.is_greedy[2] for item in several] == [True, False]


@pytest.mark.parametrize(
    ("prompt", "error", "text"),
    [
        ([], ValueError, "at least one prompt or token id"),
        ([[]], ValueError, "at least one token id"),
        ([[2], []], ValueError, "at least one token id"),
        (["a", 3], TypeError, r"prompt\[1\] must be text"),
        ([[2], "a"], TypeError, r"prompt\[1\] must be text"),
        ([2, "a"], TypeError, r"prompt\[1\] must be a token id, got str"),
        (7, TypeError, "prompt must be text, token ids, or a list of either, got int"),
        (b"abc", TypeError, "got bytes"),
        ([2, 99], ValueError, r"prompt\[1\] must be in 0..22, got 99"),
    ],
)
def test_bad_prompts(model: Model, prompt: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        model.complete(prompt)
    wait_idle(model)


def test_bad_fields(model: Model) -> None:
    with pytest.raises(TypeError, match="'max_token' is not a known field; did you mean 'max_t"):
        model.complete("a", max_token=3)
    with pytest.raises(TypeError, match="params must be given alone, got n as well"):
        model.complete("a", params=CompletionParams(), n=2)
    with pytest.raises(TypeError, match="params must be CompletionParams, got dict"):
        model.complete("a", params={"n": 2})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="logit_bias must be token ids with numbers, got str"):
        model.complete("a", logit_bias={"3": 1})
    with pytest.raises(ValueError, match="prefix must be valid Unicode without lone surrogates"):
        model.complete("a", prefix="\ud800")
    with pytest.raises(ValueError, match="temperature"):
        model.complete("a", temperature=float("nan"))


def test_params_as_a_whole(model: Model) -> None:
    params = CompletionParams(seed=1, max_tokens=4)
    assert model.complete("a", params=params) == model.complete("a", seed=1, max_tokens=4)


def test_prompts_are_split() -> None:
    assert split_prompt(None) == split_prompt("") == [""]
    assert split_prompt((1, 2)) == [[1, 2]]
    assert split_prompt([(1, 2), [3]]) == [[1, 2], [3]]


def test_close_fails_calls_under_way_and_later_ones() -> None:
    model = new_model()
    stream = model.stream("abc", max_tokens=1500, n=8, **GREEDY)
    next(stream)
    model.close()
    with pytest.raises(RequestCancelled):
        list(stream)
    with pytest.raises(RuntimeError, match="closed"):
        model.complete("a")
    model.close()


def test_thread_starts_with_the_first_call_and_ends_with_the_model() -> None:
    def running() -> bool:
        return any(thread.name == "fullbeam-engine" for thread in threading.enumerate())

    model = new_model()
    assert not running()
    model.complete("a", max_tokens=1)
    assert running()
    del model
    gc.collect()
    assert not running()


def test_a_forked_child_is_told_to_load_a_model_of_its_own(model: Model) -> None:
    model.complete("a", max_tokens=1)
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # rather than waiting for a thread that it has not
        try:
            model.complete("a", max_tokens=1)
        except RuntimeError as error:
            os._exit(0 if "before this process was forked" in str(error) else 2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    model.complete("a", max_tokens=1)


def test_failure_reaches_the_caller_and_the_model_goes_on(model: Model) -> None:
    model.engine._runner._decoder.fail_at = 1  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="the step failed"):
        model.complete(["a", "b"])
    assert model.complete("a", max_tokens=3, seed=1).choices[0].finish_reason


def test_load_puts_the_parts_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    opened = SimpleNamespace(
        name="fake", decoder=fake_model.FakeDecoder(512), tokenizer=fake_model.FakeTokenizer()
    )
    models = SimpleNamespace(open_model=lambda path, **options: opened)
    catalog = SimpleNamespace(resolve=lambda model, *, progress=None: tmp_path)
    monkeypatch.setitem(sys.modules, "fullbeam.models", models)
    monkeypatch.setitem(sys.modules, "fullbeam.models.catalog", catalog)
    with load("fake", context=100, max_rows=3, draft_tokens=0) as model:
        assert (model.name, model.context, model.engine.max_rows) == ("fake", 100, 3)
        model.complete("ab" * 9, max_tokens=20, temperature=0, logit_bias={2: 9})
        assert model.engine.stats().num_drafted_tokens == 0
    with load("fake", context=100) as model:
        model.complete("ab" * 9, max_tokens=20, temperature=0, logit_bias={2: 9})
        assert model.engine.stats().num_accepted_tokens > 9
        assert model.complete("ab", max_tokens=3).choices
    with pytest.raises(ValueError, match="context must be at most 512, got 513"):
        load("fake", context=513)
    with pytest.raises(ValueError, match="draft_tokens must be at least 0, got -1"):
        load("fake", draft_tokens=-1)


@pytest.mark.parametrize("name", ["context", "max_rows", "threads"])
def test_load_checks_its_numbers_before_the_model_is_read(name: str) -> None:
    options: Any = {name: "5"}
    with pytest.raises(TypeError, match=f"load: {name} must be an integer, got str"):
        load("/no/such.gguf", **options)
    options = {name: 0}
    with pytest.raises(ValueError, match=f"load: {name} must be at least 1, got 0"):
        load("/no/such.gguf", **options)


def test_load_refuses_devices() -> None:
    with pytest.raises(ValueError, match="device must be 'auto', 'cpu' or 'cuda', got 'gpu'"):
        load("x", device="gpu")


@pytest.mark.skipif(_core.num_cuda_devices() > 0, reason="this machine has a GPU")
def test_load_says_why_cuda_is_not_used() -> None:
    with pytest.raises(
        ValueError, match=r"^load: device must be 'auto' or 'cpu' here, got 'cuda': ."
    ):
        load("x", device="cuda")


def test_cuda_needs_a_torch_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(_core, "num_cuda_devices", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why_no_cuda() == f"torch {torch.__version__} has no CUDA: install a build of it that has"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "T4")
    assert why_no_cuda() == "T4 has compute capability 7.5, below 8.0"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert why_no_cuda().endswith('pip install "fullbeam[cuda]"')


def test_end_of_a_prompt_costs_what_has_come_of_it() -> None:
    tally = Tally(num_prompt_tokens=1, num_open=1)
    tally.num_generated = {3: 5, 2 * 10**15: 7}
    tally.add(Finished(range(10**15), 6))  # a search without a limit but a large `top_n`
    assert tally.num_generated == {2 * 10**15: 7}
    assert tally.usage == Usage(1, 13)


def test_import_is_light() -> None:
    code = (
        "import sys, threading, fullbeam; "
        "heavy = {'torch', 'numpy', 'fastapi', 'tokenizers', 'asyncio'} & sys.modules.keys(); "
        "assert not heavy, heavy; assert threading.active_count() == 1; "
        "fullbeam.CompletionParams, fullbeam.Model, fullbeam.load, fullbeam.Engine; "
        "assert 'torch' not in sys.modules; assert threading.active_count() == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names() -> None:
    assert set(fullbeam.__all__) <= set(dir(fullbeam))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fullbeam.nothing
