# SPDX-License-Identifier: Apache-2.0
"""Token ids to text: whole UTF-8 characters, stop strings, log-probabilities as reported."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from fullbeam.models.vocabulary import InfillTokens

_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class Tokenizer(Protocol):
    """What the engine needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""

    @property
    def bos_id(self) -> int | None:
        """Token that starts a document."""

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end a text."""

    @property
    def infill(self) -> InfillTokens | None:
        """Tokens to fill in the middle with."""

    @property
    def backend(self) -> Any:
        """The `tokenizers` object, for the names of control tokens."""

    def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True
    ) -> list[int]:
        """Return the token ids of a text."""

    def token_bytes(self, token_id: int) -> bytes:
        """Return the exact bytes of a token, b"" for control tokens."""

    def all_token_bytes(self) -> list[bytes]:
        """Return the bytes of every token."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Raw model log-probability of one token, and the most likely tokens in its place."""

    logprob: float
    top_ids: Sequence[int]
    top_logprobs: Sequence[float]
    rank: int = 0  # of the token among all, from 1; 0: not known

    def cut(self, num_top: int) -> TokenLogprob:
        """Return the same with fewer of the most likely tokens."""
        top_ids, top_logprobs = self.top_ids[:num_top], self.top_logprobs[:num_top]
        return TokenLogprob(self.logprob, top_ids, top_logprobs, self.rank)


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Four parallel lists, one entry for each token.

    Values are natural logarithms from the model before temperature and truncation; those of a
    prompt's first token are None. `text_offset` counts characters from the start of the prompt.
    """

    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def extend(self, other: Logprobs) -> None:
        """Append the entries of another one."""
        self.tokens.extend(other.tokens)
        self.token_logprobs.extend(other.token_logprobs)
        self.top_logprobs.extend(other.top_logprobs)
        self.text_offset.extend(other.text_offset)


@dataclass(frozen=True, slots=True)
class RankedLogprob:
    """Log-probability of a token in some place, and how many are at least as likely there."""

    logprob: float
    rank: int
    """1: the most likely one."""
    decoded_token: str


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a choice: text and tokens that are new since the piece before it."""

    index: int
    """Which choice: prompt index * n + choice."""
    text: str
    token_ids: list[int]
    """Generated ids that belong to `text`, the end token included; never those of the prompt."""
    finish_reason: str | None = None
    """In the last piece of a choice: "stop" or "length"."""
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended the choice."""
    logprobs: Logprobs | None = None
    num_tokens: int = 0
    """Tokens generated so far in this choice, those cut off by a stop string included."""
    score: float | None = None
    """In the last piece: mean log-probability of the generated tokens, where log-probabilities or
    more candidates were asked for; after a search, what its results are ranked by."""
    prompt_logprobs: list[dict[int, RankedLogprob] | None] | None = None
    """In the last piece, where asked for: tokens in each place of the prompt; None in the first."""


class TokenNames:
    """Texts of single tokens as reported with log-probabilities."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._names: dict[int, str] = {}

    def __getitem__(self, token_id: int) -> str:
        name = self._names.get(token_id)
        if name is None:
            name = self._names[token_id] = self._name(token_id)
        return name

    def _name(self, token_id: int) -> str:
        data = self._tokenizer.token_bytes(token_id)
        if not data:
            return self._tokenizer.backend.id_to_token(token_id) or ""
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def rank(self, token_id: int, entry: TokenLogprob) -> dict[int, RankedLogprob]:
        """Return a token and the most likely ones in its place, by id."""
        ranked = {token_id: RankedLogprob(entry.logprob, entry.rank, self[token_id])}
        top = zip(entry.top_ids, entry.top_logprobs, strict=True)
        for rank, (top_id, value) in enumerate(top, 1):
            ranked.setdefault(top_id, RankedLogprob(value, rank, self[top_id]))
        return ranked

    def render(
        self,
        token_ids: Iterable[int],
        entries: Iterable[TokenLogprob | None],
        offsets: Iterable[int],
        *,
        as_ids: bool = False,
    ) -> Logprobs:
        """Return the reported form; an entry of None is a token that nothing predicted."""
        name_of = "token_id:{}".format if as_ids else self.__getitem__
        result = Logprobs()
        for token_id, entry, offset in zip(token_ids, entries, offsets, strict=True):
            name = name_of(token_id)
            result.tokens.append(name)
            result.text_offset.append(offset)
            if entry is None:
                result.token_logprobs.append(None)
                result.top_logprobs.append(None)
                continue
            top: dict[str, float] = {}
            for top_id, value in zip(entry.top_ids, entry.top_logprobs, strict=True):
                top.setdefault(name_of(top_id), value)  # most likely first: the larger value stays
            top.setdefault(name, entry.logprob)
            result.token_logprobs.append(entry.logprob)
            result.top_logprobs.append(top)
        return result


