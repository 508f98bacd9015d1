# SPDX-License-Identifier: Apache-2.0
"""Every parameter of a completion once: meaning, range, default and check."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

DEFAULT_MAX_TOKENS = 16


class ParameterError(ValueError):
    """A parameter whose value is out of range; `field` is its name."""

    def __init__(self, field: str, requirement: str, value: object) -> None:
        super().__init__(f"CompletionParams: {field} must be {requirement}, got {value!r}")
        self.field = field


class ContextLengthError(ValueError):
    """Prompt and completion do not fit into the context together."""

    def __init__(self, limit: int, prompt_tokens: int, completion_tokens: int) -> None:
        total = prompt_tokens + completion_tokens
        super().__init__(
            f"complete: prompt + max_tokens must be at most {limit} tokens (the context), "
            f"got {total} ({prompt_tokens} in the prompt, {completion_tokens} in the completion)"
        )
        self.field = "max_tokens" if prompt_tokens <= limit else "prompt"
        self.limit = limit
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = completion_tokens


@dataclass(frozen=True, kw_only=True)
class CompletionParams:
    """How to complete a prompt.

    Raises
    ------
    TypeError
        For an unknown field, or a value of the wrong kind; the message names the field.
    ParameterError
        For a value out of range (a `ValueError` with the name in `.field`).
    """

    max_tokens: int | None = None
    """Most tokens to generate, >= 0. None: 16, or what the prompt leaves of the context if less."""
    temperature: float = 1.0
    """Sharpness of the draw, 0..2. 0 takes the most likely token, ties to the lowest id."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens with at least this mass, 0..1. 0: the top token only."""
    top_k: int = 0
    """Draw from this many most likely tokens, >= -1. 0 and -1 switch it off."""
    min_p: float = 0.0
    """Draw from tokens at least this likely relative to the most likely one, 0..1. 0: off."""
    seed: int | None = None
    """Key of the random draws, 64-bit signed: same request, same answer. None: random."""
    n: int = 1
    """Choices for each prompt, 1..128."""
    stop: str | Iterable[str] | None = None
    """Strings that end the text, which is cut before them. At most 64; empty ones are ignored."""
    stop_token_ids: Iterable[int] = ()
    """Tokens that end the text without being part of it, besides the model's end tokens."""
    ignore_eos: bool = False
    """Generate past the model's end-of-text tokens."""
    logprobs: int | None = None
    """Report log-probabilities of each token and of this many likeliest ones, 0..100. None: off."""
    echo: bool = False
    """Put the prompt before the completion, with its log-probabilities if `logprobs` is given."""

    def __new__(cls, **given: Any) -> CompletionParams:
        """Refuse unknown names, with the closest known one."""
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise TypeError(f"CompletionParams: {name!r} is not a known field{hint}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Check every field and bring it to its plain type."""
        if self.max_tokens is not None:
            self._set("max_tokens", _integer("max_tokens", self.max_tokens, 0, None))
        self._set("temperature", _number("temperature", self.temperature, 0.0, 2.0))
        self._set("top_p", _number("top_p", self.top_p, 0.0, 1.0))
        self._set("top_k", max(0, _integer("top_k", self.top_k, -1, 2**31 - 1)))
        self._set("min_p", _number("min_p", self.min_p, 0.0, 1.0))
        if self.seed is not None:
            self._set("seed", _integer("seed", self.seed, -(2**63), 2**63 - 1))
        self._set("n", _integer("n", self.n, 1, 128))
        self._set("stop", _strings("stop", self.stop, 64))
        self._set("stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        self._set("ignore_eos", _flag("ignore_eos", self.ignore_eos))
        if self.logprobs is not None:
            self._set("logprobs", _integer("logprobs", self.logprobs, 0, 100))
        self._set("echo", _flag("echo", self.echo))

    def _set(self, field: str, value: object) -> None:
        object.__setattr__(self, field, value)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The strings of `stop`, without empty ones."""
        return self.stop  # type: ignore[return-value]  # brought to this type by __post_init__

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids of `stop_token_ids`."""
        return self.stop_token_ids  # type: ignore[return-value]

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether the prompt's own tokens are to be scored."""
        return self.echo and self.logprobs is not None


def _kind(field: str, kind: str, value: object) -> TypeError:
    return TypeError(f"CompletionParams: {field} must be {kind}, got {type(value).__name__}")


def _integer(field: str, value: object, low: int, high: int | None) -> int:
    if isinstance(value, bool):
        raise _kind(field, "an integer", value)
    try:
        result = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise _kind(field, "an integer", value) from None
    if result < low or (high is not None and result > high):
        bound = f"at least {low}" if high is None else f"in {low}..{high}"
        raise ParameterError(field, bound, value)
    return result


def _number(field: str, value: object, low: float, high: float) -> float:
    if isinstance(value, (bool, str, bytes)):
        raise _kind(field, "a number", value)
    try:
        result = float(value)  # type: ignore[arg-type]
    except TypeError:
        raise _kind(field, "a number", value) from None
    if not math.isfinite(result) or not low <= result <= high:
        raise ParameterError(field, f"in {low:g}..{high:g}", value)
    return result


def _flag(field: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _kind(field, "True or False", value)
    return value


def _strings(field: str, value: object, limit: int) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, Iterable) or isinstance(value, (bytes, bytearray)):
        raise _kind(field, "a string or several", value)
    strings = tuple(value)
    for item in strings:
        if not isinstance(item, str):
            raise _kind(field, "a string or several", item)
    if len(strings) > limit:
        raise ParameterError(field, f"at most {limit} strings", len(strings))
    return tuple(dict.fromkeys(item for item in strings if item))


def _token_ids(field: str, value: object) -> tuple[int, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise _kind(field, "several token ids", value)
    return tuple(_integer(field, item, 0, 2**31 - 1) for item in value)
