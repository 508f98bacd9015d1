# SPDX-License-Identifier: Apache-2.0
"""Both kinds of merging against the algorithms as their papers state them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fullbeam.models import sentencepiece
from fullbeam.models.gguf import GgufFile
from fullbeam.models.tokenizer import Tokenizer
from fullbeam.models.vocabulary import NORMAL

OpenGguf = Callable[..., GgufFile]
Metadata = Callable[..., dict[str, Any]]

SPACE = "\u2581"
LETTERS = ["a", "b", SPACE, "ab", SPACE + "a"]
LETTER_SCORES = [-10.0, -11.0, -12.0, -1.0, -2.0]


def slow_sentencepiece(text: str, scores: dict[str, float]) -> list[str]:
    """Join the neighbours whose piece scores highest, the leftmost among equals, until none is."""
    parts = list(text)
    while True:
        joined = [a + b for a, b in pairwise(parts)]
        best = max((piece for piece in joined if piece in scores), key=scores.get, default=None)  # type: ignore[arg-type]
        if best is None:
            return parts
        at = joined.index(best)
        parts[at : at + 2] = [best]


ALPHABET = "ab\u2581é中"


@st.composite
def piece_lists(draw: st.DrawFn) -> tuple[list[str], list[float]]:
    pieces = draw(st.lists(st.text(ALPHABET, min_size=2, max_size=6), unique=True, max_size=40))
    order = draw(st.permutations(range(len(pieces))))
    return list(ALPHABET) + pieces, [-1e4] * len(ALPHABET) + [-float(rank) for rank in order]


@settings(max_examples=150, deadline=None)
@given(
    vocabulary=piece_lists(),
    texts=st.lists(st.text("ab é中\u2581x\n😀", max_size=30), min_size=1, max_size=5),
    prefix=st.booleans(),
)
def test_sentencepiece_is_the_score_loop(
    open_gguf: OpenGguf,
    tiny_llama: Metadata,
    vocabulary: tuple[list[str], list[float]],
    texts: list[str],
    prefix: bool,
) -> None:
    pieces, scores = vocabulary
    tokenizer = Tokenizer.from_gguf(open_gguf(tiny_llama(pieces, scores, add_space_prefix=prefix)))
    score_of = dict(zip(pieces, scores, strict=True))
    id_of = {piece: 259 + i for i, piece in enumerate(pieces)}
    for text in texts:
        spaced = (SPACE if prefix and text else "") + text.replace(" ", SPACE)
        want = [
            token_id
            for part in slow_sentencepiece(spaced, score_of)
            for token_id in ([id_of[part]] if part in id_of else [3 + b for b in part.encode()])
        ]
        assert tokenizer.encode(text, add_special_tokens=False) == want
        assert tokenizer.encode(text) == [1, *want]
        shown = spaced.replace(SPACE, " ")
        assert tokenizer.decode(want) == shown
        assert b"".join(map(tokenizer.token_bytes, want)) == shown.encode()


def slow_bpe(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Apply the merge of the lowest rank, the leftmost first, until none applies."""
    parts = list(word)
    while True:
        pairs = list(pairwise(parts))
        best = min((pair for pair in pairs if pair in ranks), key=ranks.get, default=None)  # type: ignore[arg-type]
        if best is None:
            return parts
        at = pairs.index(best)
        parts[at : at + 2] = ["".join(best)]


def byte_chars() -> list[str]:
    """GPT-2's table, as its authors describe it: printable bytes stand for themselves."""
    chars, extra = [], 256
    for byte in range(256):
        shown = 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174
        chars.append(chr(byte if shown else extra))
        extra += not shown
    return chars


@settings(max_examples=100, deadline=None)
@given(
    picks=st.lists(st.tuples(st.integers(0, 999), st.integers(0, 999)), max_size=40),
    words=st.lists(st.text("abcé中😀", min_size=1, max_size=12), max_size=6),
)
def test_byte_level_is_the_rank_loop(
    open_gguf: OpenGguf, gpt2_metadata: Metadata, picks: list[tuple[int, int]], words: list[str]
) -> None:
    chars = byte_chars()
    used = [chars[byte] for byte in " abcé中😀".encode()]
    ranks: dict[tuple[str, str], int] = {}
    for left, right in picks:
        pair = (used[left % len(used)], used[right % len(used)])
        if pair not in ranks and "".join(pair) not in used:
            ranks[pair] = len(ranks)
            used.append("".join(pair))
    tokens = list(dict.fromkeys([*chars, *used]))
    merges = [" ".join(pair) for pair in ranks]
    metadata = gpt2_metadata(tokens, merges, [NORMAL] * len(tokens), "gpt-2")
    tokenizer = Tokenizer.from_gguf(open_gguf(metadata))
    # GPT-2's pattern cuts before each space, and between letters and others.
    text = " ".join(words)
    cut = [" " * (i > 0) + word for i, word in enumerate(words)]
    pieces = [piece for word in cut for piece in split_emoji(word)]
    want = [
        tokens.index(part)
        for piece in pieces
        for part in slow_bpe("".join(chars[byte] for byte in piece.encode()), ranks)
    ]
    assert tokenizer.encode(text) == want
    assert tokenizer.decode(want) == text


def split_emoji(word: str) -> list[str]:
    """Letters and others apart; a space in front belongs to the first."""
    out: list[str] = []
    for char in word:
        if out and (out[-1] == " " or (out[-1][-1] == "😀") == (char == "😀")):
            out[-1] += char
        else:
            out.append(char)
    return out


def test_merges_are_kept_and_a_damaged_file_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = np.array(LETTER_SCORES, np.float32)
    arguments = (tmp_path / "deep", LETTERS, scores, np.ones(5, bool))
    first = sentencepiece.cached_merges(*arguments)
    assert first.tolist() == [[0, 1], [2, 0]]
    (path,) = (tmp_path / "deep").iterdir()
    good = path.read_bytes()
    for bad in (b"", good[:-1], good[:-8], good[:-1] + b"\xff", b"x" + good, good + bytes(8)):
        path.write_bytes(bad)
        np.testing.assert_array_equal(sentencepiece.cached_merges(*arguments), first)
        assert path.read_bytes() == good
    monkeypatch.setattr(sentencepiece, "merges_from_scores", None)
    np.testing.assert_array_equal(sentencepiece.cached_merges(*arguments), first)


def test_an_unwritable_cache_costs_nothing_but_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    scores = np.array(LETTER_SCORES, np.float32)
    folder = tmp_path / "file" / "tokenizers"
    merges = sentencepiece.cached_merges(folder, LETTERS, scores, np.ones(5, bool))
    assert merges.tolist() == [[0, 1], [2, 0]]
