# SPDX-License-Identifier: Apache-2.0
"""Pieces of a call as they come, for threads."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from fullbeam.engine.sequence import Event, Request
from fullbeam.engine.text import Piece
from fullbeam.results import Tally, Usage

if TYPE_CHECKING:
    from fullbeam.model import Model, Prompt
    from fullbeam.params import CompletionParams


class Call:
    """What the two streams share: the requests of a call and their counts."""

    requests: Sequence[Request] = ()

    def __init__(self, model: Model) -> None:
        self._model = model  # keeps the engine's thread alive
        self._tally = Tally(0, 0)

    def _begin(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        num_prompt_tokens = sum(request.num_prompt_tokens for request in requests)
        self._tally = Tally(num_prompt_tokens, len(requests))

    @property
    def usage(self) -> Usage:
        """Token counts so far."""
        return self._tally.usage

    @property
    def prompt_token_ids(self) -> list[list[int]]:
        """What the model was given, for each prompt."""
        return [request.prompt_ids.tolist() for request in self.requests]

    def close(self) -> None:
        """Stop the work that is not done yet."""
        for request in self.requests:
            if not request.closed:
                self._model.engine.cancel(request)

    def __del__(self) -> None:
        """Stop the work of a stream that nobody reads any more."""
        self.close()

    def _accept(self, event: Event) -> Piece | None:
        if isinstance(event, Exception):
            self._tally.num_open = 0
            self.close()
            raise event
        self._tally.add(event)
        return event if isinstance(event, Piece) else None


class CompletionStream(Call, Iterator[Piece]):
    """Pieces of a call as they come; leaving a `with` block stops what is not done.

    Threads may read one stream: each piece comes to one of them.
    """

    def __init__(
        self, model: Model, prompt: Prompt, params: CompletionParams, *, stream: bool
    ) -> None:
        super().__init__(model)
        self._reading = threading.Lock()
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._begin(model.submit(prompt, params, stream=stream, on_event=self._events.put))

    def __next__(self) -> Piece:
        """Wait for the next piece."""
        with self._reading:
            while self._tally.num_open > 0:
                try:
                    event = self._events.get()
                except BaseException:
                    self.close()
                    raise
                piece = self._accept(event)
                if piece is not None:
                    return piece
        raise StopIteration

    def __enter__(self) -> CompletionStream:
        """Return the stream itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop what is not done."""
        self.close()
