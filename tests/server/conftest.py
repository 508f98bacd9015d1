# SPDX-License-Identifier: Apache-2.0
"""A model that says the same words each time, and a client that needs no socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from fullbeam.engine.text import Logprobs, Piece
from fullbeam.params import CompletionParams, ContextLengthError
from fullbeam.results import Completion, Usage, as_choice
from fullbeam.server.app import create_app
from fullbeam.server.settings import Settings

Json = dict[str, Any]


class FakeStream:
    """Pieces of all choices, interleaved: one word each, ` w0 w1 w2 ...`."""

    def __init__(self, model: FakeModel, prompt: Any, params: CompletionParams) -> None:
        self._model = model
        self._params = params
        prompts = (
            prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
        )
        for item in prompts:
            if isinstance(item, list) and max(item) >= 100:
                raise ValueError(f"complete: prompt[0] must be in 0..99, got {max(item)}")
            if len(item) > 100:
                raise ContextLengthError(100, len(item), params.max_tokens or 0)
        self._prompts = prompts
        self._num_words = 16 if params.max_tokens is None else params.max_tokens
        self._pieces = self._script()
        self.is_closed = False
        self.usage = Usage(3 * len(prompts), 0)

    def _script(self) -> Iterator[Piece]:
        for word in range(max(1, self._num_words)):
            for index in range(len(self._prompts) * self._params.n):
                yield self._piece(word, index)

    def _piece(self, word: int, index: int) -> Piece:
        params = self._params
        prompt = self._prompts[index // params.n]
        last = word + 1 >= self._num_words
        text = f" w{word}" if self._num_words else ""
        if self._model.text is not None:
            text = self._model.text
        logprobs = None
        if params.logprobs is not None:
            top = {text: -0.5, " x": float("-inf")}
            logprobs = Logprobs([text], [-0.5 - index], [top], [len(str(prompt))])
        if params.echo and word == 0:
            text = str(prompt) + text
            if logprobs is not None:
                first = Logprobs([str(prompt)], [None], [None], [0])
                first.extend(logprobs)
                logprobs = first
        stopped = f" w{word + 1}" in params.stop_strings
        num_tokens = word + 1 if self._num_words else 0
        return Piece(
            index=index,
            text=text,
            token_ids=[word][:num_tokens],
            finish_reason="stop" if stopped else "length" if last else None,
            stop_reason=f" w{word + 1}" if stopped else None,
            logprobs=logprobs,
            num_tokens=num_tokens,
        )

    def __aiter__(self) -> FakeStream:
        return self

    async def __anext__(self) -> Piece:
        await self._model.before_piece()
        piece = next(self._pieces, None)
        if piece is None:
            raise StopAsyncIteration
        self.usage = Usage(self.usage.prompt_tokens, self.usage.completion_tokens + 1)
        if piece.finish_reason == "stop":
            self._pieces = iter(())
        return piece

    def close(self) -> None:
        self.is_closed = True


class FakeModel:
    """Stands in for `fullbeam.Model`; records what it was asked."""

    name = "fake"
    path = None
    context = 100
    tokenizer = SimpleNamespace(infill=None)

    def __init__(self) -> None:
        self.calls: list[tuple[Any, CompletionParams]] = []
        self.streams: list[FakeStream] = []
        self.text: str | None = None
        self.fail_after: int | None = None  # pieces until a fault
        self.hold_after: int | None = None  # pieces until it waits for ever
        self.is_prepared = False
        self.is_closed = False
        self._num_pieces = 0

    async def before_piece(self) -> None:
        await asyncio.sleep(0)
        if self._num_pieces == self.fail_after:
            raise RuntimeError("a secret of the engine")
        if self._num_pieces == self.hold_after:
            await asyncio.Event().wait()
        self._num_pieces += 1

    def astream(self, prompt: Any, *, params: CompletionParams) -> FakeStream:
        self.calls.append((prompt, params))
        self.streams.append(FakeStream(self, prompt, params))
        return self.streams[-1]

    async def acomplete(self, prompt: Any, *, params: CompletionParams) -> Completion:
        stream = self.astream(prompt, params=params)
        merged: dict[int, Piece] = {}
        try:
            async for piece in stream:
                merged[piece.index] = _join(merged.get(piece.index), piece)
        finally:
            stream.close()
        return Completion([as_choice(merged[index]) for index in sorted(merged)], stream.usage)

    def prepare(self) -> None:
        self.is_prepared = True

    def close(self) -> None:
        self.is_closed = True


def _join(before: Piece | None, piece: Piece) -> Piece:
    if before is None:
        return piece
    if before.logprobs is not None and piece.logprobs is not None:
        before.logprobs.extend(piece.logprobs)
    return Piece(
        index=piece.index,
        text=before.text + piece.text,
        token_ids=[*before.token_ids, *piece.token_ids],
        finish_reason=piece.finish_reason,
        stop_reason=piece.stop_reason,
        logprobs=before.logprobs,
        num_tokens=piece.num_tokens,
    )


class Client:
    """Sends requests to an application inside this process."""

    def __init__(self, model: FakeModel, **settings: Any) -> None:
        self.model = model
        self.settings = Settings(**({"name": "fake"} | settings))

    def send(self, method: str, path: str, **options: Any) -> httpx.Response:
        return asyncio.run(self._send(method, path, **options))

    def post(self, **body: Any) -> httpx.Response:
        return self.send("POST", "/v1/completions", json=body)

    def text_of(self, **body: Any) -> str:
        response = self.post(**body)
        assert response.status_code == 200, response.text
        text: str = response.json()["choices"][0]["text"]
        return text

    def error_of(self, status: int, **body: Any) -> Json:
        response = self.post(**body)
        return self.error_in(response, status)

    def events(self, **body: Any) -> list[Any]:
        response = self.post(stream=True, **body)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        return self.parse_events(response.text)

    @staticmethod
    def parse_events(text: str) -> list[Any]:
        """Return the payloads of an event stream; `[DONE]` as it is."""
        blocks = text.split("\n\n")
        assert blocks.pop() == ""
        assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
        payloads = [block.removeprefix("data: ") for block in blocks]
        return [payload if payload == "[DONE]" else json.loads(payload) for payload in payloads]

    @staticmethod
    def error_in(response: httpx.Response, status: int) -> Json:
        """Return the error object of a response, its form checked."""
        assert response.status_code == status, response.text
        body = response.json()
        assert list(body) == ["error"]
        error: Json = body["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str)
        assert error["code"] is None or isinstance(error["code"], str)
        kind = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        assert error["type"] == kind.get(status, "invalid_request_error")
        return error

    @asynccontextmanager
    async def running_app(self) -> AsyncIterator[FastAPI]:
        app = create_app(lambda: self.model, self.settings)  # type: ignore[arg-type, return-value]
        async with app.router.lifespan_context(app):
            while not app.state.service.is_ready:
                await asyncio.sleep(0.001)
            yield app

    async def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        async with self.running_app() as app:
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **options)


@pytest.fixture
def model() -> FakeModel:
    return FakeModel()


@pytest.fixture
def client(model: FakeModel) -> Client:
    return Client(model)


@pytest.fixture
def make_client(model: FakeModel) -> Callable[..., Client]:
    """Return a function from settings to a client of a server that has them."""
    return lambda **settings: Client(model, **settings)
