# SPDX-License-Identifier: Apache-2.0
"""Addresses with variables, requests that are sent again, and dataclasses to and from JSON."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import Enum
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import requests

from gpt.models.components import CreateCompletionRequest


@dataclass
class BackoffStrategy:
    """How long to wait between attempts, in milliseconds.

    The first wait is `initial_interval`, each further one `exponent` times as long, plus up to a
    second at random, and none is longer than `max_interval`. A server that sends Retry-After is
    obeyed instead. After `max_elapsed_time` the last answer stands.
    """

    initial_interval: int
    max_interval: int
    exponent: float
    max_elapsed_time: int


@dataclass
class RetryConfig:
    """Whether to send a request again after status 429 or 5xx: if `strategy` is "backoff"."""

    strategy: str
    backoff: BackoffStrategy
    retry_connection_errors: bool
    """Also when there was no answer, or none in time."""


def template_url(url_with_params: str, params: Mapping[str, str]) -> str:
    """Put values in the place of `{name}`."""
    for name, value in params.items():
        url_with_params = url_with_params.replace(f"{{{name}}}", value)
    return url_with_params


def retry(send: Callable[[], requests.Response], config: RetryConfig | None) -> requests.Response:
    """Send a request, again if need be; return the last answer or raise the last error."""
    if config is None or config.strategy != "backoff":
        return send()
    backoff = config.backoff
    end = time.monotonic() + backoff.max_elapsed_time / 1000
    interval = float(backoff.initial_interval)
    while True:
        wait = min(interval / 1000 + random.random(), backoff.max_interval / 1000)
        try:
            response = send()
            if response.status_code != 429 and not 500 <= response.status_code < 600:
                return response
            asked = _retry_after(response)
            # An attempt before the server's time is a wasted one: it must fit in what is left.
            if time.monotonic() + (asked or 0) > end:
                return response
            wait = wait if asked is None else asked
        except (requests.ConnectionError, requests.Timeout):
            if not config.retry_connection_errors or time.monotonic() > end:
                raise
        time.sleep(wait)
        interval = min(interval * backoff.exponent, backoff.max_interval)


def _retry_after(response: requests.Response) -> float | None:
    """Seconds that the server asks for, given as such or as a date."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.now(UTC)).total_seconds())


def encode(request: CreateCompletionRequest) -> bytes:
    """Return a request as JSON: sorted keys, no spaces."""
    body = {field.name: getattr(request, field.name) for field in fields(request)}
    body = {name: value for name, value in body.items() if value is not request.UNSET}
    if body.get("user") is None:
        body.pop("user", None)
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def decode(kind: Any, value: Any) -> Any:
    """Return a JSON value as the type says; unknown keys are dropped.

    Raises
    ------
    TypeError, ValueError
        When something is missing or of another form.
    """
    if get_origin(kind) is UnionType:
        inner = [option for option in get_args(kind) if option is not type(None)]
        return None if value is None else decode(inner[0], value)
    if get_origin(kind) is list:
        return [decode(get_args(kind)[0], item) for item in value]
    if is_dataclass(kind) and isinstance(kind, type):
        known = get_type_hints(kind).items()
        return kind(**{name: decode(hint, value[name]) for name, hint in known if name in value})
    return kind(value) if isinstance(kind, type) and issubclass(kind, Enum) else value
