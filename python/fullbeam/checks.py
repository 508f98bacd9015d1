# SPDX-License-Identifier: Apache-2.0
"""Checks of parameters: each takes a field's name and its value, returns it as a plain type.

With every check goes the JSON schema of what it lets pass, for documents.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

_KINDS = ("short", "prob", "long")
_TOKEN_ID: Json = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}


@dataclass(frozen=True, slots=True)
class Check:
    """A function from a field's name and its value to the value as a plain type."""

    function: Callable[[str, Any], Any]
    schema: Json

    def __call__(self, field: str, value: Any) -> Any:
        """Check a value."""
        return self.function(field, value)

    def then(self, change: Callable[[Any], Any]) -> Check:
        """Return a check that changes what passes this one."""
        return Check(lambda field, value: change(self(field, value)), self.schema)


def shown(value: object) -> str:
    """Return what an error says of a value: its repr, or the beginning of a long one."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return "one of too many digits"
    return text if len(text) <= 100 else text[:97] + "..."


class ParameterError(ValueError):
    """A parameter whose value is out of range; `field` is its name."""

    def __init__(self, field: str, requirement: str, value: object) -> None:
        super().__init__(f"CompletionParams: {field} must be {requirement}, got {shown(value)}")
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

    schema: Json = {"type": "integer", "minimum": low}
    return Check(check, schema if high is None else schema | {"maximum": high})


def number(low: float, high: float = math.inf, *, above: bool = False) -> Check:
    """Check for finite numbers in low..high, or above low."""

    def check(field: str, value: Any) -> float:
        if isinstance(value, (bool, str, bytes)):
            raise _kind(field, "a number", value)
        try:
            result = float(value)
        except TypeError:
            raise _kind(field, "a number", value) from None
        except OverflowError:  # an integer beyond all floats
            result = math.inf
        if not math.isfinite(result) or not low <= result <= high or (above and result == low):
            bound = f"above {low:g}" if above else f"in {low:g}..{high:g}"
            raise ParameterError(field, bound, value)
        return result

    schema: Json = {"type": "number", "exclusiveMinimum" if above else "minimum": low}
    return Check(check, schema if math.isinf(high) else schema | {"maximum": high})


def optional(check: Check) -> Check:
    """Let None pass."""
    return Check(
        lambda field, value: None if value is None else check(field, value),
        {"anyOf": [check.schema, {"type": "null"}]},
    )


def _flag(field: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _kind(field, "True or False", value)
    return value


def _text(field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _kind(field, "a string", value)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ParameterError(field, "valid Unicode without lone surrogates", value) from None
    return value


def _strings(field: str, value: Any, most: int = 64) -> tuple[str, ...]:
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
    if len(items) > most:
        raise ParameterError(field, f"at most {most} strings", len(items))
    return tuple(dict.fromkeys(item for item in items if item))


def _token_ids(field: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise _kind(field, "several token ids", value)
    return tuple(_token_id(field, item) for item in value)


def _token_id(field: str, value: Any) -> int:
    result: int = integer(0, 2**31 - 1)(field, value)
    return result


def _biases(field: str, value: Any) -> tuple[tuple[int, float], ...]:
    kind = "token ids with numbers"
    if value is None:
        return ()
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes)):
        raise _kind(field, kind, value)
    pairs: dict[int, float] = {}
    for item in value.items() if isinstance(value, Mapping) else value:
        if not isinstance(item, tuple) or len(item) != 2:
            raise _kind(field, kind, item)
        if not hasattr(item[0], "__index__"):
            raise _kind(field, kind, item[0])
        pairs[_token_id(field, item[0])] = number(-100, 100)(field, item[1])
    return tuple(sorted(pairs.items()))


def _num_kept(field: str, value: Any) -> int:
    result: int = integer(-1)(field, value)
    if result == 0:
        raise ParameterError(field, "-1 or at least 1", value)
    return result


def strings(most: int) -> Check:
    """Check for at most this many strings; None, one and empty ones become a plain tuple."""
    several: Json = {"type": "array", "items": {"type": "string"}, "maxItems": most}
    return Check(
        lambda field, value: _strings(field, value, most),
        {"anyOf": [{"type": "string"}, several, {"type": "null"}]},
    )


def one_of(*words: str) -> Check:
    """Check for one of some words."""

    def check(field: str, value: Any) -> str:
        if _text(field, value) not in words:
            raise ParameterError(field, f"one of {', '.join(words)}", value)
        return str(value)

    return Check(check, {"enum": list(words)})


def _kinds(field: str, value: Any) -> tuple[str, ...]:
    words = _strings(field, value)
    if not words or not set(words) <= set(_KINDS):
        raise ParameterError(field, "some of short, prob, long", words)
    return words


flag = Check(_flag, {"type": "boolean"})
"""Check for a bool."""
text = Check(_text, {"type": "string"})
"""Check for a string."""
token_ids = Check(_token_ids, {"type": "array", "items": _TOKEN_ID})
"""Check for token ids; whether the model has them is for the engine to say."""
biases = Check(
    _biases,
    {
        "anyOf": [
            {
                "type": "object",
                "propertyNames": {"pattern": "^[0-9]+$"},
                "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            },
            {"type": "null"},
        ]
    },
)
"""Check for token ids with numbers in -100..100; they come in the order of the ids."""
num_kept = Check(_num_kept, {"anyOf": [{"type": "integer", "minimum": 1}, {"const": -1}]})
"""Check for a number of tokens, or -1."""
kinds = Check(
    _kinds,
    {"type": "array", "items": {"enum": list(_KINDS)}, "minItems": 1},
)
"""Check for kinds of suggestions."""
