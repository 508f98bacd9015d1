# SPDX-License-Identifier: Apache-2.0
"""HTTP down to the engine: the same answers as from Python, and nothing left behind."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

import fake_model
from fullbeam.engine.engine import Engine
from fullbeam.model import Model
from fullbeam.server.app import create_app
from fullbeam.server.settings import Settings
from server_harness import SlowDecoder, wait_until

BODY: dict[str, Any] = {"max_tokens": 12, "seed": 5, "ignore_eos": True}


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[Model]:
    decoder: Any = fake_model.FakeDecoder(256)
    engine = Engine(decoder, fake_model.FakeTokenizer(), page_size=4)
    loaded = Model(engine, name="fake")
    close = loaded.close
    monkeypatch.setattr(loaded, "close", lambda: None)  # the end of one server is not the end
    yield loaded
    close()


def wait_idle(model: Model) -> None:
    for _ in range(2000):
        stats = model.engine.stats()
        if stats.num_rows == stats.num_waiting == stats.num_used_pages == 0:
            model.engine.check()
            return
        time.sleep(0.005)
    raise AssertionError("rows or pages are not given back")


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "abc"},
        {"prompt": ""},
        {"prompt": [2, 3, 4]},
        {"prompt": ["ab", "dd a"], "n": 3, "temperature": 0.7, "top_k": 9, "min_p": 0.01},
        {"prompt": "ab", "logprobs": 2, "echo": True},
        {"prompt": [[2, 3], [4]], "logprobs": 1, "echo": True, "max_tokens": 0},
        {"prompt": "ab", "stop": ["c", "dd"], "n": 4},
    ],
)
def test_answers_are_those_of_python(make_client: Any, model: Model, fields: Any) -> None:
    client = make_client()
    client.model = model
    body = BODY | fields
    prompt = body["prompt"]
    options = {name: value for name, value in body.items() if name != "prompt"}
    expected = model.complete(prompt, **options)
    answer = client.post(**body).json()
    assert answer["usage"]["prompt_tokens"] == expected.usage.prompt_tokens
    assert answer["usage"]["completion_tokens"] == expected.usage.completion_tokens
    streamed: dict[int, dict[str, Any]] = {}
    events = client.events(**body, stream_options={"include_usage": True})
    for event in events[:-2]:
        part = event["choices"][0]
        whole = streamed.setdefault(part["index"], {"text": "", "tokens": []})
        whole["text"] += part["text"]
        whole["finish_reason"] = part["finish_reason"]
        if part["logprobs"] is not None:
            whole["tokens"] += part["logprobs"]["tokens"]
    assert events[-2]["usage"] == answer["usage"]
    for choice, plain in zip(expected.choices, answer["choices"], strict=True):
        for got in (plain, streamed[choice.index]):
            assert got["text"] == choice.text
            assert got["finish_reason"] == choice.finish_reason
        if choice.logprobs is not None:
            assert plain["logprobs"]["tokens"] == choice.logprobs.tokens
            assert plain["logprobs"]["token_logprobs"] == choice.logprobs.token_logprobs
            assert plain["logprobs"]["text_offset"] == choice.logprobs.text_offset
            assert streamed[choice.index]["tokens"] == choice.logprobs.tokens


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": [99]}, "prompt"),
        ({"prompt": ["a", "b"], "max_tokens": 1000}, "max_tokens"),
        ({"prompt": "a" * 300}, "prompt"),
        ({"prompt": "a", "stop_token_ids": [99]}, "stop_token_ids"),
        ({"prompt": "a", "allowed_token_ids": [2], "bad_words": ["a"]}, "allowed_token_ids"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_of_the_engine(
    make_client: Any, model: Model, fields: Any, param: str, stream: bool
) -> None:
    client = make_client()
    client.model = model
    assert client.error_of(400, **fields, stream=stream)["param"] == param
    wait_idle(model)


def test_a_stream_ends_with_the_field_that_leaves_no_token(make_client: Any, model: Model) -> None:
    client = make_client()
    client.model = model
    *texts, last = client.events(prompt="a", allowed_token_ids=[2], bad_words=["aa"])
    assert [text["choices"][0]["text"] for text in texts] == ["a"]
    error = last["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", "allowed_token_ids")
    wait_idle(model)


GATEWAY = "/api/v1/compatibility/openai/v1/completions"


@pytest.mark.parametrize("path", ["/v1/completions", GATEWAY])
@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_frees_rows_and_pages(model: Model, stream: bool, path: str) -> None:
    may_go_on = threading.Event()
    decoder: Any = model.engine._runner._decoder
    forward = decoder.forward

    def slow(*args: Any) -> Any:
        if decoder.num_calls == 3:
            may_go_on.wait()
        return forward(*args)

    decoder.forward = slow

    async def run() -> None:
        app = create_app(lambda: model, Settings(name="fake"))
        async with app.router.lifespan_context(app):
            while not app.state.service.is_ready:
                await asyncio.sleep(0.001)
            fields = BODY | {"model": "fake", "prompt": "a", "n": 3, "stream": stream}
            body = httpx.Request("POST", "http://x", json=fields).content
            sent: list[Any] = [{"type": "http.request", "body": body}]

            async def receive() -> Any:
                if sent:
                    return sent.pop()
                while decoder.num_calls < 3:
                    await asyncio.sleep(0.001)
                return {"type": "http.disconnect"}

            async def send(message: Any) -> None:
                pass

            scope: dict[str, Any] = {"type": "http", "method": "POST", "path": path}
            scope |= {"headers": [], "query_string": b"", "asgi": {"spec_version": "2.3"}}
            await app(scope, receive, send)
            may_go_on.set()
            await asyncio.to_thread(wait_idle, model)

    asyncio.run(run())
    assert decoder.num_calls <= 5


class SlowTokenizer(fake_model.FakeTokenizer):
    """Waits while it encodes a long text."""

    def __init__(self) -> None:
        self.is_encoding = threading.Event()
        self.may_go_on = threading.Event()

    def encode(self, text: str, **options: Any) -> list[int]:
        if len(text) > 1000:
            self.is_encoding.set()
            assert self.may_go_on.wait(20)
            text = "abc"
        return super().encode(text, **options)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("is_left", [False, True])
def test_others_are_answered_while_a_long_prompt_is_encoded(stream: bool, is_left: bool) -> None:
    tokenizer = SlowTokenizer()
    engine = Engine(SlowDecoder(step_s=0.02), tokenizer, page_size=4)  # type: ignore[arg-type]
    slow = Model(engine, name="fake")

    async def run() -> None:
        app = create_app(lambda: slow, Settings(name="fake"))
        async with app.router.lifespan_context(app):
            while not app.state.service.is_ready:
                await asyncio.sleep(0.001)
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as web:
                body = BODY | {"prompt": "a" * 20_000, "stream": stream}
                long = asyncio.create_task(web.post("/v1/completions", json=body))
                await asyncio.to_thread(tokenizer.is_encoding.wait, 10)
                assert (await web.get("/health")).status_code == 200
                short = await web.post("/v1/completions", json=BODY | {"prompt": "abc"})
                assert short.status_code == 200
                assert not long.done()
                if is_left:
                    long.cancel()
                    await asyncio.gather(long, return_exceptions=True)
                tokenizer.may_go_on.set()
                if is_left:
                    await asyncio.to_thread(wait_until, lambda: engine.stats().num_cancelled == 1)
                else:
                    answer = await long
                    assert answer.status_code == 200
                    assert ("[DONE]" in answer.text) == stream
            await asyncio.to_thread(wait_idle, slow)
            assert app.state.service.num_requests == 0

    asyncio.run(run())


def test_errors_of_long_prompts_are_told(make_client: Any, model: Model) -> None:
    client = make_client()
    client.model = model
    for stream in (False, True):
        body = {"prompt": "ab" * 5000, "stream": stream}
        assert client.error_of(400, **body)["code"] == "context_length_exceeded"
    wait_idle(model)
