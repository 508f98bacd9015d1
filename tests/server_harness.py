# SPDX-License-Identifier: Apache-2.0
"""A server that runs in a thread, for clients that need an address."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI

import fake_model
from fullbeam.engine.engine import Engine
from fullbeam.model import Model
from fullbeam.server.app import create_app
from fullbeam.server.service import Service
from fullbeam.server.settings import Settings


@contextmanager
def serving(model: Any, **settings: Any) -> Iterator[str]:
    """Serve a loaded model as `fake`; yields the address."""
    with _listening(create_app(lambda: model, Settings(**{"name": "fake"} | settings))) as url:
        yield f"{url}/v1"


class SlowDecoder(fake_model.FakeDecoder):
    """Sleeps in each step."""

    def __init__(self, context_len: int = 256, step_s: float = 0.0) -> None:
        super().__init__(context_len)
        self.step_s = step_s

    def forward(self, batch: Any, kv: Any, stop: Any) -> Any:
        time.sleep(self.step_s)
        return super().forward(batch, kv, stop)


class AnyText(fake_model.FakeTokenizer):
    """Has a token for whatever its model has no words for."""

    def encode(self, text: str, **options: Any) -> list[int]:
        known = "".join(char if char in "abcde é日\n" else "e" for char in text)
        return super().encode(known, **options)


class Running:
    """A server that answers at `url`, with the real engine round a tiny model."""

    def __init__(self, url: str, service: Service, engine: Engine, decoder: SlowDecoder) -> None:
        self.url = url
        self.service = service
        self.engine = engine
        self.decoder = decoder

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being answered and every page is free or cached."""
        stats = self.engine.stats()
        busy = stats.num_rows + stats.num_waiting + stats.num_used_pages
        return busy + self.service.num_requests + self.service.num_choices == 0

    def check_idle(self) -> None:
        wait_until(lambda: self.is_idle)
        self.engine.check()


@contextmanager
def running(step_s: float = 0.0, **settings: Any) -> Iterator[Running]:
    """Serve a model that takes its time; the engine has 16 rows and pages of 4 tokens."""
    decoder = SlowDecoder(step_s=step_s)
    engine = Engine(decoder, AnyText(), page_size=4)  # type: ignore[arg-type]
    model = Model(engine, name="fake")
    app = create_app(lambda: model, Settings(**({"name": "fake"} | settings)))
    with _listening(app) as url:
        yield Running(url, app.state.service, engine, decoder)


@contextmanager
def _listening(app: FastAPI) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started and app.state.service.is_ready)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def wait_until(condition: Callable[[], Any], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)
