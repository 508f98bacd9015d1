# SPDX-License-Identifier: Apache-2.0
"""What every request gets, whatever its surface: an id, limits, a deadline, a log line."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fullbeam.server.errors import ApiError, Surface, internal_error
from fullbeam.server.openai import error_body
from fullbeam.server.record import CLIENT_GONE, Record, current
from fullbeam.server.stream import event

if TYPE_CHECKING:
    from fullbeam.server.metrics import Metrics
    from fullbeam.server.service import Service

_LAST_WORDS_S = 1.0  # to tell a client why its answer ends; one that does not read gets no more


class Conduct:
    """Middleware round all routes.

    - `X-Request-Id` is taken from the request, or made up, and sent back.
    - A body above the limit is refused with 413.
    - At the deadline, or when the server has to stop, the work is cancelled and the answer is 503;
      an answer that streams already ends with that error as its last event.
    - A fault becomes 500, without its inner workings.
    - Once the answer is over it is logged and counted.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        service: Service,
        surfaces: Sequence[Surface],
        metrics: Metrics,
    ) -> None:
        self._app = app
        self._service = service
        self._surfaces = surfaces
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        owners = (surface for surface in self._surfaces if surface.owns(scope["path"]))
        surface = next(owners, self._surfaces[-1])  # "OPTIONS *" has no path
        record = Record(surface, _request_id(headers), scope["method"])
        scope.setdefault("state", {})["record"] = record
        receive = _limited(receive, headers, record, self._service.settings.max_body_bytes)
        send = _watched(send, record)
        token = current.set(record)
        try:
            await self._answer(scope, receive, send, record)
        finally:
            current.reset(token)
            record.duration_s = time.monotonic() - record.begin
            record.route = getattr(scope.get("route"), "path", None)
            record.log()
            self._metrics.count(record)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, record: Record) -> None:
        service = self._service
        limit = service.settings.timeout_s
        deadline = asyncio.timeout(limit or None)
        try:
            async with deadline:
                with service.stopping(deadline):
                    await self._app(scope, receive, send)
        except asyncio.CancelledError:
            record.ended = "cancelled"
            raise
        except Exception as cause:
            if deadline.expired():
                record.ended = "cancelled" if service.is_stopping else "timeout"
                message = f"the answer took longer than {limit:g} s"
                if service.is_stopping:
                    message = "the server stops"
                error = ApiError(503, message, code="overloaded", retry_after=1)
                await _refuse(error, scope, receive, send, record)
            elif record.ended != "disconnect":
                await _refuse(internal_error(cause), scope, receive, send, record)


async def _refuse(
    error: ApiError, scope: Scope, receive: Receive, send: Send, record: Record
) -> None:
    """Answer with an error, or end with it what has begun."""
    if record.is_complete:
        return
    try:
        async with asyncio.timeout(_LAST_WORDS_S):
            if record.status is None:
                await record.surface.render(error)(scope, receive, send)
            elif record.is_event_stream:
                body = event(error_body(error))
                await send({"type": "http.response.body", "body": body, "more_body": False})
    except TimeoutError:
        pass  # the connection is closed as it is


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if re.fullmatch(r"[\w.:-]{1,128}", given, re.ASCII) else uuid.uuid4().hex


def _limited(receive: Receive, headers: Headers, record: Record, max_bytes: int) -> Receive:
    """Read the body up to a limit; note when the client goes away."""
    declared = headers.get("content-length", "")
    num_bytes = 0

    async def read() -> Message:
        nonlocal num_bytes
        if num_bytes == 0 and declared.isdecimal() and int(declared) > max_bytes:
            raise _too_large(max_bytes)
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > max_bytes:
            raise _too_large(max_bytes)
        if message["type"] == "http.disconnect" and not record.is_complete:
            record.ended = "disconnect"
            record.status = CLIENT_GONE
        return message

    return read


def _too_large(max_bytes: int) -> ApiError:
    message = f"the body must be at most {max_bytes} bytes"
    error = ApiError(413, message, code="request_too_large")
    error.headers["Connection"] = "close"  # what is left of the body is not read
    return error


def _watched(send: Send, record: Record) -> Send:
    """Send the request's id along; note how far the answer is."""

    async def write(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = record.request_id
            kind = headers.get("content-type", "")
            record.is_event_stream = kind.startswith("text/event-stream")
            if record.ended != "disconnect":
                record.status = message["status"]
        elif not message.get("more_body", False):
            record.is_complete = True
        await send(message)

    return write