class TextStream:
    """Bytes of successive tokens to text that can be shown: no half characters, no stop strings.

    Stop strings are not looked for in the first `num_given` characters.
    """

    def __init__(
        self, stop: tuple[str, ...] = (), *, keep_stop: bool = False, num_given: int = 0
    ) -> None:
        self._decoder = _utf8_decoder("replace")
        self._stop = stop
        self._num_given = num_given
        self._keep_stop = keep_stop  # show the stop string, too
        self._held = ""  # decoded, but could still become a stop string
        self._parts: list[str] = []  # may be shown, not taken yet
        self.num_chars = 0  # decoded, held ones included
        self.num_shown = 0  # taken or ready to be taken

    def push(self, data: bytes) -> str | None:
        """Add a token's bytes; return the stop string that they completed, if any.

        Of several matches the one that starts first counts, then the one given first.
        """
        text = self._decoder.decode(data)
        if not text:
            return None
        self.num_chars += len(text)
        if self._num_given > 0:
            num_given = min(self._num_given, len(text))
            self._num_given -= num_given
            self._show(text[:num_given])
            text = text[num_given:]
        if not self._stop:
            self._show(text)
            return None
        text = self._held + text
        cut, matched = len(text), None
        for stop in self._stop:
            start = text.find(stop, 0, cut + len(stop) - 1)
            if start >= 0:
                cut, matched = start, stop
        if matched is None:
            cut = self._held_start(text)
        elif self._keep_stop:
            cut += len(matched)
        self._held = text[cut:] if matched is None else ""
        self._show(text[:cut])
        return matched

    def finish(self) -> None:
        """Show what is held; a character cut short becomes a replacement character."""
        tail = self._decoder.decode(b"", final=True)
        self.num_chars += len(tail)
        self._show(self._held + tail)
        self._held = ""

    def take(self) -> str:
        """Return the text that became showable since the last call."""
        text = "".join(self._parts)
        self._parts.clear()
        return text

    def _show(self, text: str) -> None:
        if text:
            self._parts.append(text)
            self.num_shown += len(text)

    def _held_start(self, text: str) -> int:
        """Where the longest tail starts that is the beginning of a stop string."""
        first = len(text)
        for stop in self._stop:
            start = text.find(stop[0], max(0, len(text) - len(stop) + 1), first)
            while start >= 0:
                if stop.startswith(text[start:]):
                    first = start
                    break
                start = text.find(stop[0], start + 1, first)
        return first


def decode_bytes(tokenizer: Tokenizer, token_ids: Iterable[int]) -> str:
    """Return the text of token ids, control tokens left out."""
    return b"".join(map(tokenizer.token_bytes, token_ids)).decode("utf-8", "replace")


def prompt_offsets(tokenizer: Tokenizer, token_ids: Sequence[int], text: str) -> list[int]:
    """Return where each prompt token starts in the prompt's text, in characters."""
    decoder = _utf8_decoder("replace")
    offsets, num_chars, parts = [], 0, []
    for token_id in token_ids:
        offsets.append(num_chars)
        parts.append(decoder.decode(tokenizer.token_bytes(token_id)))
        num_chars += len(parts[-1])
    spelled, skipped = "".join(parts), 0
    if text.endswith(spelled):  # of a long text only the end may have been kept
        skipped = len(text) - len(spelled)
    elif spelled == " " + text:  # some tokenizers put a space before the text that they encode
        skipped = -1
    return [min(max(0, offset + skipped), len(text)) for offset in offsets]
