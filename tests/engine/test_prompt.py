# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fake_model
from fullbeam.engine.prompt import crop_start, encode_infill, encode_prompt, heal
from fullbeam.engine.rules import Rules, TokenIndex
from fullbeam.models.catalog import cache_folder
from fullbeam.models.gguf import GgufFile
from fullbeam.models.tokenizer import Tokenizer
from fullbeam.models.vocabulary import InfillTokens

FAKE = fake_model.FakeTokenizer()
SIZE = fake_model.VOCAB_SIZE
BOS = fake_model.BOS
GEMMA = "gemma-3-270m-q4_k_m.gguf"
QWEN = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"


@cache
def real_tokenizer(name: str) -> Tokenizer:
    path = cache_folder() / name
    if not path.exists():
        pytest.skip(f"{name} is not in the cache folder")
    with GgufFile.open(path) as file:
        return Tokenizer.from_gguf(file)


@cache
def real_index(name: str) -> TokenIndex:
    tokenizer = real_tokenizer(name)
    return TokenIndex(tokenizer, tokenizer.vocab_size)


def count(text: str) -> int:
    return len(FAKE.encode(text, add_special_tokens=False))


# ---- plain prompts


def test_a_start_token_is_put_in_front_unless_left_out() -> None:
    assert encode_prompt(FAKE, SIZE, "a").tolist() == [BOS, 2]
    assert encode_prompt(FAKE, SIZE, "a", add_special_tokens=False).tolist() == [2]
    assert encode_prompt(FAKE, SIZE, "", add_special_tokens=False).tolist() == [BOS]
    assert encode_prompt(FAKE, SIZE, None).tolist() == [BOS]


def test_ids_are_kept_from_the_end() -> None:
    assert encode_prompt(FAKE, SIZE, [2, 3, 4], max_tokens=2).tolist() == [3, 4]
    assert encode_prompt(FAKE, SIZE, [2, 3, 4], max_tokens=3).tolist() == [2, 3, 4]


# ---- healing (2.2)


def fake_heal(prompt: str, prefix: str = "") -> tuple[str, bytes]:
    return heal(prompt, prefix, TokenIndex(FAKE, SIZE))


@pytest.mark.parametrize(
    ("prompt", "prefix", "want"),
    [
        ("ddab", "", ("dd", b"ab")),  # begins abc
        ("ddab", "c", ("ddab", b"c")),  # abc is whole: the boundary is the start of the prefix
        ("dda", "b", ("dd", b"ab")),  # begins before the prefix
        ("dd", "ab", ("dd", b"ab")),  # begins with the prefix
        ("dd", "xab", ("dd", b"xab")),  # begins inside it
        ("dd\n", "", ("dd\n", b"")),
        ("dd ", "", ("dd", b" ")),
        ("a\n", "b", ("a\n", b"b")),
        ("", "", ("", b"")),
        ("ab", "", ("", b"ab")),
    ],
)
def test_the_boundary_is_the_earlier_start(
    prompt: str, prefix: str, want: tuple[str, bytes]
) -> None:
    assert fake_heal(prompt, prefix) == want


def test_characters_stay_whole() -> None:
    assert fake_heal("a\u20ac") == ("a\u20ac", b"")  # its last byte begins a token, alone
    assert fake_heal("aé") == ("aé", b"")


@given(st.text("abcd \né日", max_size=12), st.text("abcd é", max_size=4))
def test_context_and_constraint_make_up_the_text(prompt: str, prefix: str) -> None:
    context, constraint = fake_heal(prompt, prefix)
    assert context.encode() + constraint == (prompt + prefix).encode()
    assert constraint.endswith(prefix.encode())
    healed = constraint[: len(constraint) - len(prefix.encode())]
    assert b"\n" not in healed
    if healed:
        assert any(p.startswith(constraint) and p != constraint for p in fake_model.PIECES)


@pytest.mark.parametrize("name", [GEMMA, QWEN])
def test_real_prompts_heal_into_tokens_that_spell_them(name: str) -> None:
    index = real_index(name)
    assert heal("import num", "", index) == ("import", b" num")
    assert heal("import ", "num", index) == ("import", b" num")
    assert heal("def f(x):\n", "", index) == ("def f(x):\n", b"")
    context, constraint = heal("x = np.arr", "", index)
    assert context.encode() + constraint == b"x = np.arr"
    rules = Rules(index, end_ids=frozenset(), constraint=constraint)
    mask = rules.allowed(rules.start(), 0)
    assert mask is not None
    assert mask.any()


