# SPDX-License-Identifier: Apache-2.0
"""Requests that are sent again, on a clock that only waiting moves."""

from __future__ import annotations

import socket
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any, TypeAlias

import pytest
import requests

import gpt
from gpt.models import errors
from gpt.utils import BackoffStrategy, RetryConfig

StandIn: TypeAlias = Any  # in conftest.py, which cannot be imported
MODELS = b'{"object":"list","data":[]}'


class Clock:
    """Stands in for `time` and `random`: no jitter unless asked for."""

    def __init__(self) -> None:
        self.waits: list[float] = []
        self.jitter = 0.0

    def monotonic(self) -> float:
        return sum(self.waits)

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)

    def random(self) -> float:
        return self.jitter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(gpt.utils, "time", clock)
    monkeypatch.setattr(gpt.utils, "random", clock)
    return clock


def config(strategy: str = "backoff", *, connection: bool = False, limit: int = 10_000) -> Any:
    return RetryConfig(strategy, BackoffStrategy(500, 3000, 2, limit), connection)


def list_models(url: str, session: requests.Session, retries: Any) -> Any:
    client = gpt.Gpt("key", server_url=url, client=session, retry_config=retries)
    return client.models.list_models().list_models_response


@pytest.mark.parametrize("status", [429, 500, 503, 599])
def test_waits_grow_up_to_the_longest(
    server: StandIn, session: requests.Session, clock: Clock, status: int
) -> None:
    for _ in range(5):
        server.answer(status, b"")
    server.answer(body=MODELS)
    assert list_models(server.url, session, config()).data == []
    assert clock.waits == [0.5, 1, 2, 3, 3]
    assert len(server.requests) == 6


def test_jitter_is_added_within_the_longest_wait(
    server: StandIn, session: requests.Session, clock: Clock
) -> None:
    clock.jitter = 0.75
    for _ in range(4):
        server.answer(500, b"")
    server.answer(body=MODELS)
    list_models(server.url, session, config())
    assert clock.waits == [1.25, 1.75, 2.75, 3]


def test_last_answer_stands_after_the_time_limit(
    server: StandIn, session: requests.Session, clock: Clock
) -> None:
    server.answer(503, b"busy")
    with pytest.raises(errors.SDKError, match="API error occurred: Status 503\nbusy"):
        list_models(server.url, session, config(limit=3400))
    assert clock.waits == [0.5, 1, 2]


def test_server_says_when(server: StandIn, session: requests.Session, clock: Clock) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=5), usegmt=True)
    past = "Wed, 21 Oct 2015 07:28:00 -0000"
    for value in ("4", date, past, "soon"):
        server.answer(429, b"", Retry_After=value)
    server.answer(body=MODELS)
    list_models(server.url, session, config())
    assert clock.waits == [4, pytest.approx(5, abs=1.5), 0, 3]


def test_server_that_wants_too_long_a_wait_is_not_waited_for(
    server: StandIn, session: requests.Session, clock: Clock
) -> None:
    server.answer(429, b"", Retry_After="11")
    with pytest.raises(errors.SDKError):
        list_models(server.url, session, config())
    assert clock.waits == []


@pytest.mark.parametrize("status", [400, 404, 422])
def test_other_errors_are_final(
    server: StandIn, session: requests.Session, clock: Clock, status: int
) -> None:
    server.answer(status, b"")
    with pytest.raises(errors.SDKError):
        list_models(server.url, session, config())
    assert len(server.requests) == 1


@pytest.mark.parametrize("retries", [None, config("none")])
def test_no_retries_unless_asked_for(
    server: StandIn, session: requests.Session, clock: Clock, retries: Any
) -> None:
    server.answer(500, b"")
    with pytest.raises(errors.SDKError):
        list_models(server.url, session, retries)
    assert len(server.requests) == 1


@pytest.mark.parametrize(("connection", "num_waits"), [(False, 0), (True, 5)])
def test_connection_errors(
    session: requests.Session, clock: Clock, connection: bool, num_waits: int
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(requests.ConnectionError):
        list_models(f"http://127.0.0.1:{port}", session, config(connection=connection, limit=9000))
    assert len(clock.waits) == num_waits


def test_key_is_asked_for_once_per_operation(
    server: StandIn, session: requests.Session, clock: Clock
) -> None:
    server.answer(500, b"")
    server.answer(body=MODELS)
    calls: list[int] = []

    def key() -> str:
        calls.append(1)
        return "key"

    client = gpt.Gpt(key, server_url=server.url, client=session, retry_config=config())
    client.models.list_models()
    assert len(server.requests) == 2
    assert len(calls) == 1
