# SPDX-License-Identifier: Apache-2.0
"""Checks of parameters: each takes a field's name and its value, returns it as a plain type."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Check = Callable[[str, Any], Any]


class ParameterError(ValueError):
    """A parameter whose value is out of range; `field` is its name."""

    def __init__(self, field: str, requirement: str, value: object) -> None:
        super().__init__(f"CompletionParams: {field} must be {requirement}, got {value!r}")
        self.field = field


def _kind(field: str, kind: str, value: object) -> TypeError:
    return TypeError(f"CompletionParams: {field} must be {kind}, got {type(value).__name__}")


def integer(low: int, high: int | None = None) -> Check:
    """Check for integers in low..high."""

    def check(field: str, value: Any) -> int:
        if isinstance(value, bool):
            raise _kind(field, "an integer", value)
        try:
            result = operator.index(value)
        except TypeError:
            raise _kind(field, "an integer", value) from None
        if result < low or (high is not None and result > high):
            bound = f"at least {low}" if high is None else f"in {low}..{high}"
            raise ParameterError(field, bound, value)
        return result

    return check


def number(low: float, high: float = math.inf, *, above: bool = False) -> Check:
    """Check for finite numbers in low..high, or above low."""

    def check(field: str, value: Any) -> float:
        if isinstance(value, (bool, str, bytes)):
            raise _kind(field, "a number", value)
        try:
            result = float(value)
        except TypeError:
            raise _kind(field, "a number", value) from None
        if not math.isfinite(result) or not low <= result <= high or (above and result == low):
            bound = f"above {low:g}" if above else f"in {low:g}..{high:g}"
            raise ParameterError(field, bound, value)
        return result

    return check


def optional(check: Check) -> Check:
    """Let None pass."""
    return lambda field, value: None if value is None else check(field, value)


def flag(field: str, value: Any) -> bool:
    """Check for a bool."""
    if not isinstance(value, bool):
        raise _kind(field, "True or False", value)
    return value


def text(field: str, value: Any) -> str:
    """Check for a string."""
    if not isinstance(value, str):
        raise _kind(field, "a string", value)
    return value


def strings(field: str, value: Any) -> tuple[str, ...]:
    """Check for at most 64 strings; None, one and empty ones become a plain tuple."""
    if value is None:
        return ()
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, Iterable) or isinstance(value, (bytes, bytearray)):
        raise _kind(field, "a string or several", value)
    items = tuple(value)
    for item in items:
        if not isinstance(item, str):
            raise _kind(field, "a string or several", item)
    if len(items) > 64:
        raise ParameterError(field, "at most 64 strings", len(items))
    return tuple(dict.fromkeys(item for item in items if item))


def token_ids(field: str, value: Any) -> tuple[int, ...]:
    """Check for token ids; whether the model has them is for the engine to say."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise _kind(field, "several token ids", value)
    return tuple(_token_id(field, item) for item in value)


def _token_id(field: str, value: Any) -> int:
    result: int = integer(0, 2**31 - 1)(field, value)
    return result


def biases(field: str, value: Any) -> tuple[tuple[int, float], ...]:
    """Check for token ids with numbers in -100..100; they come in the order of the ids."""
    kind = "token ids with numbers"
    if value is None:
        return ()
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes)):
        raise _kind(field, kind, value)
    pairs: dict[int, float] = {}
    for item in value.items() if isinstance(value, Mapping) else value:
        if not isinstance(item, tuple) or len(item) != 2:
            raise _kind(field, kind, item)
        pairs[_token_id(field, item[0])] = number(-100, 100)(field, item[1])
    return tuple(sorted(pairs.items()))


def context_len(field: str, value: Any) -> int:
    """Check for a number of tokens, or -1."""
    result: int = integer(-1)(field, value)
    if result == 0:
        raise ParameterError(field, "-1 or at least 1", value)
    return result


def one_of(*words: str) -> Check:
    """Check for one of some words."""

    def check(field: str, value: Any) -> str:
        if text(field, value) not in words:
            raise ParameterError(field, f"one of {', '.join(words)}", value)
        return str(value)

    return check


def kinds(field: str, value: Any) -> tuple[str, ...]:
    """Check for kinds of suggestions."""
    words = strings(field, value)
    if not words or not set(words) <= {"short", "prob", "long"}:
        raise ParameterError(field, "some of short, prob, long", words)
    return words
