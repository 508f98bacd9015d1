# SPDX-License-Identifier: Apache-2.0
"""Answers that refuse, and the surfaces that give them their shape."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response

from fullbeam.server.record import current

Json = dict[str, Any]

_log = logging.getLogger(__name__)


class ApiError(HTTPException):
    """An answer other than 2xx; the surface of the request's path puts it into its own shape.

    Parameters
    ----------
    status, message
        HTTP status, and what is wrong, in words.
    param
        The field that is wrong.
    code
        OpenAI's name for the case, such as `model_not_found`.
    retry_after
        Seconds after which a second try may succeed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(status, message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers: dict[str, str] = {}
        if retry_after is not None:
            self.headers["Retry-After"] = str(retry_after)

    def __str__(self) -> str:
        """Return the message."""
        return self.message


@dataclass(frozen=True, slots=True, kw_only=True)
class Surface:
    """A family of routes: which paths are its own, how it refuses, how keys are sent."""

    roots: tuple[str, ...]
    """A path is the surface's own when it is one of these, or lies below one."""
    render: Callable[[ApiError], Response]
    """Gives an error the surface's shape; also those that no route of it has raised: 401 or 403,
    404, 405, 413, 429, 500 and 503."""
    key_status: int = 401
    """The answer to a missing or wrong key."""
    has_bare_keys: bool = True
    """Whether `Authorization: KEY` is accepted beside `Authorization: Bearer KEY`."""

    def owns(self, path: str) -> bool:
        """Whether a path is the surface's own."""
        return any(path == root or path.startswith(f"{root.rstrip('/')}/") for root in self.roots)


def internal_error(error: Exception) -> ApiError:
    """Log a fault of ours; return it as the client sees it, without its inner workings."""
    if (record := current.get()) is not None:
        record.ended = "fault"
    _log.error("a request failed", exc_info=error)
    return ApiError(500, f"the server failed to answer ({type(error).__name__})")
