# SPDX-License-Identifier: Apache-2.0
"""The tokens of a vocabulary in the order of their bytes, and what can be asked of them fast."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]

WORD, OTHER = 1, 2  # which characters there are: bits


class SortedTokens:
    """All tokens that have text, in the order of their bytes; a *place* is an index into them."""

    def __init__(self, texts: list[bytes]) -> None:
        order = np.array(sorted(range(len(texts)), key=texts.__getitem__), np.int32)
        lengths = np.fromiter(map(len, texts), np.int64, len(texts))
        given_starts = np.cumsum(lengths) - lengths
        order = order[np.count_nonzero(lengths == 0) :]  # those without text come first
        lengths = lengths[order]
        self.num_tokens = len(order)
        self.longest = int(lengths.max(initial=0))
        self.ids = order  # int32 [num_tokens]
        self.starts = np.zeros(len(order) + 1, np.int64)  # of each token in raw, and the end
        np.cumsum(lengths, out=self.starts[1:])
        # Copied by NumPy: a walk over 262144 objects in this order waits for memory.
        places = np.repeat(given_starts[order] - self.starts[:-1], lengths)
        places += np.arange(len(places))
        self.raw = np.frombuffer(b"".join(texts), np.uint8)[places]
        self.data = self.raw.tobytes()
        self._starts: memoryview = self.starts.data  # gives plain ints
        self._places = range(self.num_tokens)
        self.has_every_byte = len(np.unique(self.raw[self.starts[:-1][lengths == 1]])) == 256

    def length(self, place: int) -> int:
        """Number of bytes of a token."""
        return self._starts[place + 1] - self._starts[place]

    def whole(self, size: int, low: int, high: int) -> int:
        """Return where, of tokens that start with the same `size` bytes, those with more begin."""
        return bisect_left(self._places, True, low, high, key=lambda i: self.length(i) > size)

    def starting(self, head: bytes, low: int = 0, high: int | None = None) -> tuple[int, int]:
        """Return the first place of the tokens that start with `head`, and the place after them."""
        data, starts, size = self.data, self._starts, len(head)

        def beginning(place: int) -> bytes:
            start = starts[place]
            return data[start : min(start + size, starts[place + 1])]

        low = bisect_left(self._places, head, low, high, key=beginning)
        return low, bisect_right(self._places, head, low, high, key=beginning)

    def walk(self, text: bytes) -> Iterator[tuple[int, int, int]]:
        """Yield (size, low, high) for each beginning of `text` that tokens in places low..high
        start with; of these, the tokens that are the beginning itself come first."""
        low, high = 0, self.num_tokens
        for size in range(1, len(text) + 1):
            low, high = self.starting(text[:size], low, high)
            if low == high:
                return
            yield size, low, high

    def spellable(self, text: bytes) -> list[bool]:
        """Return for each i in 0..len(text) whether tokens can spell text[i:], the last of them
        perhaps with more behind it."""
        size = len(text)
        if self.has_every_byte:
            return [True] * (size + 1)
        can = [False] * size + [True]
        for start in reversed(range(size)):
            can[start] = any(
                start + length == size or (self.length(low) == length and can[start + length])
                for length, low, _ in self.walk(text[start:])
            )
        return can

    def containing(self, text: bytes, head: bytes) -> Int64Array:
        """Return the places of tokens that start with `head` and have `text` behind it."""
        low, high = self.starting(head)
        starts = self.starts[low : high + 1]
        raw = self.raw[: starts[-1]]
        found = np.flatnonzero(raw[starts[0] :] == text[0]) + starts[0]
        for i, byte in enumerate(text[1:], 1):
            found = found[found + i < len(raw)]
            found = found[raw[found + i] == byte]
        owners = np.searchsorted(starts, found, side="right") - 1
        inside = (found >= starts[owners] + len(head)) & (found + len(text) <= starts[owners + 1])
        return low + np.unique(owners[inside])

    def characters(self, head: bytes) -> tuple[int, npt.NDArray[np.uint8]]:
        """Return the first place of the tokens that start with `head`, and for each of them what
        follows `head`: the bits WORD and OTHER."""
        low, high = self.starting(head)
        starts = self.starts[low : high + 1]
        raw = self.raw[starts[0] : starts[-1]].copy()
        starts = starts - starts[0]
        raw[raw == 0] = 1  # no word character either; 0 is about to stand before each token
        lengths = np.diff(starts)
        behind = np.arange(len(raw)) - np.repeat(starts[:-1], lengths) >= len(head)
        raw = raw[behind]
        starts[1:] = np.cumsum(lengths - len(head))
        text = np.insert(raw, starts[:-1], 0).tobytes().decode("utf-8", "surrogateescape")
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        owners = np.cumsum(points == 0) - 1
        in_words = np.zeros(0x110000, np.bool_)
        for point in np.flatnonzero(np.bincount(points, minlength=1)).tolist():
            in_words[point] = is_word(chr(point))
        bits = np.zeros(high - low, np.uint8)
        bits[owners[in_words[points]]] |= WORD
        bits[owners[~in_words[points] & (points != 0)]] |= OTHER
        return low, bits


def is_word(char: str) -> bool:
    """Whether a character, decoded with "surrogateescape", belongs to words; stray bytes do."""
    return char.isalnum() or char == "_" or "\udc80" <= char <= "\udcff"
