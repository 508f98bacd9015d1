# SPDX-License-Identifier: Apache-2.0
"""Pieces of a call as they come, for asyncio, which nobody else has to import."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import TYPE_CHECKING

from fullbeam.engine.engine import Engine
from fullbeam.engine.sequence import Event, Request, RequestCancelled
from fullbeam.engine.text import Piece
from fullbeam.stream import Call

if TYPE_CHECKING:
    from fullbeam.model import Model, Prompt
    from fullbeam.params import CompletionParams

_SHORT = 8192  # characters that are cut into tokens within a millisecond or two


class AsyncCompletionStream(Call, AsyncIterator[Piece]):
    """Pieces of a call as they come, for asyncio; cancelling the reader stops the work.

    A call that takes long to queue is queued by a thread once the first piece is awaited, so that
    the event loop goes on.
    """

    def __init__(
        self, model: Model, prompt: Prompt, params: CompletionParams, *, stream: bool
    ) -> None:
        super().__init__(model)
        loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        put = self._events.put_nowait

        def on_event(event: Event) -> None:
            try:
                loop.call_soon_threadsafe(put, event)
            except RuntimeError:  # the loop is closed: nobody waits for the end
                if not isinstance(event, RequestCancelled):
                    raise

        def submit() -> list[Request]:
            return model.submit(prompt, params, stream=stream, on_event=on_event)

        self._submit: Callable[[], list[Request]] | None = submit
        if not _is_slow(model.engine, prompt, params):
            self._submit = None
            self._begin(submit())

    async def _submit_in_thread(self, submit: Callable[[], list[Request]]) -> None:
        def drop(task: asyncio.Task[list[Request]]) -> None:
            if not task.cancelled() and task.exception() is None:
                for request in task.result():
                    self._model.engine.cancel(request)

        task = asyncio.ensure_future(asyncio.to_thread(submit))
        try:
            self._begin(await asyncio.shield(task))
        except asyncio.CancelledError:
            task.add_done_callback(drop)
            raise

    async def __anext__(self) -> Piece:
        """Wait for the next piece."""
        if self._submit is not None:
            submit, self._submit = self._submit, None
            await self._submit_in_thread(submit)
        while self._tally.num_open > 0:
            try:
                event = await self._events.get()
            except BaseException:
                self.close()
                raise
            piece = self._accept(event)
            if piece is not None:
                return piece
        raise StopAsyncIteration

    def close(self) -> None:
        """Stop the work that is not done yet, or not queued yet."""
        self._submit = None
        super().close()

    async def aclose(self) -> None:
        """Stop what is not done."""
        self.close()

    async def __aenter__(self) -> AsyncCompletionStream:
        """Return the stream itself."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop what is not done."""
        self.close()


def _is_slow(engine: Engine, prompt: Prompt, params: CompletionParams) -> bool:
    """Whether queueing a call takes milliseconds."""
    if not engine.is_prepared and (params.is_search or params.token_healing):
        return True
    items = prompt if isinstance(prompt, list) else []
    parts = [prompt, params.suffix, *items]
    return sum(len(part) for part in parts if isinstance(part, (str, list))) > _SHORT
