# SPDX-License-Identifier: Apache-2.0
"""How a server behaves."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class EditorOptions:
    """How the surface for editors behaves."""

    infill: bool = True
    """Give the text right of the cursor to a model that has infill tokens."""
    supersede: bool = True
    """End a request when the same client asks again about the same file."""
    detailed_default: bool = False
    """Tell scores also to clients that do not show that they expect them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How a server behaves."""

    name: str
    """The model's id on the wire."""
    api_keys: tuple[str, ...] = ()
    """One of them must be sent; none: no key is asked for."""
    max_requests: int = 256
    """Requests at once, waiting ones included; more are answered 429."""
    max_body_bytes: int = 4 << 20
    """Text is cut into tokens at some 2 MB/s, by a thread where it is long."""
    max_choices: int = 2048
    """Prompts of one request times `n`; the same for all requests at once."""
    max_logprobs: int = 5
    max_stop: int = 4
    timeout_s: float = 600
    """From the head of a request to the end of its answer, then 503; 0: no limit."""
    grace_s: int = 10
    """What requests under way are given to end when the server stops."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call the server; `*`: all."""
    editors: EditorOptions = field(default_factory=EditorOptions)
    """How the surface for editors behaves."""