@pytest.mark.parametrize(
    ("name", "mark"), [(GEMMA, "<end_of_turn>"), (QWEN, "<|im_end|>"), (QWEN, "<|fim_middle|>")]
)
def test_control_tokens_stay_whole(name: str, mark: str) -> None:
    index = real_index(name)
    assert heal(f"a{mark}", "", index) == (f"a{mark}", b"")
    assert heal(f"a{mark} num", "", index) == (f"a{mark}", b" num")
    assert heal(f"a{mark}", "num", index) == (f"a{mark}", b"num")


# ---- cropping (2.1)


def start_of(text: str, max_tokens: int) -> int:
    return crop_start(text, max_tokens, count)


def test_what_fits_is_not_cropped() -> None:
    text = "dd dd\n" * 3
    assert start_of(text, count(text)) == 0
    assert start_of(text, count(text) - 1) > 0
    assert start_of("", 0) == 0


lines = st.lists(st.text("abcd ", max_size=12), max_size=30).map("\n".join)


@given(lines, st.integers(0, 60))
def test_a_crop_starts_at_a_line_and_fits(text: str, max_tokens: int) -> None:
    start = start_of(text, max_tokens)
    assert start == 0 or text[start - 1] == "\n"
    last = text.rfind("\n") + 1
    assert count(text[start:]) <= max_tokens or start == last
    if start > 0:
        # No more than half of what would fit goes to the grid.
        first = min(i for i in line_starts(text) if fits(text[i:], max_tokens) or i == last)
        assert first <= start <= (first + len(text)) / 2 or start == first


def line_starts(text: str) -> list[int]:
    return [0, *(i + 1 for i, char in enumerate(text) if char == "\n")]


