# SPDX-License-Identifier: Apache-2.0
"""What is known of an HTTP request while it is being answered: for its log line and the metrics."""

from __future__ import annotations

import json
import logging
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, cast

from starlette.types import Scope

if TYPE_CHECKING:
    from fullbeam.engine.sequence import Request
    from fullbeam.server.errors import Surface

CLIENT_GONE = 499  # nobody reads it; what proxies call it in their logs

requests_log = logging.getLogger("fullbeam.requests")


@dataclass(eq=False, slots=True)
class Record:
    """One HTTP request."""

    surface: Surface
    request_id: str
    method: str
    begin: float = field(default_factory=time.monotonic)
    duration_s: float = 0.0
    route: str | None = None  # as registered, not as called; None: there is none
    status: int | None = None  # None until the answer has begun
    is_event_stream: bool = False
    is_complete: bool = False
    ended: str = "complete"  # or "disconnect", "timeout", "cancelled", "fault"
    requests: list[Request] = field(default_factory=list)  # what it asked of the engine

    @property
    def prompt_tokens(self) -> int | None:
        """Tokens of all prompts; None for a request that has not reached the engine."""
        if not self.requests:
            return None
        return sum(request.num_prompt_tokens for request in self.requests)

    @property
    def completion_tokens(self) -> int | None:
        """Tokens generated for it, whether anybody received them or not."""
        if not self.requests:
            return None
        return sum(request.num_generated for request in self.requests)

    @property
    def first_token_s(self) -> float | None:
        """Time from the head of the request to the first token, streamed or not."""
        firsts = [
            request.first_token_at
            for request in self.requests
            if request.first_token_at is not None
        ]
        return min(firsts) - self.begin if firsts else None

    def log(self) -> None:
        """Write the request's line: JSON, and nothing of what the client wrote."""
        first_s = self.first_token_s
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": self.request_id,
            "method": self.method,
            "route": self.route,
            "status": self.status,
            "ended": self.ended,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "first_token_ms": None if first_s is None else round(first_s * 1e3, 1),
            "duration_ms": round(self.duration_s * 1e3, 1),
        }
        requests_log.info(json.dumps(line))


# The request that the code of this task answers: the engine's calls below the adapters find it.
current: ContextVar[Record | None] = ContextVar("current", default=None)


def record_of(scope: Scope) -> Record:
    """Return the record of a request."""
    return cast(Record, scope["state"]["record"])


def note_requests(requests: list[Request]) -> None:
    """Keep what a call asked of the engine with the HTTP request that made it."""
    record = current.get()
    if record is not None:
        record.requests += requests
