# SPDX-License-Identifier: Apache-2.0
"""What a completion returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from fullbeam.engine.sequence import Finished
from fullbeam.engine.text import Logprobs, Piece, RankedLogprob


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a call."""

    prompt_tokens: int
    """Tokens of the prompts, each counted once."""
    completion_tokens: int
    """Every generated token of every choice and candidate, end tokens included."""

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Choice:
    """One completion of one prompt."""

    index: int
    """Prompt index * n + choice."""
    text: str
    token_ids: list[int]
    """Generated ids, the end token included, those cut off by a stop string not."""
    finish_reason: str
    """"stop" or "length"."""
    stop_reason: str | int | None
    """The stop string or stop token id that ended the text."""
    logprobs: Logprobs | None
    score: float | None
    """Mean log-probability of the generated tokens, where `logprobs` or `best_of` asked for it;
    after a search, what its results are ranked by."""
    prompt_logprobs: list[dict[int, RankedLogprob] | None] | None = None
    """Where asked for, tokens in each place of the prompt by id; None in the first."""


@dataclass(frozen=True, slots=True)
class Completion:
    """All choices of a call, in the order of their indices."""

    choices: list[Choice]
    usage: Usage
    prompt_token_ids: list[list[int]] = field(default_factory=list)
    """What the model was given, for each prompt."""


@dataclass(frozen=True, slots=True)
class Score:
    """How likely the model finds a text; lists have one entry for each token."""

    token_ids: list[int]
    tokens: list[str]
    logprobs: list[float | None]
    """Natural logarithms; None for the first token."""
    is_greedy: list[bool | None]
    """Whether the token is the most likely one; None for the first token."""
    text_offset: list[int]
    """Where each token starts in the text, in characters."""

    @property
    def total(self) -> float:
        """Sum of the log-probabilities."""
        return sum(value for value in self.logprobs if value is not None)


@dataclass(slots=True)
class Tally:
    """Keeps count of a call's events."""

    num_prompt_tokens: int
    num_open: int  # prompts that are not finished
    num_finished_tokens: int = 0  # generated for the prompts that are
    num_generated: dict[int, int] = field(default_factory=dict)  # by choice index, of the others

    def add(self, event: Piece | Finished) -> None:
        """Count a piece, or the end of a prompt."""
        if isinstance(event, Piece):
            self.num_generated[event.index] = event.num_tokens
            return
        self.num_open -= 1
        self.num_finished_tokens += event.num_tokens
        # `top_n` may allow for any number of indices: few of them have come.
        for index in [index for index in self.num_generated if index in event.indices]:
            del self.num_generated[index]

    @property
    def usage(self) -> Usage:
        """Counts so far."""
        num_generated = self.num_finished_tokens + sum(self.num_generated.values())
        return Usage(self.num_prompt_tokens, num_generated)


def as_choice(piece: Piece) -> Choice:
    """Return the choice that a single, final piece holds."""
    assert piece.finish_reason is not None
    return Choice(
        index=piece.index,
        text=piece.text,
        token_ids=piece.token_ids,
        finish_reason=piece.finish_reason,
        stop_reason=piece.stop_reason,
        logprobs=piece.logprobs,
        score=piece.score,
        prompt_logprobs=piece.prompt_logprobs,
    )
