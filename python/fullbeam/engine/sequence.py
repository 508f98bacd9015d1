# SPDX-License-Identifier: Apache-2.0
"""What is being completed: a request, its sequences, and the rows that they decode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from fullbeam.engine.batch import Int32Array
from fullbeam.engine.pages import PageTable, prompt_keys
from fullbeam.engine.text import (
    Logprobs,
    Piece,
    TextStream,
    Tokenizer,
    TokenLogprob,
    TokenNames,
    decode_bytes,
    prompt_offsets,
)
from fullbeam.params import CompletionParams


class RequestCancelled(RuntimeError):
    """The request was cancelled before it was complete."""


Event = Piece | Exception


@dataclass(eq=False, repr=False, slots=True)
class Request:
    """One prompt with its parameters, as submitted; what comes of it goes to `on_event`."""

    prompt_ids: Int32Array  # [num_prompt_tokens]
    given_text: str | None  # None where the prompt was given as ids
    params: CompletionParams
    max_tokens: int
    prompt_index: int
    seed: int  # in 0..2**64 - 1
    stream: bool  # pieces as they come, rather than one for each choice
    on_event: Callable[[Event], None]
    tokenizer: Tokenizer
    names: TokenNames
    end_ids: frozenset[int]  # end of text and stop tokens
    sequences: list[Sequence] = field(default_factory=list)
    closed: bool = False  # nothing more is reported
    num_open: int = field(init=False)  # choices whose last piece is still to come
    _text: str | None = None
    _offsets: list[int] | None = None

    def __post_init__(self) -> None:
        """Every choice is open at first."""
        self.num_open = self.params.n

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt, the start-of-document token included."""
        return len(self.prompt_ids)

    @property
    def prompt_text(self) -> str:
        """The prompt as text."""
        if self._text is None:
            given = self.given_text
            ids = self.prompt_ids.tolist()
            self._text = decode_bytes(self.tokenizer, ids) if given is None else given
        return self._text

    def prompt_logprobs(self, scores: list[TokenLogprob]) -> Logprobs:
        """Return the reported form of the prompt's own log-probabilities."""
        ids = self.prompt_ids.tolist()
        if self._offsets is None:
            self._offsets = prompt_offsets(self.tokenizer, ids, self.prompt_text)
        return self.names.render(ids, [None, *scores], self._offsets)


class Row:
    """One choice: its tokens, its pages, its text."""

    def __init__(self, sequence: Sequence, choice: int) -> None:
        request = sequence.request
        num_prompt = request.num_prompt_tokens
        self.sequence = sequence
        self.choice = choice
        self.ids: Int32Array = np.empty(num_prompt + request.max_tokens, np.int32)
        self.ids[:num_prompt] = request.prompt_ids
        self.num_tokens = num_prompt  # of ids, prompt included
        self.table: PageTable | None = None  # None until the prompt is computed
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self._text = TextStream(request.params.stop_strings)
        self._starts: list[int] = []  # of each generated token, in characters of generated text
        self._entries: list[TokenLogprob] = []
        self._sum_logprobs = 0.0
        self._num_reported = 0
        self._echo = request.params.echo

    def append(self, token_id: int, entry: TokenLogprob | None) -> None:
        """Take a generated token; sets `finish_reason` when it is the last."""
        request = self.sequence.request
        self.ids[self.num_tokens] = token_id
        self.num_tokens += 1
        if entry is not None:
            self._entries.append(entry)
            self._sum_logprobs += entry.logprob
        if token_id in request.end_ids:
            self._text.finish()
            self._starts.append(self._text.num_chars)
            self.finish_reason = "stop"
            self.stop_reason = token_id if token_id in request.params.stop_ids else None
            return
        self._starts.append(self._text.num_chars)
        matched = self._text.push(request.tokenizer.token_bytes(token_id))
        if matched is not None:
            self.finish_reason = "stop"
            self.stop_reason = matched
        elif self.num_tokens == len(self.ids):
            self.finish_without_token()

    def finish_without_token(self) -> None:
        """End the row because it has all the tokens that were asked for."""
        self._text.finish()
        self.finish_reason = "length"

    def take_piece(self) -> Piece | None:
        """Return what is new and safe to show; None when that is nothing."""
        text = self._text.take()
        finished = self.finish_reason is not None
        if not (text or finished or self._echo):
            return None
        request = self.sequence.request
        starts, first = self._starts, self._num_reported
        end = len(starts)
        if not finished or isinstance(self.stop_reason, str):
            # A token that starts where the text may still be cut is not certain to stay.
            end = first
            while end < len(starts) and starts[end] < self._text.num_shown:
                end += 1
        self._num_reported = end
        num_prompt = request.num_prompt_tokens
        ids = self.ids[num_prompt + first : num_prompt + end].tolist()
        num_generated = self.num_tokens - num_prompt
        logprobs, mean = None, None
        if request.params.logprobs is not None:
            base = len(request.prompt_text)
            logprobs = request.names.render(
                ids, self._entries[first:end], [base + start for start in starts[first:end]]
            )
            if finished and num_generated:
                mean = self._sum_logprobs / num_generated
        if self._echo:
            self._echo = False
            text = request.prompt_text + text
            if logprobs is not None:
                prompt = request.prompt_logprobs(self.sequence.scores)
                prompt.extend(logprobs)
                logprobs = prompt
        return Piece(
            index=request.prompt_index * request.params.n + self.choice,
            text=text,
            token_ids=ids,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            logprobs=logprobs,
            num_tokens=num_generated,
            mean_logprob=mean,
        )


