# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
import threading
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fullbeam.engine.rules import Mask, Rules, TokenIndex
from fullbeam.models.catalog import cache_folder
from fullbeam.models.gguf import GgufFile
from fullbeam.models.tokenizer import Tokenizer

NUM = [b"nu", b"num", b"numpy", b"m", b"\n"]


class Toy:
    """A tokenizer without text to ids."""

    bos_id = None
    eos_ids: frozenset[int] = frozenset()
    infill = None
    backend = SimpleNamespace()

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces
        self.vocab_size = len(pieces)

    def encode(self, text: str, **_: bool) -> list[int]:
        raise NotImplementedError

    def token_bytes(self, token_id: int) -> bytes:
        return self.pieces[token_id]

    def all_token_bytes(self) -> list[bytes]:
        return self.pieces


def index_of(pieces: list[bytes], vocab_size: int | None = None) -> TokenIndex:
    return TokenIndex(Toy(pieces), vocab_size or len(pieces))


def ids_of(mask: Mask) -> set[int]:
    assert mask.dtype == np.uint32
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def texts_of(mask: Mask | None, pieces: list[bytes]) -> set[bytes]:
    assert mask is not None
    return {pieces[i] for i in ids_of(mask)}


# ---- the constraint (2.3)


@pytest.mark.parametrize(
    ("rest", "want"),
    [
        (b"num", {b"nu", b"num", b"numpy"}),
        (b"um", set()),
        (b"m", {b"m"}),
        (b"nump", {b"numpy"}),
        (b"n", {b"nu", b"num", b"numpy"}),
        (b"numpy", {b"numpy"}),
        (b"numpyx", set()),
        (b"mnu", {b"m"}),
    ],
)
def test_the_example_of_the_matcher(rest: bytes, want: set[bytes]) -> None:
    assert texts_of(index_of(NUM).allowed_mask(rest), NUM) == want


def test_a_token_is_not_allowed_where_the_remainder_cannot_be_spelled() -> None:
    pieces = [b"ab", b"a", b"bc", b"b", b"cd"]
    assert texts_of(index_of(pieces).allowed_mask(b"abc"), pieces) == {b"ab", b"a"}
    assert texts_of(index_of(pieces[:4]).allowed_mask(b"abc"), pieces) == {b"a"}


letters = st.sampled_from([b"a", b"b", b"\n", b" ", "é".encode(), b"\xc3", b"\xa9", b"\xff", b"\0"])
pieces_of_letters = st.lists(st.lists(letters, max_size=4).map(b"".join), min_size=1, max_size=40)
texts = st.lists(letters, min_size=1, max_size=6).map(b"".join)


def can_spell(text: bytes, pieces: list[bytes]) -> bool:
    return not text or any(
        piece and (piece.startswith(text) or (text.startswith(piece) and can_spell(rest, pieces)))
        for piece in pieces
        for rest in [text[len(piece) :]]
    )


@given(pieces_of_letters, texts)
def test_allowed_tokens_against_the_definition(pieces: list[bytes], rest: bytes) -> None:
    want = {
        i
        for i, piece in enumerate(pieces)
        if piece
        and (
            piece.startswith(rest)
            or (rest.startswith(piece) and can_spell(rest[len(piece) :], pieces))
        )
    }
    assert ids_of(index_of(pieces).allowed_mask(rest)) == want


@given(pieces_of_letters, texts, st.randoms(use_true_random=False))
def test_every_allowed_path_spells_the_constraint(
    pieces: list[bytes], constraint: bytes, random: Any
) -> None:
    rules = Rules(index_of(pieces), end_ids=frozenset(), constraint=constraint)
    state, text = rules.start(), b""
    while (mask := rules.allowed(state, 0)) is not None:
        choices = sorted(ids_of(mask))
        if not choices:
            assert text == b"", "a path that was allowed came to a dead end"
            assert not can_spell(constraint, pieces)
            return
        token_id = random.choice(choices)
        text += pieces[token_id]
        state = rules.advance(state, token_id)
    assert text.startswith(constraint)
    assert state.rest == b""


# ---- healing (2.2)


