# SPDX-License-Identifier: Apache-2.0
"""Every parameter of a completion once: meaning, range, default and check."""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

from fullbeam import checks
from fullbeam.checks import ParameterError as ParameterError

DEFAULT_MAX_TOKENS = 16
MAX_WIDTH = 128
"""Most choices, candidates or hypotheses of a prompt."""
MAX_STOP = 1024
"""Most stop strings: each is looked for after every token."""


class ContextLengthError(ValueError):
    """Prompt and completion do not fit into the context together."""

    def __init__(self, limit: int, prompt_tokens: int, completion_tokens: int) -> None:
        total, wanted = map(checks.shown, (prompt_tokens + completion_tokens, completion_tokens))
        super().__init__(
            f"complete: prompt + max_tokens must be at most {limit} tokens (the context), "
            f"got {total} ({prompt_tokens} in the prompt, {wanted} in the completion)"
        )
        self.field = "max_tokens" if prompt_tokens <= limit else "prompt"
        self.limit = limit
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = completion_tokens


@dataclass(frozen=True, kw_only=True)
class CompletionParams:
    """How to complete a prompt: by drawing tokens or, where `beam_size` is given, by a search.

    Raises
    ------
    TypeError
        For an unknown field, or a value of the wrong kind; the message names the field.
    ParameterError
        For a value out of range, or one that does nothing beside the others (a `ValueError` with
        the name in `.field`).
    """

    max_tokens: int | None = None
    """Most tokens to generate, >= 0. None: 16, or what the prompt leaves of the context if less."""
    min_tokens: int = 0
    """Tokens before which no end token and no token of `stop_token_ids` comes, <= `max_tokens`."""
    temperature: float = 1.0
    """Sharpness of the draw, 0..2. 0 takes the most likely token, ties to the lowest id."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens with at least this mass, 0..1. 0: the top token only."""
    top_k: int = 0
    """Draw from this many most likely tokens, >= -1. 0 and -1 switch it off."""
    min_p: float = 0.0
    """Draw from tokens at least this likely relative to the most likely one, 0..1. 0: off."""
    presence_penalty: float = 0.0
    """Taken off the logit of each token that was generated before, -2..2."""
    frequency_penalty: float = 0.0
    """Taken off a token's logit as often as it was generated before, -2..2."""
    repetition_penalty: float = 1.0
    """Divides logits > 0, multiplies others, of tokens in prompt or text, 0.01..100. 1: off."""
    logit_bias: Mapping[int, float] | Iterable[tuple[int, float]] | None = None
    """Token ids with what is added to their logits, -100..100."""
    allowed_token_ids: Iterable[int] = ()
    """The only tokens that may be generated. Empty: all."""
    bad_words: str | Iterable[str] | None = None
    """Strings that are not generated, at most 64; empty ones are ignored."""
    seed: int | None = None
    """Key of the random draws, 64-bit signed: same request, same answer. None: random."""
    n: int = 1
    """Choices for each prompt, 1..128."""
    best_of: int | None = None
    """Draw this many candidates, return the `n` likeliest per token, `n`..128. None, 0, 1: `n`."""
    stop: str | Iterable[str] | None = None
    """Strings that end the text, cut before them, at most 1024. Empty ones are ignored."""
    stop_token_ids: Iterable[int] = ()
    """Tokens that end the text without being part of it, besides the model's end tokens."""
    include_stop_str_in_output: bool = False
    """Cut the text after the stop string rather than before it."""
    ignore_eos: bool = False
    """Generate past the model's end-of-text tokens."""
    skip_special_tokens: bool = True
    """Leave control tokens out of the text; False: their names appear in it."""
    add_special_tokens: bool = True
    """Start a text prompt with the model's start-of-document token, if it has one."""
    logprobs: int | None = None
    """Report log-probabilities of each token and of this many likeliest ones, 0..100. None: off."""
    prompt_logprobs: int | None = None
    """Report log-probabilities for each token of the prompt, by id, -1..100. -1: of all tokens."""
    return_tokens_as_token_ids: bool = False
    """Name tokens `token_id:N` in `logprobs`, rather than by their text."""
    echo: bool = False
    """Put the prompt before the completion, with its log-probabilities if `logprobs` is given."""
    suffix: str | None = None
    """Text that follows the completion: the model fills in the middle. None, "": nothing."""
    prefix: str = ""
    """What the text starts with: the completion is held to it, token by token."""
    token_healing: bool = False
    """Choose the end of a text prompt anew, held to its characters: it may be half a token."""
    context_len: int | None = None
    """Most prompt tokens to keep, from the end, >= 1. -1: what fits. None: refuse what does not."""
    truncate_prompt_tokens: int | None = None
    """Prompt tokens to keep, from the end, no matter where a line starts. -1: what fits."""
    beam_size: int | None = None
    """Search with this many hypotheses in each group, 1..128. None: draw."""
    diversity_groups: int = 1
    """Groups of hypotheses, each kept from the tokens of those before it. All in all up to 128."""
    diversity_strength: float = 0.3
    """Taken off a token's log-probability for each hypothesis of earlier groups with it, 0..100."""
    length_penalty: float | None = None
    """Rank by log-probability / tokens ** this, -10..10. None: 1, or `len_norm_base` and `_pow`."""
    len_norm_base: float | None = None
    """Rank by exp(log-probability / ((base + tokens) / (base + 1)) ** pow), > -1. None: 0.3."""
    len_norm_pow: float | None = None
    """See `len_norm_base`, -10..10; 0: the bare probability. None: 2."""
    mode: str | None = None
    """Suggest code: "FULL_LINE" to the line's end, "ONE_TOKEN" one word. None: texts to the end."""
    only_full_lines: bool = True
    """Suggest finished lines only; False: unfinished ones, too, cut at their last word's end."""
    group_answers: bool = False
    """Merge suggestions that are alike."""
    top_n: int | None = 5
    """Most suggestions, >= 0. None: all."""
    group_top_n: int | None = 5
    """Most suggestions of each diversity group, >= 0. None: all."""
    min_prefix_dist: float | None = None
    """Suggestions are alike with less than this share after their common start, 0..1."""
    min_edit_dist: float | None = None
    """Suggestions are alike with less than this share of edits between them, 0..1."""
    keep_kinds: Iterable[str] = ("short", "prob")
    """Of those that are alike: the "short"est, the most "prob"able, the "long"est."""

    def __new__(cls, **given: Any) -> CompletionParams:
        """Refuse unknown names, with the closest known one."""
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                what = checks.shown(name)
                raise TypeError(f"CompletionParams: {what} is not a known field{hint}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Check every field, bring it to its plain type, and check the fields together."""
        for field in fields(self):
            value = _CHECKS[field.name](field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            bound = f"at most max_tokens = {self.max_tokens}"
            raise ParameterError("min_tokens", bound, self.min_tokens)
        if self.best_of is not None and self.best_of < self.n:
            raise ParameterError("best_of", f"at least n = {self.n}", self.best_of)
        if self.context_len is not None:
            self._refuse(("truncate_prompt_tokens",), "left out beside context_len")
        if self.is_search:
            self._check_search()
        else:
            self._refuse(_SEARCH_FIELDS, "left out unless beam_size is given")

    def _check_search(self) -> None:
        if self.width > MAX_WIDTH:
            bound = f"at most {MAX_WIDTH} / beam_size"
            raise ParameterError("diversity_groups", bound, self.diversity_groups)
        self._refuse(DRAW_FIELDS, "left out beside beam_size: a search draws nothing")
        if self.max_tokens == 0:
            raise ParameterError("max_tokens", "at least 1 beside beam_size", 0)
        if self.len_norm_base is not None or self.len_norm_pow is not None:
            self._refuse(("length_penalty",), "left out beside len_norm_base and len_norm_pow")
        if self.mode is not None:
            self._refuse(("n",), "left out beside mode: top_n is the number of suggestions")
            self._refuse(_REPORT_FIELDS, "left out beside mode: suggestions come by themselves")
            return
        self._refuse(_MODE_FIELDS, "left out unless mode is given")
        if self.n > self.width:
            bound = f"at most beam_size * diversity_groups = {self.width}"
            raise ParameterError("n", bound, self.n)

    def _refuse(self, names: Iterable[str], requirement: str) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in names and value != field.default:
                raise ParameterError(field.name, requirement, value)

    def check_stream(self) -> None:
        """Refuse what is only known when everything is done.

        Raises
        ------
        ParameterError
            For a search, more candidates than choices, and log-probabilities of the prompt.
        """
        requirement = "left out of a streamed completion"
        if self.is_search:
            raise ParameterError("beam_size", requirement, self.beam_size)
        if self.num_candidates > self.n:
            raise ParameterError("best_of", requirement, self.best_of)
        if self.prompt_logprobs is not None:
            raise ParameterError("prompt_logprobs", requirement, self.prompt_logprobs)

    @property
    def is_search(self) -> bool:
        """Whether hypotheses are searched rather than tokens drawn."""
        return self.beam_size is not None

    @property
    def width(self) -> int:
        """Hypotheses of a search that live at once, in all groups."""
        return (self.beam_size or 0) * self.diversity_groups

    @property
    def num_candidates(self) -> int:
        """Texts to draw, of which `n` are returned."""
        return max(self.n, self.best_of or 0)

    @property
    def has_penalty(self) -> bool:
        """Whether the tokens so far change the logits."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)

    @property
    def num_top(self) -> int:
        """How many log-probabilities a draw reports besides its own; -1: not even that."""
        if self.logprobs is not None:
            return self.logprobs
        return 0 if self.num_candidates > self.n else -1

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether the prompt's own tokens are to be scored."""
        return self.prompt_logprobs is not None or (self.echo and self.logprobs is not None)

    @property
    def num_top_scored(self) -> int:
        """How many log-probabilities a token of the prompt is scored with; -1: all."""
        if self.prompt_logprobs == -1:
            return -1
        return max(self.prompt_logprobs or 0, (self.echo and self.logprobs) or 0)

    @property
    def len_norm(self) -> tuple[float, float] | None:
        """Base and power of the length normalisation; None: `length_rank` says how to rank."""
        base, power = self.len_norm_base, self.len_norm_pow
        if (
            base is None
            and power is None
            and (self.mode is None or self.length_penalty is not None)
        ):
            return None
        return 0.3 if base is None else base, 2.0 if power is None else power

    @property
    def length_rank(self) -> float:
        """Power of the token count that a log-probability is divided by."""
        return 1.0 if self.length_penalty is None else self.length_penalty

    @property
    def alike(self) -> tuple[float, float] | None:
        """Prefix and edit distance below which suggestions are merged; None: none are."""
        given = self.min_prefix_dist, self.min_edit_dist
        if self.group_answers and given == (None, None):
            return 0.2, 0.0
        prefix, edit = given[0] or 0.0, given[1] or 0.0
        return (prefix, edit) if self.group_answers or prefix > 0 or edit > 0 else None

    # Fields as __post_init__ left them, where their types allow more at the door.

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The strings of `stop`, without empty ones."""
        return cast("tuple[str, ...]", self.stop)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids of `stop_token_ids`."""
        return cast("tuple[int, ...]", self.stop_token_ids)

    @property
    def allowed_ids(self) -> tuple[int, ...]:
        """The ids of `allowed_token_ids`."""
        return cast("tuple[int, ...]", self.allowed_token_ids)

    @property
    def bad_strings(self) -> tuple[str, ...]:
        """The strings of `bad_words`, without empty ones."""
        return cast("tuple[str, ...]", self.bad_words)

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """Pairs of `logit_bias`, in the order of their ids."""
        return cast("tuple[tuple[int, float], ...]", self.logit_bias)

    @property
    def kept_kinds(self) -> tuple[str, ...]:
        """The words of `keep_kinds`."""
        return cast("tuple[str, ...]", self.keep_kinds)


def field_schema(name: str) -> dict[str, Any]:
    """Return the JSON schema of a field, with its default and what its docstring says."""
    default = {field.name: field.default for field in fields(CompletionParams)}[name]
    return _CHECKS[name].schema | {
        "default": list(default) if isinstance(default, tuple) else default,
        "description": _docstrings()[name],
    }


@functools.cache
def _docstrings() -> dict[str, str]:
    """What stands below each field in the source."""
    (body,) = ast.parse(inspect.getsource(CompletionParams)).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, below in itertools.pairwise(body.body):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            assert isinstance(field.target, ast.Name)
            assert isinstance(below.value, ast.Constant)
            found[field.target.id] = str(below.value.value)
    return found


# Fields that mean something with a mode only, in a search only, in a draw only.
_MODE_FIELDS = (
    "only_full_lines",
    "group_answers",
    "top_n",
    "group_top_n",
    "min_prefix_dist",
    "min_edit_dist",
    "keep_kinds",
)
_REPORT_FIELDS = ("echo", "logprobs", "prompt_logprobs")  # of texts, not of suggestions
_SEARCH_FIELDS = (
    "diversity_groups",
    "diversity_strength",
    "length_penalty",
    "len_norm_base",
    "len_norm_pow",
    "mode",
    *_MODE_FIELDS,
)
DRAW_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "best_of",
)


_CHECKS: Mapping[str, checks.Check] = {
    "max_tokens": checks.optional(checks.integer(0)),
    "min_tokens": checks.integer(0),
    "temperature": checks.number(0, 2),
    "top_p": checks.number(0, 1),
    "top_k": checks.integer(-1, 2**31 - 1).then(lambda value: max(0, value)),
    "min_p": checks.number(0, 1),
    "presence_penalty": checks.number(-2, 2),
    "frequency_penalty": checks.number(-2, 2),
    "repetition_penalty": checks.number(0.01, 100),
    "logit_bias": checks.biases,
    "allowed_token_ids": checks.token_ids,
    "bad_words": checks.strings(64),
    "seed": checks.optional(checks.integer(-(2**63), 2**63 - 1)),
    "n": checks.integer(1, MAX_WIDTH),
    # Some clients always send 1, whatever n is.
    "best_of": checks.optional(
        checks.integer(0, MAX_WIDTH).then(lambda value: value if value > 1 else None)
    ),
    "stop": checks.strings(MAX_STOP),
    "stop_token_ids": checks.token_ids,
    "include_stop_str_in_output": checks.flag,
    "ignore_eos": checks.flag,
    "skip_special_tokens": checks.flag,
    "add_special_tokens": checks.flag,
    "logprobs": checks.optional(checks.integer(0, 100)),
    "prompt_logprobs": checks.optional(checks.integer(-1, 100)),
    "return_tokens_as_token_ids": checks.flag,
    "echo": checks.flag,
    "suffix": checks.optional(checks.text.then(lambda value: value or None)),
    "prefix": checks.text,
    "token_healing": checks.flag,
    "context_len": checks.optional(checks.num_kept),
    "truncate_prompt_tokens": checks.optional(checks.num_kept),
    "beam_size": checks.optional(checks.integer(1, MAX_WIDTH)),
    "diversity_groups": checks.integer(1, MAX_WIDTH),
    "diversity_strength": checks.number(0, 100),
    "length_penalty": checks.optional(checks.number(-10, 10)),
    "len_norm_base": checks.optional(checks.number(-1, above=True)),
    "len_norm_pow": checks.optional(checks.number(-10, 10)),
    "mode": checks.optional(checks.one_of("FULL_LINE", "ONE_TOKEN")),
    "only_full_lines": checks.flag,
    "group_answers": checks.flag,
    "top_n": checks.optional(checks.integer(0)),
    "group_top_n": checks.optional(checks.integer(0)),
    "min_prefix_dist": checks.optional(checks.number(0, 1)),
    "min_edit_dist": checks.optional(checks.number(0, 1)),
    "keep_kinds": checks.kinds,
}
