# SPDX-License-Identifier: Apache-2.0
"""The model behind the routes: how long it lives, and how much it takes on."""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

from fullbeam.checks import shown
from fullbeam.server import record
from fullbeam.server.errors import ApiError, Json
from fullbeam.server.serve import in_background
from fullbeam.server.settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from fullbeam.model import Model

_MAX_RETRY_AFTER_S = 60
_IDLE_S = 0.5


class Service:
    """The model behind the routes: loading, ready, or failed."""

    def __init__(self, load: Callable[[], Model], settings: Settings) -> None:
        self.settings = settings
        self.created = int(time.time())
        self.failure: Exception | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self.num_requests = 0
        self.num_choices = 0
        self.is_stopping = False
        self.fingerprint = ""
        self._load = load
        self._model: Model | None = None
        self._mean_s = 0.0  # how long requests took lately
        self._deadlines: set[asyncio.Timeout] = set()  # of the requests being answered

    @asynccontextmanager
    async def running(self, _app: FastAPI) -> AsyncGenerator[None, None]:
        """Load the model while the server already answers; close it at the end.

        A model that is being loaded then is not waited for.
        """
        loading = asyncio.create_task(self._load_model())
        try:
            yield
        finally:
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
            if self._model is not None:
                await asyncio.to_thread(self._model.close)

    async def _load_model(self) -> None:
        try:
            model = await asyncio.wrap_future(in_background(self._load))
            self.fingerprint = await asyncio.to_thread(fingerprint, model)
            model.on_submit = record.note_requests
            self._model = model
            # It may complete already: whoever waited for that comes first.
            await asyncio.sleep(_IDLE_S)
            while self.num_requests:
                await asyncio.sleep(_IDLE_S)
            await asyncio.wrap_future(in_background(model.prepare))
        except Exception as error:
            self.failure = error
            self.on_failure()

    @property
    def model(self) -> Model | None:
        """The model; None until it can complete."""
        return self._model

    @property
    def is_ready(self) -> bool:
        """Whether it can complete."""
        return self._model is not None

    def model_for(self, name: str | None) -> Model:
        """Return the model that a request asks for; None: the default."""
        self.check_name(name)
        if self._model is None:
            raise ApiError(503, "the model is loading", code="overloaded", retry_after=1)
        return self._model

    def check_name(self, name: str | None) -> None:
        """Refuse a name that is not the model's."""
        if name is not None and name != self.settings.name:
            message = f"model {shown(name)} does not exist, this server has {self.settings.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def card(self) -> Json:
        """Return the model object."""
        return {
            "id": self.settings.name,
            "object": "model",
            "created": self.created,
            "owned_by": "fullbeam",
        }

    @contextmanager
    def slot(self, num_choices: int = 1) -> Generator[None, None, None]:
        """Count a request and its choices while it is being answered.

        Raises
        ------
        ApiError
            429 when there are too many already: before anything of the request is queued.
        """
        settings = self.settings
        is_full = self.num_requests >= settings.max_requests
        if is_full or (self.num_choices and self.num_choices + num_choices > settings.max_choices):
            message = f"{self.num_requests} requests are waiting already, try again later"
            code = "rate_limit_exceeded"
            raise ApiError(429, message, code=code, retry_after=self.retry_after_s)
        self.num_requests += 1
        self.num_choices += num_choices
        begin = time.monotonic()
        try:
            yield
        finally:
            self.num_requests -= 1
            self.num_choices -= num_choices
            taken = time.monotonic() - begin
            self._mean_s = 0.9 * self._mean_s + 0.1 * taken if self._mean_s else taken

    @contextmanager
    def stopping(self, deadline: asyncio.Timeout) -> Generator[None, None, None]:
        """Let `stop` move a deadline meanwhile."""
        self._deadlines.add(deadline)
        try:
            yield
        finally:
            self._deadlines.discard(deadline)

    def stop(self) -> None:
        """Move the deadline of all requests to now."""
        self.is_stopping = True
        now = asyncio.get_running_loop().time()
        for deadline in self._deadlines:
            if not deadline.expired():
                deadline.reschedule(now)

    @property
    def retry_after_s(self) -> int:
        """Seconds in which about all requests that are here now will have been answered."""
        return min(max(1, math.ceil(self._mean_s)), _MAX_RETRY_AFTER_S)


def fingerprint(model: Model) -> str:
    """Return what changes with a model's weights and with this package's version."""
    from fullbeam import __version__

    digest = hashlib.sha256(f"{__version__} {model.name}".encode())
    if model.path is not None:
        num_bytes = model.path.stat().st_size
        digest.update(str(num_bytes).encode())
        with model.path.open("rb") as file:
            for idx in range(64):  # samples spread over the file stand for the whole
                file.seek(idx * num_bytes // 64)
                digest.update(file.read(4096))
    return f"fp_{digest.hexdigest()[:12]}"