class Sequence:
    """A prompt that is computed once, and the rows that continue it."""

    def __init__(self, request: Request, choices: range) -> None:
        self.request = request
        self.rows = [Row(self, choice) for choice in choices]
        self.trunk: PageTable | None = None  # pages of the prompt, until the rows take them over
        self.is_admitted = False
        self.has_tokens = False  # the first tokens have been drawn
        self.scores: list[TokenLogprob] = []  # of prompt tokens 1, 2, ...
        self._keys: list[bytes] | None = None
        num_prompt = request.num_prompt_tokens
        if request.max_tokens > 0:
            self.num_trunk_tokens = num_prompt
        else:
            self.num_trunk_tokens = num_prompt - 1 if self.wants_scores else 0

    @property
    def wants_scores(self) -> bool:
        """Whether the prompt's tokens are to be scored."""
        return self.request.params.wants_prompt_logprobs

    @property
    def live_rows(self) -> list[Row]:
        """Rows that are not finished."""
        return [row for row in self.rows if row.finish_reason is None]

    @property
    def num_reusable(self) -> int:
        """Most prompt tokens that a prefix hit may spare."""
        if self.wants_scores:
            return min(len(self.scores), self.num_trunk_tokens - 1)
        return self.num_trunk_tokens - 1

    def keys(self, page_size: int) -> list[bytes]:
        """Page keys of the prompt."""
        if self._keys is None:
            self._keys = prompt_keys(self.request.prompt_ids, page_size)
        return self._keys

    def tables(self) -> list[PageTable]:
        """All page tables that hold pages."""
        tables = [row.table for row in self.rows if row.table is not None]
        return tables if self.trunk is None else [*tables, self.trunk]

    def release(self) -> None:
        """Give back every page; what was generated stays."""
        for table in self.tables():
            table.release()
        for row in self.rows:
            row.table = None
        self.trunk = None
        self.is_admitted = False


def pages_needed(num_prompt: int, max_tokens: int, num_rows: int, page_size: int) -> int:
    """Most pages that a sequence can hold at once."""
    prompt_pages = -(-num_prompt // page_size)
    if max_tokens <= 1:
        return prompt_pages
    shared = num_prompt // page_size
    last = num_prompt + max_tokens - 1  # the last token's key and value are never needed
    return max(prompt_pages, shared + num_rows * (-(-last // page_size) - shared))
