# SPDX-License-Identifier: Apache-2.0
"""What is being completed: a request, its sequences, and the rows that they decode."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from fullbeam.engine.batch import Int32Array
from fullbeam.engine.drafts import Drafter, index_prompt
from fullbeam.engine.logits import History
from fullbeam.engine.pages import PageTable, prompt_keys
from fullbeam.engine.rules import Mask, Rules, State, has_token
from fullbeam.engine.text import (
    Logprobs,
    Piece,
    RankedLogprob,
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


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a request that came to its end."""

    indices: range
    """Indices that the choices of the prompt may have."""
    num_tokens: int
    """Tokens generated for all of them, and for candidates that were not chosen."""


Event = Piece | Finished | Exception


@dataclass(eq=False, repr=False, slots=True, weakref_slot=True)
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
    rules: Rules | None = None  # None: every token is allowed everywhere
    constraint: bytes = b""  # what the generated text starts with; ends with the prefix
    sequences: list[Sequence] = field(default_factory=list)
    closed: bool = False  # nothing more is reported
    first_token_at: float | None = None  # in seconds, as is the next
    last_token_at: float = 0.0
    num_token_places: int = 0  # in each step, the tokens of the row that got most
    _text: str | None = None
    _offsets: list[int] | None = None
    _ranked: list[dict[int, RankedLogprob] | None] | None = None

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt, the start-of-document token included."""
        return len(self.prompt_ids)

    @property
    def num_generated(self) -> int:
        """Tokens generated so far, for all choices and candidates."""
        return sum(sequence.num_generated for sequence in self.sequences)

    def note_tokens(self, now: float, count: int) -> None:
        """Take note of a step that gave tokens, `count` of them to the row that got most."""
        if self.first_token_at is None:
            self.first_token_at = now
        self.last_token_at = now
        self.num_token_places += count

    @property
    def token_interval_s(self) -> float | None:
        """Mean time from one token to the next; None before the second one."""
        if self.first_token_at is None or self.num_token_places < 2:
            return None
        return (self.last_token_at - self.first_token_at) / (self.num_token_places - 1)

    @property
    def healed(self) -> bytes:
        """End of the prompt's text that is not in `prompt_ids`: the first tokens spell it."""
        return self.constraint.removesuffix(self.params.prefix.encode())

    @property
    def prompt_text(self) -> str:
        """The prompt as text."""
        if self._text is None:
            given = self.given_text
            ids = self.prompt_ids.tolist()
            self._text = decode_bytes(self.tokenizer, ids) if given is None else given
        return self._text

    @property
    def indices(self) -> range:
        """Indices that the choices may have: those of the prompts before this one come first."""
        params = self.params
        most = params.n
        if params.mode is not None:
            most = params.width * (self.max_tokens + 1) if params.top_n is None else params.top_n
        return range(self.prompt_index * most, (self.prompt_index + 1) * most)

    @property
    def chooses_at_end(self) -> bool:
        """Whether the choices are only known when everything is computed."""
        return self.params.is_search or self.params.num_candidates > self.params.n

    def chosen_pieces(self) -> list[Piece]:
        """The choices of a request that chooses at its end, one whole piece for each."""
        pieces = [piece for sequence in self.sequences for piece in sequence.pieces()]
        rows = [row for sequence in self.sequences for row in sequence.rows]
        for choice, row in enumerate(best_rows(rows, self.params.n)):
            piece = row.take_piece(choice)
            assert piece is not None
            pieces.append(piece)
        return pieces

    def prompt_logprobs(self, scores: list[TokenLogprob]) -> Logprobs:
        """Return the reported form of the prompt's own log-probabilities."""
        ids = self.prompt_ids.tolist()
        if self._offsets is None:
            text = self.prompt_text
            text = text[: len(text) - _num_chars(self.healed)]
            self._offsets = prompt_offsets(self.tokenizer, ids, text)
        entries = [score.cut(self.params.logprobs or 0) for score in scores]
        return self.render(ids, [None, *entries], self._offsets)

    def render(
        self, token_ids: list[int], entries: Iterable[TokenLogprob | None], offsets: list[int]
    ) -> Logprobs:
        """Return the reported form of log-probabilities."""
        as_ids = self.params.return_tokens_as_token_ids
        return self.names.render(token_ids, entries, offsets, as_ids=as_ids)

    def ranked_prompt(self, scores: list[TokenLogprob]) -> list[dict[int, RankedLogprob] | None]:
        """Return the tokens in each place of the prompt, as `prompt_logprobs` asks for them."""
        if self._ranked is None:
            num_top = self.params.prompt_logprobs or 0
            if num_top >= 0:
                scores = [score.cut(num_top) for score in scores]
            pairs = zip(self.prompt_ids[1:].tolist(), scores, strict=True)
            self._ranked = [None, *(self.names.rank(*pair) for pair in pairs)]
        return self._ranked

    def token_text(self, token_id: int) -> bytes:
        """Return what a generated token adds to the text."""
        data = self.tokenizer.token_bytes(token_id)
        if data or self.params.skip_special_tokens:
            return data
        return self.names[token_id].encode()