def fits(text: str, max_tokens: int, count: Callable[[str], int] = count) -> bool:
    """Whether it does line by line, with room kept for the last one."""
    *complete, last = text.split("\n")
    total = sum(count(line + "\n") for line in complete)
    return total + max(count(last), min(64, max_tokens // 8)) <= max_tokens


def count_pairs(text: str) -> int:
    return -(-len(text) // 2)


@settings(max_examples=20)
@given(st.lists(st.integers(3, 9).map("a".__mul__), min_size=40, max_size=70), st.integers(80, 120))
def test_the_start_holds_still_while_typing(typed: list[str], max_tokens: int) -> None:
    whole, start = "\n".join(typed), 0
    for end in range(len(whole) + 1):
        text = whole[:end]
        new = crop_start(text, max_tokens, count_pairs)
        if new != start:
            assert new > start
            assert not fits(text[start:], max_tokens, count_pairs), "moved without need"
        start = new


def test_the_start_moves_by_half_a_budget_of_characters() -> None:
    text, starts = "dd dd\n" * 200, []
    for end in range(len(text)):
        start = start_of(text[:end], 60)  # a line has six characters, four tokens
        if not starts or starts[-1] != start:
            starts.append(start)
    moves = [new - old for old, new in pairwise(starts[1:])]
    assert set(moves) == {30}


def test_a_line_that_is_too_long_is_cut_by_tokens() -> None:
    ids = encode_prompt(FAKE, SIZE, "dcb\n" + "dcb" * 9, max_tokens=5).tolist()
    assert ids == [BOS, 3, 5, 4, 3]
    ids = encode_prompt(FAKE, SIZE, "dcb", add_special_tokens=False, max_tokens=2).tolist()
    assert ids == [4, 3]
    assert encode_prompt(FAKE, SIZE, "dcb", max_tokens=1).tolist() == [BOS]


@pytest.mark.parametrize("name", [GEMMA, QWEN])
def test_typing_code_moves_the_start_of_real_prompts_rarely(name: str) -> None:
    tokenizer = real_tokenizer(name)
    code = Path(__file__).read_text(encoding="utf-8")[:6000]
    previous: list[int] = []
    num_new = 0
    for end in range(3000, len(code), 7):
        ids = encode_prompt(tokenizer, tokenizer.vocab_size, code[:end], max_tokens=400).tolist()
        assert len(ids) <= 400
        assert len(ids) >= 200
        shared = next(
            (i for i, (a, b) in enumerate(zip(previous, ids, strict=False)) if a != b),
            min(len(previous), len(ids)),
        )
        num_new += shared < len(ids) - 16
        previous = ids
    assert 3 <= num_new <= 3000 / 200 + 2


# ---- infill (5.6)


class Infilling(fake_model.FakeTokenizer):
    """Letters beyond the fake vocabulary stand for its infill tokens."""

    def __init__(self, suffix_first: bool) -> None:
        self.infill = InfillTokens(20, 21, 22, 9, suffix_first=suffix_first)


@pytest.mark.parametrize(
    ("suffix_first", "want"),
    [(False, [BOS, 20, 2, 21, 3, 22]), (True, [BOS, 21, 3, 20, 2, 22])],
)
def test_infill_prompts_have_the_order_of_the_model(suffix_first: bool, want: list[int]) -> None:
    tokenizer = Infilling(suffix_first)
    assert encode_infill(tokenizer, SIZE, "a", "b").tolist() == want
    assert encode_infill(tokenizer, SIZE, [2], "b").tolist() == want[1:]
    assert encode_infill(tokenizer, SIZE, [BOS, 2], "b").tolist() == want
    assert encode_infill(tokenizer, SIZE, "a", "b", add_special_tokens=False).tolist() == want[1:]
    assert len(encode_infill(tokenizer, SIZE, None, "b")) == len(want) - 1
    assert tokenizer.infill.end_ids == {9, 20, 21, 22}


def test_too_long_infill_prompts_keep_what_is_near_the_gap() -> None:
    tokenizer = Infilling(False)

    def encode(max_tokens: int) -> list[int]:
        ids: list[int] = encode_infill(
            tokenizer, SIZE, "dd\n" * 8, "ca" * 8, max_tokens=max_tokens
        ).tolist()
        return ids

    whole = encode(36)
    assert len(whole) == 36
    assert encode(100) == whole
    assert encode(35) == [BOS, 20, *[13, 7] * 8, 21, *[4, 2] * 3, 4, 22]
    assert encode(12) == [BOS, 20, *[13, 7] * 3, 21, 4, 2, 22]
    with pytest.raises(ValueError, match=r"context_len must leave room .* 4 control tokens, got 4"):
        encode(4)


def test_long_texts_are_not_encoded_whole() -> None:
    tokenizer = Infilling(False)
    encode, num_chars = tokenizer.encode, 0

    def counted(text: str, **options: Any) -> list[int]:
        nonlocal num_chars
        num_chars += len(text)
        return encode(text, **options)

    tokenizer.encode = counted  # type: ignore[method-assign]
    text = "ab cd\n" * 10_000
    assert len(encode_infill(tokenizer, SIZE, text, "b", max_tokens=50)) <= 50
    assert len(encode_prompt(tokenizer, SIZE, text, max_tokens=50)) <= 50
    assert num_chars < 2000


def test_a_model_without_infill_tokens_names_the_suffix() -> None:
    with pytest.raises(ValueError, match="suffix must be left out: the model has no infill tokens"):
        encode_infill(FAKE, SIZE, "a", "b")


def test_infill_prompts_check_ids() -> None:
    with pytest.raises(ValueError, match=rf"prompt\[0\] must be in 0..{SIZE - 1}, got {SIZE}"):
        encode_infill(Infilling(False), SIZE, [SIZE], "b")
    with pytest.raises(TypeError, match=r"prompt\[0\] must be a token id, got str"):
        encode_infill(Infilling(False), SIZE, ["a"], "b")  # type: ignore[list-item]


def test_a_real_infill_prompt() -> None:
    tokenizer = real_tokenizer(QWEN)
    size = tokenizer.vocab_size
    ids = encode_infill(tokenizer, size, "def f(", ")").tolist()
    assert ids == tokenizer.encode("<|fim_prefix|><|fim_suffix|>)<|fim_middle|>def f(")
    literal: dict[str, Any] = {"add_special_tokens": False, "parse_special": False}
    ids = encode_infill(tokenizer, size, "a<|fim_middle|>", "b").tolist()
    assert ids.count(151660) == 1
    assert ids[4:] == tokenizer.encode("a<|fim_middle|>", **literal)
    with pytest.raises(ValueError, match="suffix"):
        encode_infill(real_tokenizer(GEMMA), 262144, "a", "b")