@pytest.mark.parametrize(
    ("tail", "want"),
    [
        (b"import num", 3),  # begins numpy
        (b"import numpy", 0),  # a whole token that begins no other
        (b"import nump", 4),
        (b"import x", 0),
        (b"", 0),
        (b"n\n", 0),  # another line
        (b"nu\nm", 0),  # m is whole
        (b"xn", 1),
    ],
)
def test_healing_takes_the_longest_beginning_of_a_token(tail: bytes, want: int) -> None:
    assert index_of(NUM).healed_len(tail) == want


def test_healing_leaves_characters_whole() -> None:
    pieces = [b"\xa9x", "éa".encode()]
    assert index_of(pieces).healed_len("xé".encode()) == 2
    assert index_of(pieces[:1]).healed_len("xé".encode()) == 0


@given(pieces_of_letters, st.text("ab\n é", max_size=8))
def test_healing_against_the_definition(pieces: list[bytes], text: str) -> None:
    line = text[text.rfind("\n") + 1 :]
    ends = [line[start:].encode() for start in range(len(line))]
    found = next((end for end in ends if any(piece.startswith(end) for piece in pieces)), b"")
    begins = any(piece.startswith(found) and piece != found for piece in pieces)
    assert index_of(pieces).healed_len(text.encode()) == (len(found) if begins else 0)


# ---- where a text ends (3.2)


def kinds_of(data: bytes) -> set[int]:
    """Which characters there are: 0 in words, 1 others; of stray bytes, a word."""
    text = re.sub("[\udc80-\udcff]", "_", data.decode("utf-8", "surrogateescape"))
    return {int(re.match(r"\w", char) is None) for char in text}


@settings(max_examples=200)
@given(
    pieces_of_letters,
    st.sampled_from([None, "FULL_LINE", "ONE_TOKEN"]),
    st.lists(st.text("ab\n é", min_size=1, max_size=4), max_size=3, unique=True),
    st.lists(st.text("ab\n é", min_size=1, max_size=4), max_size=2, unique=True),
    st.one_of(st.just(b""), st.text("ab é", max_size=4).map(str.encode)),
    st.data(),
)
def test_ends_and_bans_against_the_whole_text(
    pieces: list[bytes],
    mode: str | None,
    stops: list[str],
    bad: list[str],
    constraint: bytes,
    data: st.DataObject,
) -> None:
    end_ids = frozenset({len(pieces) - 1})
    rules = Rules(
        index_of(pieces),
        end_ids=end_ids,
        mode=mode,
        stop_strings=tuple(stops),
        bad_words=tuple(bad),
        constraint=constraint,
    )
    state, text, seen = rules.start(), b"", set()
    matcher = index_of(pieces)

    def behind(token_id: int) -> bytes:
        return (text + pieces[token_id])[len(constraint) :]

    for _ in range(6):
        rest = constraint[len(text) :]
        fits = ids_of(matcher.allowed_mask(rest)) if rest else set(range(len(pieces)))
        banned = {i for i in fits if any(word.encode() in behind(i) for word in bad)}
        mask = rules.allowed(state, 0)
        assert (set(range(len(pieces))) if mask is None else ids_of(mask)) == fits - banned
        want = set(end_ids & fits)
        for i in fits:
            new = behind(i)
            is_end = any(stop.encode() in new for stop in stops)
            is_end |= mode is not None and b"\n" in new
            is_end |= mode == "ONE_TOKEN" and seen | kinds_of(pieces[i][len(rest) :]) == {0, 1}
            if is_end:
                want.add(i)
        ends = rules.terminators(state)
        assert (set() if ends is None else ids_of(ends) & fits) == want
        choices = sorted(fits - banned - want)
        if not choices:
            return
        token_id = data.draw(st.sampled_from(choices))
        text += pieces[token_id]
        seen |= kinds_of(pieces[token_id][len(rest) :])
        state = rules.advance(state, token_id)
        assert state.rest == constraint[len(text) :]


ONE = [b"foo", b"(", b" bar", b"  ", b"a.b", "é".encode(), b"\xc3", b"\n", b"_1", "€".encode()]


