# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of folders: the library's ids, and those of the same vocabulary in a GGUF file."""

from __future__ import annotations

import functools
import json
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from fullbeam.models.gguf import GgufFile
from fullbeam.models.tokenizer import Tokenizer
from fullbeam.models.tokenizer_json import read_tokenizer
from fullbeam.models.vocabulary import BYTE, CONTROL, NORMAL

SPACE = "\u2581"
FIM = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


@functools.cache
def mixed_text() -> str:
    """2 MB of code, prose and characters of many scripts."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    code = "".join(
        path.read_text(encoding="utf-8", errors="ignore")
        for path in sorted(folder.glob("[a-t]*.py"))
    )
    scripts = (0x0391, 0x0416, 0x05D0, 0x0915, 0x3042, 0x4E2D, 0xAC00, 0x1F600)
    words = [
        "".join(chr(first + i * step % 23) for i in range(5))
        for first in scripts
        for step in (1, 3, 7)
    ]
    order = np.random.default_rng(0).integers(0, len(words), 20000)
    prose = "  ".join(words[i] for i in order) + "\t\r\n\0 \u200d"
    return (code + prose)[: 2 << 20] + prose[:1000]


def trained(*, is_byte_level: bool) -> tokenizers.Tokenizer:
    """A BPE tokenizer learnt from a part of the text."""
    sample = mixed_text()[:100_000] + mixed_text()[-1000:]
    if is_byte_level:
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=1000, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator([sample], trainer)
    else:
        tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Replace(" ", SPACE)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
        texts = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(
            vocab_size=1000, special_tokens=texts, limit_alphabet=80, show_progress=False
        )
        tokenizer.train_from_iterator([sample], trainer)
        # As pieces that merge across the whole text, without the marks of the training.
        saved = json.loads(tokenizer.to_str())
        saved["added_tokens"] = saved["added_tokens"][:1]
        saved["pre_tokenizer"] = None
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(saved))
        steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def gguf_metadata(tokenizer: tokenizers.Tokenizer, *, is_byte_level: bool) -> dict[str, Any]:
    """What a GGUF file says of a vocabulary."""
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    kinds = np.full(len(tokens), NORMAL, np.int32)
    common = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    if is_byte_level:
        merges = json.loads(tokenizer.to_str())["model"]["merges"]
        return common | {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        }
    kinds[0], kinds[1:257] = CONTROL, BYTE
    return common | {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.scores": -np.arange(len(tokens), dtype=np.float32),
        "tokenizer.ggml.add_space_prefix": False,
        **{f"tokenizer.ggml.{role}_token_id": 0 for role in ("unknown", "bos", "eos")},
        "tokenizer.ggml.add_bos_token": False,
    }


def folder_of(path: Path, tokenizer: tokenizers.Tokenizer, **files: dict[str, Any]) -> Path:
    tokenizer.save(str(path / "tokenizer.json"))
    for name, content in ({"config": {}} | files).items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("is_byte_level", [True, False])
def test_two_megabytes_of_text(
    tmp_path: Path, open_gguf: Callable[..., GgufFile], is_byte_level: bool
) -> None:
    library = trained(is_byte_level=is_byte_level)
    text = mixed_text()
    assert len(text.encode()) > 2 << 20
    expected = library.encode(text, add_special_tokens=False).ids
    size = library.get_vocab_size()
    folder = read_tokenizer(folder_of(tmp_path, library), size)
    assert folder.encode(text) == expected
    metadata = gguf_metadata(library, is_byte_level=is_byte_level)
    from_gguf = Tokenizer.from_gguf(open_gguf(metadata))
    assert from_gguf.encode(text) == expected
    assert b"".join(map(folder.token_bytes, expected)) == text.encode()
    assert folder.all_token_bytes()[1:] == from_gguf.all_token_bytes()[1:]


@pytest.fixture(scope="module")
def letters() -> tokenizers.Tokenizer:
    ids = {token: idx for idx, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(models.BPE(ids, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True) for text in ("<s>", "</s>", "<|im_end|>")]
    user = [AddedToken(text, special=False) for text in (*FIM, "<tool>")]
    tokenizer.add_tokens([*special, *user])
    return tokenizer


def test_special_tokens_are_found_by_what_the_files_say(
    tmp_path: Path, letters: tokenizers.Tokenizer
) -> None:
    folder = folder_of(
        tmp_path,
        letters,
        config={"eos_token_id": 257},
        generation_config={"eos_token_id": [257, 97]},
        tokenizer_config={"bos_token": {"content": "<s>"}, "add_bos_token": True},
    )
    tokenizer = read_tokenizer(folder, 270)
    assert tokenizer.bos_id == 256
    assert tokenizer.add_bos
    assert tokenizer.eos_ids == {257, 97, 258}
    assert tokenizer.infill is not None
    assert tokenizer.infill.arrange([1], [2]) == [259, 1, 260, 2, 261]
    assert tokenizer.encode("a<tool>")[::2] == [256, 262]
    assert tokenizer.token_bytes(262) == b"<tool>"
    assert [tokenizer.token_bytes(i) for i in (256, 259, 265)] == [b""] * 3
    assert tokenizer.vocab_size == 270
    literal = tokenizer.encode("<|fim_prefix|><tool>", parse_special=False)
    assert 259 not in literal
    assert literal[-1] == 262


@pytest.mark.parametrize(
    ("by_template", "options", "expected"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"add_bos_token": False}, False),
        (False, {"add_bos_token": True}, True),
    ],
)
def test_start_token_is_added_where_the_files_say_so(
    tmp_path: Path,
    letters: tokenizers.Tokenizer,
    by_template: bool,
    options: dict[str, Any],
    expected: bool,
) -> None:
    copy = tokenizers.Tokenizer.from_str(letters.to_str())
    if by_template:
        copy.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 256)]
        )
    options = {"bos_token": "<s>", **options}
    tokenizer = read_tokenizer(folder_of(tmp_path, copy, tokenizer_config=options), 263)
    assert tokenizer.encode("a")[:-1] == [256] * expected


def test_truncation_and_padding_of_the_file_are_off(
    tmp_path: Path, letters: tokenizers.Tokenizer
) -> None:
    copy = tokenizers.Tokenizer.from_str(letters.to_str())
    copy.enable_truncation(2)
    copy.enable_padding(length=50)
    assert len(read_tokenizer(folder_of(tmp_path, copy), 263).encode("a" * 10)) == 10


@pytest.mark.parametrize(
    ("name", "before", "after", "marks"),
    [
        ("Qwen2.5-Coder-0.5B", [1], [2], [259, 1, 260, 2, 261]),
        ("Qwen2.5-Coder-0.5B-Instruct", [1], [2], [259, 260, 2, 261, 1]),
    ],
)
def test_infill_order_goes_by_the_repository(
    tmp_path: Path,
    letters: tokenizers.Tokenizer,
    name: str,
    before: list[int],
    after: list[int],
    marks: list[int],
) -> None:
    for folder in (tmp_path / name, tmp_path / f"models--Qwen--{name}" / "snapshots" / "0123"):
        folder.mkdir(parents=True)
        folder_of(folder, letters, config={"model_type": "qwen2"})
        infill = read_tokenizer(folder, 263).infill
        assert infill is not None
        assert infill.arrange(before, after) == marks


def test_other_kinds_and_too_many_tokens_are_refused(
    tmp_path: Path, letters: tokenizers.Tokenizer
) -> None:
    pieces = tokenizers.Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(
        ValueError, match=r"tokenizer\.json: model must be BPE or Unigram, got Word"
    ):
        read_tokenizer(folder_of(tmp_path, pieces), 263)
    with pytest.raises(ValueError, match=r"must have at most 262 tokens, .* got 263$"):
        read_tokenizer(folder_of(tmp_path, letters), 262)
