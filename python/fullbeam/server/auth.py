# SPDX-License-Identifier: Apache-2.0
"""API keys: where they come from, and whether a request has one."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from fullbeam.server.errors import ApiError
from fullbeam.server.record import record_of

# Names the scheme in the OpenAPI document; the header itself is read below.
_Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]


async def require_key(request: Request, _scheme: _Bearer) -> None:
    """Refuse a request without one of the server's keys, as its surface does."""
    keys = request.app.state.service.settings.api_keys
    if not keys:
        return
    surface = record_of(request.scope).surface
    header = request.headers.get("authorization", "").encode("latin-1")
    scheme, _, token = header.partition(b" ")
    sent = [token.strip()] if scheme.lower() == b"bearer" else []
    if surface.has_bare_keys:
        sent.append(header)
    sent = [item for item in sent if item]
    if not any([is_key(item, keys) for item in sent]):
        what = "the API key is wrong" if sent else "no API key was sent"
        message = f"{what}: send 'Authorization: Bearer KEY'"
        raise ApiError(surface.key_status, message, code="invalid_api_key")


def is_key(sent: bytes, keys: tuple[str, ...]) -> bool:
    """Whether this is one of the keys; the time taken says nothing about them."""
    digest = hashlib.sha256(sent).digest()  # of equal length, and compared with each
    return any([hmac.compare_digest(digest, hashlib.sha256(key.encode()).digest()) for key in keys])


def read_keys(path: Path) -> tuple[str, ...]:
    """Return the keys of a file: one in a line; empty lines and those with # are left out.

    Raises
    ------
    ValueError
        When there is none.
    """
    lines = [line.strip() for line in path.read_text().splitlines()]
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ValueError(f"serve: api_key_file must hold a key in a line, got none in {path}")
    return keys
