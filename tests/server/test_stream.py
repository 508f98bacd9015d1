# SPDX-License-Identifier: Apache-2.0
"""Streamed answers, and clients that go away."""

from __future__ import annotations

import asyncio
import json
from typing import Any, TypeAlias

import pytest

Client: TypeAlias = Any  # both are in conftest.py, which cannot be imported
FakeModel: TypeAlias = Any


def test_chunks_have_the_documented_form(client: Client) -> None:
    events = client.events(prompt="a", max_tokens=3)
    assert events.pop() == "[DONE]"
    assert [event["choices"][0]["text"] for event in events] == [" w0", " w1", " w2"]
    assert [event["choices"][0]["finish_reason"] for event in events] == [None, None, "length"]
    for event in events:
        assert event["object"] == "text_completion"
        assert len(event["choices"]) == 1
        assert event["choices"][0]["logprobs"] is None
        assert "usage" not in event
    for key in ("id", "created", "model", "system_fingerprint"):
        assert len({event[key] for event in events}) == 1


def test_usage_comes_in_a_chunk_of_its_own(client: Client) -> None:
    options = {"include_usage": True, "include_obfuscation": False}
    events = client.events(prompt=["a", "b"], max_tokens=2, stream_options=options)
    assert events.pop() == "[DONE]"
    last = events.pop()
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 6, "completion_tokens": 4, "total_tokens": 10}
    assert [event["usage"] for event in events] == [None] * 4


def test_usage_option_must_be_a_flag(client: Client) -> None:
    response = client.post(prompt="a", stream=True, stream_options={"include_usage": "yes"})
    assert client.error_in(response, 400)["param"] == "include_usage"


def test_every_choice_ends_once(client: Client) -> None:
    events = client.events(prompt=["a", "b"], n=2, max_tokens=3)[:-1]
    for index in range(4):
        own = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in own) == " w0 w1 w2"
        assert [choice["finish_reason"] for choice in own] == [None, None, "length"]


def test_first_chunk_echoes_the_prompt(client: Client) -> None:
    first = client.events(prompt="abc", echo=True, logprobs=1, max_tokens=2)[0]["choices"][0]
    assert first["text"] == "abc w0"
    assert first["logprobs"]["tokens"] == ["abc", " w0"]
    assert first["logprobs"]["token_logprobs"] == [None, -0.5]


def test_text_of_any_kind_stays_within_its_event(client: Client, model: FakeModel) -> None:
    model.text = "\n\ndata: x\r\n\u2028 \x00 日本 🙂"
    assert client.events(prompt="a", max_tokens=1)[0]["choices"][0]["text"] == model.text


def test_headers_forbid_caching(client: Client) -> None:
    headers = client.post(prompt="a", stream=True).headers
    assert headers["cache-control"] == "no-cache"
    assert headers["x-accel-buffering"] == "no"


def test_fault_amid_the_stream_ends_it_with_an_error(client: Client, model: FakeModel) -> None:
    model.fail_after = 2
    events = client.events(prompt="a")
    assert len(events) == 3
    assert set(events[-1]["error"]) == {"message", "type", "param", "code"}
    assert events[-1]["error"]["type"] == "server_error"
    assert "secret" not in events[-1]["error"]["message"]
    assert model.streams[0].is_closed


def test_finished_streams_are_closed(client: Client, model: FakeModel) -> None:
    client.events(prompt="a")
    client.post(prompt="a")
    assert [stream.is_closed for stream in model.streams] == [True, True]


async def abandon(client: Client, num_chunks: int, **body: Any) -> int:
    """Send a request, go away after some chunks; return the requests still counted."""
    async with client.running_app() as app:
        gone = asyncio.Event()
        received = 0
        sent: list[Any] = [{"type": "http.request", "body": json.dumps(body).encode()}]

        async def receive() -> Any:
            if sent:
                return sent.pop()
            if num_chunks:
                await gone.wait()
            else:
                await asyncio.sleep(0.01)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            nonlocal received
            received += bool(message.get("body"))
            if received >= num_chunks:
                gone.set()

        path = "/v1/completions"
        scope: dict[str, Any] = {"type": "http", "method": "POST", "path": path}
        scope |= {"headers": [], "query_string": b"", "asgi": {"spec_version": "2.3"}}
        await asyncio.wait_for(app(scope, receive, send), timeout=5)
        count: int = app.state.service.num_requests
        return count


@pytest.mark.parametrize("num_chunks", [0, 1, 3])
def test_disconnect_stops_a_stream(client: Client, model: FakeModel, num_chunks: int) -> None:
    model.hold_after = num_chunks
    assert asyncio.run(abandon(client, num_chunks, prompt="a", stream=True)) == 0
    assert [stream.is_closed for stream in model.streams] == [True]


def test_disconnect_stops_a_plain_answer(client: Client, model: FakeModel) -> None:
    model.hold_after = 2
    assert asyncio.run(abandon(client, 0, prompt="a")) == 0
    assert [stream.is_closed for stream in model.streams] == [True]
