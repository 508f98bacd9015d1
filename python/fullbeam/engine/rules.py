# SPDX-License-Identifier: Apache-2.0
"""What a text may and must do next, as sets of tokens, for search and for drawing alike.

A set of tokens is a mask: uint32 [ceil(vocab_size / 32)], bit i of word w is token 32 w + i.
Everything is exact on bytes: a token is judged by the bytes it adds, wherever they fall in
characters. Masks are shared and read-only; those used last are kept, so that a step costs look-ups.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fullbeam.engine.sorted_tokens import OTHER, WORD, Int64Array, SortedTokens, is_word
from fullbeam.engine.text import Tokenizer

Mask = npt.NDArray[np.uint32]

_MAX_MASKS = 256  # kept; 32 KiB each for Gemma's vocabulary


class TokenIndex:
    """The tokens of a vocabulary by their bytes, built when first needed.

    Control tokens have no bytes: they are in no mask but those that name their ids.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.num_words = -(-vocab_size // 32)
        self._tokens: SortedTokens | None = None
        self._lock = threading.Lock()
        self._masks: dict[Hashable, Mask] = {}  # least recently used first

    @property
    def tokens(self) -> SortedTokens:
        """All tokens in the order of their bytes."""
        with self._lock:
            if self._tokens is None:
                self._tokens = SortedTokens(self.tokenizer.all_token_bytes()[: self.vocab_size])
            return self._tokens

    def build(self) -> None:
        """Build now what the first look-up would have to wait for."""
        assert self._characters is not None

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of a token, b"" also for those that only the model has."""
        known = token_id < self.tokenizer.vocab_size
        return self.tokenizer.token_bytes(token_id) if known else b""

    def healed_len(self, tail: bytes) -> int:
        """Return how many bytes at the end of a text are to be chosen anew.

        That is the longest end of the last line that some token starts with; none of it where no
        longer token starts with it, for then it is a whole token as it stands. Characters stay
        whole.
        """
        tokens = self.tokens
        line = tail[max(0, len(tail) - tokens.longest) :]
        line = line[line.rfind(b"\n") + 1 :]
        for start in range(len(line)):
            if line[start] & 0xC0 == 0x80:  # inside a character
                continue
            size = len(line) - start
            low, high = tokens.starting(line[start:])
            if low < high:
                return size if tokens.length(high - 1) > size else 0
        return 0

    def ids_mask(self, ids: Iterable[int]) -> Mask:
        """Return the set of these tokens."""
        wanted = frozenset(ids)
        return self.cached(("ids", wanted), lambda: self._pack(np.array([*wanted], np.int64)))

    def allowed_mask(self, rest: bytes) -> Mask:
        """Return the tokens with which a text can go on that has to start with `rest`.

        Those that start with `rest`, and those that `rest` starts with, if tokens can spell what
        is left of it.
        """
        return self.cached(("allowed", rest), lambda: self._allowed(rest))

    def starting_mask(self, head: bytes) -> Mask:
        """Return the tokens that start with `head`."""
        return self.cached(
            ("starting", head), lambda: self._pack_places(np.arange(*self.tokens.starting(head)))
        )

    def containing_mask(self, text: bytes, head: bytes = b"") -> Mask:
        """Return the tokens that start with `head` and have `text` behind it."""
        return self.cached(
            ("containing", text, head),
            lambda: self._pack_places(self.tokens.containing(text, head)),
        )

    def mixing_mask(self, word: int, head: bytes = b"") -> Mask:
        """Return the tokens that start with `head` and, behind it, bring what `word` lacks.

        `word` says which characters there are already, as in `State`; after them and those of the
        token, there are both kinds.
        """

        def build() -> Mask:
            low, bits = self._characters if head == b"" else self.tokens.characters(head)
            return self._pack_places(low + np.flatnonzero(bits | word == WORD | OTHER))

        return self.cached(("mixing", word, head), build)

    def all_mask(self) -> Mask:
        """Return the set of all tokens, control tokens included."""
        return self.cached("all", lambda: self._pack(np.arange(self.vocab_size)))

    def cached(self, key: Hashable, build: Callable[[], Mask]) -> Mask:
        """Return the mask of a key, built where it is not among those used last."""
        with self._lock:  # not while building: two threads may build the same
            mask = self._masks.pop(key, None)
            if mask is not None:
                self._masks[key] = mask
                return mask
        mask = build()
        mask.setflags(write=False)
        with self._lock:
            if len(self._masks) >= _MAX_MASKS:
                del self._masks[next(iter(self._masks))]
            self._masks[key] = mask
        return mask

    @cached_property
    def _characters(self) -> tuple[int, npt.NDArray[np.uint8]]:
        return self.tokens.characters(b"")

    def _allowed(self, rest: bytes) -> Mask:
        tokens = self.tokens
        can = tokens.spellable(rest)
        parts = [np.zeros(0, np.int64)]
        for size, low, high in tokens.walk(rest):
            if size < len(rest):
                high = tokens.whole(size, low, high)
            if can[size]:
                parts.append(np.arange(low, high))
        return self._pack_places(np.concatenate(parts))

    def _pack_places(self, places: Int64Array) -> Mask:
        return self._pack(self.tokens.ids[places])

    def _pack(self, ids: npt.NDArray[np.integer]) -> Mask:
        flags = np.zeros(32 * self.num_words, np.bool_)
        flags[ids] = True
        return np.packbits(flags, bitorder="little").view("<u4").astype(np.uint32, copy=False)


class State(NamedTuple):
    """What the rules have to know of a text."""

    rest: bytes
    """Of the constraint: bytes still to come."""
    word: int = 0
    """ONE_TOKEN: whether there are word characters (bit 0) and others (bit 1) behind the
    constraint."""
    matched: tuple[int, ...] = ()
    """Of each stop string, then each bad word: how many of its first bytes the text ends with."""


class Rules:
    """What the continuation of a prompt is held to, and where it ends.

    Parameters
    ----------
    index
        The vocabulary.
    end_ids
        Tokens that end the text in every state: end of text and stop tokens.
    mode
        "FULL_LINE": a line break ends the text. "ONE_TOKEN": so does a text with word characters
        (Unicode's letters and digits, and the underscore) as well as others. A byte that is not
        part of a whole character within its token counts as a word character. None: neither.
    stop_strings
        Texts that end the text where they are complete, also over several tokens.
    bad_words
        Texts that must not appear: the tokens that would complete one are banned.
    banned_ids, allowed_ids
        Tokens that are never allowed; the only ones that are, where there are any.
    min_tokens
        Number of tokens before which `end_ids` are banned.
    constraint
        What the text has to start with: the healed end of the prompt, then what the user typed.
        Line breaks, words, stop strings and bad words count behind it only.
    """

    def __init__(
        self,
        index: TokenIndex,
        *,
        end_ids: frozenset[int],
        mode: str | None = None,
        stop_strings: tuple[str, ...] = (),
        bad_words: tuple[str, ...] = (),
        banned_ids: frozenset[int] = frozenset(),
        allowed_ids: frozenset[int] = frozenset(),
        min_tokens: int = 0,
        constraint: bytes = b"",
    ) -> None:
        self._index = index
        self._end_ids = end_ids
        self._mode = mode
        self._stops = [_Pattern(text) for text in stop_strings]
        self._bad = [_Pattern(text) for text in bad_words]
        self._banned_ids = banned_ids
        self._allowed_ids = allowed_ids
        self._min_tokens = min_tokens if end_ids else 0
        self._constraint = constraint
        self._tracks = mode == "ONE_TOKEN" or bool(stop_strings or bad_words)
        self._end_key = (end_ids, mode, stop_strings)
        self._ban_key = (bad_words, banned_ids, allowed_ids)
        self._has_bans = bool(bad_words or banned_ids or allowed_ids)

    @property
    def is_trivial(self) -> bool:
        """Whether every token is always allowed, so that drawing needs neither state nor mask."""
        return not (self._constraint or self._has_bans or self._min_tokens)

    def start(self) -> State:
        """Return the state before the first token."""
        return State(self._constraint, 0, (0,) * (len(self._stops) + len(self._bad)))

    def advance(self, state: State, token_id: int) -> State:
        """Return the state after one more token, which has to be allowed."""
        rest = state.rest
        if not rest and not self._tracks:
            return state
        data = self._index.token_bytes(token_id)
        if len(data) < len(rest):
            assert rest.startswith(data)
            return state._replace(rest=rest[len(data) :])
        assert data.startswith(rest)
        data = data[len(rest) :]
        word = state.word | _bits(data) if self._mode == "ONE_TOKEN" else 0
        patterns = (*self._stops, *self._bad)
        matched = zip(patterns, state.matched, strict=True)
        return State(b"", word, tuple(pattern.advance(size, data) for pattern, size in matched))

    def allowed(self, state: State, num_generated: int) -> Mask | None:
        """Return the tokens that may come next; None where all may.

        A hypothesis for which the mask is empty cannot go on.
        """
        is_early = num_generated < self._min_tokens
        if not (state.rest or self._has_bans or is_early):
            return None
        matched = state.matched[len(self._stops) :]
        ends = self._end_ids if is_early else frozenset()
        key = ("may", self._ban_key, ends, state.rest, matched)

        def build() -> Mask:
            index, rest = self._index, state.rest
            mask = index.allowed_mask(rest) if rest else index.all_mask()
            if self._allowed_ids:
                mask = mask & index.ids_mask(self._allowed_ids)
            mask = mask & ~index.ids_mask(self._banned_ids | ends)
            for pattern, size in zip(self._bad, matched, strict=True):
                mask &= ~pattern.completions(index, size, rest)
            return mask

        return self._index.cached(key, build)

    def terminators(self, state: State) -> Mask | None:
        """Return the tokens with which the text ends; None where no token ends it."""
        if not (self._end_ids or self._mode or self._stops):
            return None
        matched = state.matched[: len(self._stops)]
        key = ("end", self._end_key, state.rest, state.word, matched)

        def build() -> Mask:
            index, rest = self._index, state.rest
            mask = index.ids_mask(self._end_ids).copy()
            if self._mode is not None:
                mask |= index.containing_mask(b"\n", rest)
            if self._mode == "ONE_TOKEN":
                mask |= index.mixing_mask(state.word, rest)
            for pattern, size in zip(self._stops, matched, strict=True):
                mask |= pattern.completions(index, size, rest)
            return mask

        return self._index.cached(key, build)


class _Pattern:
    """A text to be found in a stream of bytes (Knuth, Morris and Pratt)."""

    def __init__(self, text: str) -> None:
        self.data = data = text.encode("utf-8", "surrogatepass")  # a lone one is in no text
        # [i]: how many of the first bytes the first i bytes end with, fewer than i
        self._borders = [0, 0]
        size = 0
        for byte in data[1:]:
            size = self._step(size, byte)
            self._borders.append(size)

    def advance(self, size: int, data: bytes) -> int:
        """Return how many of the first bytes match after `data`, where `size` matched before."""
        for byte in data:
            if size == len(self.data):
                size = self._borders[size]
            size = self._step(size, byte)
        return size

    def completions(self, index: TokenIndex, size: int, head: bytes) -> Mask:
        """Return the tokens that complete the text, where `size` bytes match and `head`, of which
        nothing counts, comes first."""
        mask = index.containing_mask(self.data, head)
        while size > 0:  # every beginning of the text that what is there ends with
            if size < len(self.data):
                mask = mask | index.starting_mask(self.data[size:])
            size = self._borders[size]
        return mask

    def _step(self, size: int, byte: int) -> int:
        while size > 0 and self.data[size] != byte:
            size = self._borders[size]
        return size + (self.data[size] == byte)


def has_token(mask: Mask | None, token_id: int) -> bool:
    """Return whether a set of tokens, None for all of them, has this one."""
    return mask is None or bool(mask[token_id // 32] >> np.uint32(token_id % 32) & np.uint32(1))


def _bits(data: bytes) -> int:
    """What characters there are: bits WORD and OTHER."""
    bits = 0
    for char in data.decode("utf-8", "surrogateescape"):
        bits |= WORD if is_word(char) else OTHER
    return bits
