# SPDX-License-Identifier: Apache-2.0
"""Server-sent events, and work that ends when the client goes away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """The client closed its connection before the answer was ready."""


def event(payload: object) -> bytes:
    """Return one server-sent event that carries a JSON value."""
    text = json.dumps(payload, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return b"data: " + text.encode() + b"\n\n"


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns; cancel it when the client goes away.

    Parameters
    ----------
    receive
        The request's ASGI channel; its body must have been read to the end.
    work
        What to wait for.

    Raises
    ------
    ClientGone
        When the client was quicker.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Events to a client, until there are no more or the client goes away.

    Parameters
    ----------
    events
        Whole events, as `event` makes them.
    resources
        Closed when the response is over, however it ends, even if it never began.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], resources: AsyncExitStack) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events = events
        self._resources = resources

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events, then close everything."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            await self._resources.aclose()