@pytest.mark.parametrize(
    ("before", "want"),
    [
        ([], {b" bar", b"a.b", b"\n"}),
        ([b"foo"], {b"(", b" bar", b"  ", b"a.b", b"\n", "€".encode()}),
        ([b"\xc3"], {b"(", b" bar", b"  ", b"a.b", b"\n", "€".encode()}),
        ([b"("], {b"foo", b" bar", b"a.b", "é".encode(), b"\xc3", b"_1", b"\n"}),
        ([b"(", b"  "], {b"foo", b" bar", b"a.b", "é".encode(), b"\xc3", b"_1", b"\n"}),
    ],
)
def test_one_token_ends_where_words_and_others_mix(before: list[bytes], want: set[bytes]) -> None:
    rules = Rules(index_of(ONE), end_ids=frozenset(), mode="ONE_TOKEN")
    state = rules.start()
    for piece in before:
        state = rules.advance(state, ONE.index(piece))
    assert texts_of(rules.terminators(state), ONE) == want


def test_one_token_counts_behind_the_constraint() -> None:
    pieces = [b" (", b" (a", b" (a)", b" ", b"("]
    rules = Rules(index_of(pieces), end_ids=frozenset(), mode="ONE_TOKEN", constraint=b" (")
    assert texts_of(rules.terminators(rules.start()), pieces) == {b" (a)"}
    state = rules.advance(rules.start(), 1)
    assert (state.rest, state.word) == (b"", 1)


def test_a_line_break_ends_the_token_that_completes_the_constraint() -> None:
    pieces = [b"a\n", b"a", b"a\nb", b"\na", b"\n"]
    rules = Rules(index_of(pieces), end_ids=frozenset(), mode="FULL_LINE", constraint=b"\na")
    assert texts_of(rules.allowed(rules.start(), 0), pieces) == {b"\na", b"\n"}
    assert texts_of(rules.terminators(rules.start()), pieces) == set()
    state = rules.advance(rules.start(), 4)
    assert texts_of(rules.allowed(state, 1), pieces) == {b"a\n", b"a", b"a\nb"}
    assert texts_of(rules.terminators(state), pieces) == {b"a\n", b"a\nb"}


def test_the_example_with_a_prefix_ends_as_it_should() -> None:
    for mode in ("FULL_LINE", "ONE_TOKEN"):
        rules = Rules(index_of(NUM), end_ids=frozenset({4}), mode=mode, constraint=b"num")
        state = rules.advance(rules.start(), NUM.index(b"numpy"))
        assert rules.allowed(state, 1) is None
        assert texts_of(rules.terminators(state), NUM) == {b"\n"}


def test_a_stop_string_over_several_tokens() -> None:
    pieces = [b"aab", b"a", b"b", b"c", b"xaabacx", b"bac", b"abac"]
    rules = Rules(index_of(pieces), end_ids=frozenset(), stop_strings=("aabac",))
    state = rules.start()
    for piece in (b"a", b"aab"):  # aaab: the match starts at the second letter
        state = rules.advance(state, pieces.index(piece))
    state = rules.advance(state, pieces.index(b"a"))
    assert state.matched == (4,)
    assert texts_of(rules.terminators(state), pieces) == {b"c", b"xaabacx", b"abac"}


def test_a_stop_string_inside_a_token_is_left_behind() -> None:
    pieces = [b"-aba-", b"xab", b"a"]
    rules = Rules(index_of(pieces), end_ids=frozenset(), stop_strings=("aba",))
    assert rules.advance(rules.start(), 0).matched == (0,)
    state = rules.advance(rules.advance(rules.start(), 1), 2)
    assert state.matched == (3,)
    assert rules.advance(state, 1).matched == (2,)


# ---- bans


def test_early_ends_are_banned() -> None:
    rules = Rules(index_of(NUM), end_ids=frozenset({4}), min_tokens=2)
    for count, want in ((0, {0, 1, 2, 3}), (1, {0, 1, 2, 3})):
        mask = rules.allowed(rules.start(), count)
        assert mask is not None
        assert ids_of(mask) == want
    assert rules.allowed(rules.start(), 2) is None
    assert not rules.is_trivial


def test_listed_and_banned_tokens() -> None:
    rules = Rules(
        index_of(NUM, 40),
        end_ids=frozenset({4}),
        allowed_ids=frozenset({0, 2, 4, 39}),
        banned_ids=frozenset({2}),
    )
    mask = rules.allowed(rules.start(), 0)
    assert mask is not None
    assert ids_of(mask) == {0, 4, 39}
    banned = Rules(index_of(NUM, 40), end_ids=frozenset(), banned_ids=frozenset({1}))
    mask = banned.allowed(banned.start(), 0)
    assert mask is not None
    assert ids_of(mask) == set(range(40)) - {1}