class Row:
    """One candidate for a choice: its tokens, its pages, its text."""

    def __init__(self, sequence: Sequence, choice: int) -> None:
        request = sequence.request
        params = request.params
        num_prompt = request.num_prompt_tokens
        self.sequence = sequence
        self.choice = choice
        self.ids: Int32Array = np.empty(num_prompt + request.max_tokens, np.int32)
        self.ids[:num_prompt] = request.prompt_ids
        self.num_tokens = num_prompt  # of ids, prompt included
        self.table: PageTable | None = None  # None until the prompt is computed
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.history: History | None = None
        if params.has_penalty:
            self.history = History(request.prompt_ids, request.max_tokens)
        self.state: State | None = None if request.rules is None else request.rules.start()
        self._drafter: Drafter | None = None
        self._keeps_stop = params.include_stop_str_in_output
        self._text = TextStream(
            params.stop_strings, keep_stop=self._keeps_stop, num_given=len(params.prefix)
        )
        self._healed = request.healed  # what the tokens still have to spell of it
        self._starts: list[int] = []  # of each generated token, in characters of generated text
        self._entries: list[TokenLogprob] = []
        self._sum_logprobs = 0.0
        self._num_reported = 0
        self._echo = params.echo

    @property
    def num_generated(self) -> int:
        """Tokens generated so far, the end token included."""
        return self.num_tokens - self.sequence.request.num_prompt_tokens

    @property
    def drafter(self) -> Drafter:
        """Guesses the row's next tokens."""
        if self._drafter is None:
            prompt_ids = self.sequence.request.prompt_ids
            self._drafter = Drafter(self.sequence.prompt_places, prompt_ids)
        return self._drafter

    def masks(self, drafts: list[int]) -> list[Mask | None]:
        """The tokens that may come next, and those after each token of a draft; None: all."""
        rules, state = self.sequence.request.rules, self.state
        if rules is None or state is None:
            return [None] * (1 + len(drafts))
        masks = [rules.allowed(state, self.num_generated)]
        for num_ahead, token_id in enumerate(drafts, 1):
            if not has_token(masks[-1], token_id):  # nothing is taken from behind it
                return masks + [None] * (1 + len(drafts) - len(masks))
            state = rules.advance(state, token_id)
            masks.append(rules.allowed(state, self.num_generated + num_ahead))
        return masks

    def takes_largest(self, drafts: list[int]) -> bool:
        """Whether its next token, and that after each token of a draft, is the one of the largest
        logit, of which nothing is reported."""
        params = self.sequence.request.params
        if (
            params.temperature > 0
            or params.num_top >= 0
            or params.biases
            or self.history is not None
        ):
            return False
        return all(mask is None for mask in self.masks(drafts))

    def histories(self, drafts: list[int]) -> list[History | None]:
        """The tokens so far, and those with each token of a draft; None without a penalty."""
        history = self.history
        if history is None:
            return [None] * (1 + len(drafts))
        histories = [history]
        for token_id in drafts:
            histories.append(histories[-1].followed_by(token_id))
        return [*histories]

    def take(
        self, token_ids: list[int], entries: list[TokenLogprob | None], drafts: list[int]
    ) -> int:
        """Append the tokens drawn at the row's end and at each place of a draft, as far as the
        draft holds and the row goes on; return how many, 0 where the first could not be drawn."""
        for place, token_id in enumerate(token_ids):
            if token_id < 0:
                return place
            self.append(token_id, entries[place])
            is_held = place < len(drafts) and token_id == drafts[place]
            if self.finish_reason is not None or not is_held:
                return place + 1
        return len(token_ids)

    def append(self, token_id: int, entry: TokenLogprob | None) -> None:
        """Take a generated token; sets `finish_reason` when it is the last."""
        request = self.sequence.request
        self.ids[self.num_tokens] = token_id
        self.num_tokens += 1
        if entry is not None:
            self._entries.append(entry)
            self._sum_logprobs += entry.logprob
        if self.history is not None:
            self.history.add(token_id)
        if request.rules is not None and self.state is not None:
            self.state = request.rules.advance(self.state, token_id)
        is_end = token_id in request.end_ids
        is_shown = self._keeps_stop or not is_end
        if not is_shown:
            self._text.finish()
        self._starts.append(self._text.num_chars - _num_chars(self._healed))
        matched = self._text.push(self._past_healed(token_id)) if is_shown else None
        if is_end:
            self._text.finish()
            self.finish_reason = "stop"
            self.stop_reason = token_id if token_id in request.params.stop_ids else None
        elif matched is not None:
            self.finish_reason = "stop"
            self.stop_reason = matched
        elif self.num_tokens == len(self.ids):
            self.finish_without_token()

    def _past_healed(self, token_id: int) -> bytes:
        """Return what a token adds to the text once the end of the prompt is spelled again."""
        data = self.sequence.request.token_text(token_id)
        if self._healed:
            num_spelled = min(len(data), len(self._healed))
            self._healed = self._healed[num_spelled:]
            data = data[num_spelled:]
        return data

    def finish_without_token(self) -> None:
        """End the row because it has all the tokens that were asked for."""
        self._text.finish()
        self.finish_reason = "length"

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability of the generated tokens; 0 where there is none."""
        return self._sum_logprobs / max(1, len(self._entries))

    def take_piece(self, choice: int | None = None) -> Piece | None:
        """Return what is new and safe to show; None when that is nothing.

        `choice` is the row's place among the choices, where it is not the place it was drawn at.
        """
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
        logprobs = None
        if request.params.logprobs is not None:
            base = len(request.prompt_text)
            offsets = [base + start for start in starts[first:end]]
            logprobs = request.render(ids, self._entries[first:end], offsets)
        if self._echo:
            self._echo = False
            text = request.prompt_text + text
            if logprobs is not None:
                prompt = request.prompt_logprobs(self.sequence.scores)
                prompt.extend(logprobs)
                logprobs = prompt
        ranked = None
        if finished and request.params.prompt_logprobs is not None:
            ranked = request.ranked_prompt(self.sequence.scores)
        return Piece(
            index=request.indices.start + (self.choice if choice is None else choice),
            text=text,
            token_ids=ids,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            logprobs=logprobs,
            num_tokens=self.num_generated,
            score=self.mean_logprob if finished and self._entries else None,
            prompt_logprobs=ranked,
        )


def _num_chars(data: bytes) -> int:
    """Return how many characters of UTF-8 start in some bytes."""
    return sum(byte & 0xC0 != 0x80 for byte in data)


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
        self._prompt_places: dict[int, int] | None = None
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
    def num_rows(self) -> int:
        """Rows of the batch that the sequence may take at once."""
        return len(self.live_rows)

    @property
    def num_pending(self) -> int:
        """Single tokens that it computes in the next step, once the prompt is done."""
        return sum(
            row.table is not None and row.num_tokens - row.table.num_tokens == 1
            for row in self.rows
        )

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to compute."""
        return not self.live_rows

    @property
    def num_generated(self) -> int:
        """Tokens generated so far, in all rows."""
        return sum(row.num_generated for row in self.rows)

    def pages_to_start(self, page_size: int) -> int:
        """Pages of the prompt, and of what was generated before a preemption."""
        num_pages = -(-self.num_trunk_tokens // page_size)
        if not self.has_tokens:
            return num_pages
        shared = self.num_trunk_tokens // page_size
        num_private = sum(-(-row.num_tokens // page_size) - shared for row in self.live_rows)
        return max(num_pages, shared + num_private)

    def take_trunk(self, trunk: PageTable, copy_page: Callable[[int, int], None]) -> int:
        """Go on from the computed prompt; returns how many later tokens are computed already."""
        num_found = 0
        for row in self.live_rows:
            row.table = trunk.fork()
            num_found += row.table.reuse(row.ids, row.num_tokens - 1, copy_page)
        trunk.release()
        self.trunk = None
        return num_found

    def pieces(self) -> list[Piece]:
        """Results that no row holds: those of a search."""
        return []

    def finish_without_token(self) -> None:
        """End every row: there is nothing to generate."""
        for row in self.rows:
            row.finish_without_token()

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

    @property
    def prompt_places(self) -> dict[int, int]:
        """Where the tokens of the prompt came last, for the drafts of the rows."""
        if self._prompt_places is None:
            self._prompt_places = index_prompt(self.request.prompt_ids)
        return self._prompt_places

    def held_pages(self) -> list[int]:
        """Every page that the sequence holds, once for each reference."""
        return [page for table in self._tables() for page in table.pages]

    def _tables(self) -> list[PageTable]:
        tables = [row.table for row in self.rows if row.table is not None]
        return tables if self.trunk is None else [*tables, self.trunk]

    def release(self) -> None:
        """Give back every page; what was generated stays."""
        for table in self._tables():
            table.release()
        for row in self.rows:
            row.table = None
        self.trunk = None
        self.is_admitted = False


def best_rows(rows: list[Row], n: int) -> list[Row]:
    """The rows with the highest mean log-probability per token, ties to the earlier one."""
    return sorted(rows, key=lambda row: -row.mean_logprob)[:n]


def pages_needed(num_prompt: int, max_tokens: int, num_rows: int, page_size: int) -> int:
    """Most pages that a sequence can hold at once."""
    prompt_pages = -(-num_prompt // page_size)
    if max_tokens <= 1:
        return prompt_pages
    shared = num_prompt // page_size
    last = num_prompt + max_tokens - 1  # the last token's key and value are never needed
    return max(prompt_pages, shared + num_rows * (-(-last // page_size) - shared))