def test_a_bad_word_bans_the_token_that_completes_it() -> None:
    pieces = [b"foo", b" b", b"ar", b"arm", b"x", b"-foo bar-"]
    rules = Rules(index_of(pieces), end_ids=frozenset(), bad_words=("foo bar",))
    state = rules.advance(rules.advance(rules.start(), 0), 1)
    assert texts_of(rules.allowed(state, 2), pieces) == {b"foo", b" b", b"x"}
    assert texts_of(rules.allowed(rules.start(), 0), pieces) == set(pieces) - {b"-foo bar-"}


def test_free_text_needs_no_masks() -> None:
    rules = Rules(index_of(NUM), end_ids=frozenset())
    assert rules.is_trivial
    state = rules.start()
    assert rules.allowed(state, 0) is None
    assert rules.terminators(state) is None
    assert rules.advance(state, 1) is state
    assert Rules(index_of(NUM), end_ids=frozenset(), min_tokens=3).is_trivial


def test_masks_are_shared_and_read_only() -> None:
    index = index_of(NUM)
    first, second = (
        Rules(index, end_ids=frozenset({4}), mode="FULL_LINE", constraint=text)
        for text in (b"num", b"nunum")
    )
    later = second.advance(second.start(), 0)
    assert first.allowed(first.start(), 0) is second.allowed(later, 1)
    assert first.terminators(first.start()) is second.terminators(later)
    mask = first.allowed(first.start(), 0)
    assert mask is not None
    with pytest.raises(ValueError, match="read-only"):
        mask[0] = 0


def test_masks_from_several_threads() -> None:
    index = index_of([bytes((byte,)) for byte in range(256)])
    want = {text: {text[0]} for text in (b"%d" % i for i in range(600))}
    wrong: list[bytes] = []

    def look() -> None:
        for text, ids in want.items():
            if ids_of(index.allowed_mask(text)) != ids:
                wrong.append(text)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_tokens_that_only_the_model_has_spell_nothing() -> None:
    index = index_of(NUM, 70)
    assert index.allowed_mask(b"nu").shape == (3,)
    rules = Rules(index, end_ids=frozenset(), mode="ONE_TOKEN")
    assert rules.advance(rules.start(), 69).word == 0


# ---- real vocabularies


@cache
def real_index(name: str) -> TokenIndex:
    path = cache_folder() / name
    if not path.exists():
        pytest.skip(f"{name} is not in the cache folder")
    with GgufFile.open(path) as file:
        tokenizer = Tokenizer.from_gguf(file)
    return TokenIndex(tokenizer, tokenizer.vocab_size)


REAL = ["gemma-3-270m-q4_k_m.gguf", "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"]


@pytest.mark.parametrize("name", REAL)
def test_real_masks_against_the_texts_of_all_tokens(name: str) -> None:
    index = real_index(name)
    pieces = index.tokenizer.all_token_bytes()
    assert pieces[::97] == [index.token_bytes(i) for i in range(0, len(pieces), 97)]
    for rest in (b" ", b" import num", "日本".encode(), b"\xe6", b"\x00", b"    "):
        want = {i for i, t in enumerate(pieces) if t and (t.startswith(rest) or rest.startswith(t))}
        assert ids_of(index.allowed_mask(rest)) == want
    want = {i for i, text in enumerate(pieces) if b"\n" in text}
    assert ids_of(index.containing_mask(b"\n")) == want
    some = range(0, len(pieces), 7)
    for head in (b"", b" "):
        tails = {i: pieces[i][len(head) :] for i in some if pieces[i].startswith(head)}
        want = {i for i, tail in tails.items() if 1 in kinds_of(tail)}
        assert ids_of(index.mixing_mask(1, head)) & set(some) == want


@pytest.mark.parametrize("name", REAL)
def test_real_vocabularies_heal_what_they_should(name: str) -> None:
    index = real_index(name)
    assert index.healed_len(b"import num") == 4
    assert index.healed_len(b"import num\n") == 0
    assert index.healed_len(b"x = ") >= 1
    rules = Rules(index, end_ids=frozenset(), mode="FULL_LINE", constraint=b" num")
    ids = index.tokenizer.encode(" numpy as np", add_special_tokens=False)
    mask = rules.allowed(rules.start(), 0)
    assert mask is not None
    assert ids[0] in ids_of(mask)
    assert rules.advance(rules.start(), ids[0]).rest == b""
