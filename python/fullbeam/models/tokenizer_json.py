# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a Hugging Face folder: tokenizer.json, and what other files say of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fullbeam.models.huggingface import folder_name, read_json
from fullbeam.models.tokenizer import Tokenizer
from fullbeam.models.vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    find_special,
    is_prefix_last,
)

if TYPE_CHECKING:
    import tokenizers

_OTHER_FILES = ("tokenizer.model", "vocab.json", "merges.txt", "spiece.model")
# Texts of Code Llama's and others' marks that stand for a gap's sides, by transformers' names.
_INFILL_NAMES = {
    "prefix_token_id": "prefix_token",
    "suffix_token_id": "suffix_token",
    "middle_token_id": "middle_token",
    "eot_token_id": "eot_token",
}


def read_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """Build the tokenizer of a folder.

    Parameters
    ----------
    folder : with tokenizer.json; config.json and others of its kind are read, too
    vocab_size : rows of the embedding; ids beyond the tokenizer's are unused

    Raises
    ------
    ValueError
        Where tokenizer.json is absent, damaged, of an unknown kind or of more tokens than rows.
    """
    backend = _read_backend(folder)
    config = read_json(folder / "config.json")
    options = _read_optional(folder / "tokenizer_config.json")
    generation = _read_optional(folder / "generation_config.json")
    added = backend.get_added_tokens_decoder()
    num_tokens = max([backend.get_vocab_size(), *(token_id + 1 for token_id in added)])
    if num_tokens > vocab_size:
        raise ValueError(
            f"{folder / 'tokenizer.json'}: the tokenizer must have at most {vocab_size} tokens, "
            f"the rows of the embedding, got {num_tokens}"
        )
    kinds = _kinds(backend, added, vocab_size)

    def id_of(text: object) -> int | None:
        text = text.get("content") if isinstance(text, dict) else text
        return backend.token_to_id(text) if isinstance(text, str) else None

    named = [
        *(source.get("eos_token_id") for source in (generation, config)),
        id_of(options.get("eos_token")),
    ]
    items = [i for item in named for i in (item if isinstance(item, list) else [item])]
    ends = {i for i in items if isinstance(i, int)}
    bos = id_of(options.get("bos_token"))
    bos = config.get("bos_token_id") if bos is None else bos
    for token_id in (*ends, bos):
        if token_id is not None and not 0 <= token_id < vocab_size:
            raise ValueError(
                f"{folder}: bos_token_id and eos_token_id must be in 0..{vocab_size - 1}, "
                f"got {token_id}"
            )
    if bos is not None:
        kinds[bos] = CONTROL
    special = find_special(
        id_of,
        kinds,
        lambda key: id_of(options.get(_INFILL_NAMES[key])) if key in _INFILL_NAMES else None,
        prefix_last=is_prefix_last(config.get("model_type", ""), folder_name(folder)),
    )
    kinds[list(ends)] = CONTROL
    vocabulary = Vocabulary([], {}, kinds, None, bos, special.eos_ids | ends, special.infill)
    adds_bos = options.get("add_bos_token")
    if not isinstance(adds_bos, bool):
        adds_bos = bos is not None and backend.encode("a").ids[:1] == [bos]
    return Tokenizer(
        vocabulary,
        backend,
        add_bos=adds_bos and bos is not None,
        byte_level="ByteLevel" in f"{backend.decoder!r}{backend.pre_tokenizer!r}",
    )


def _read_backend(folder: Path) -> tokenizers.Tokenizer:
    import tokenizers
    from tokenizers import models

    path = folder / "tokenizer.json"
    if not path.is_file():
        found = ", ".join(name for name in _OTHER_FILES if (folder / name).is_file())
        raise ValueError(
            f"{folder}: file tokenizer.json must be there, got {found or 'no tokenizer'}: write it "
            f"with transformers, AutoTokenizer.from_pretrained(folder).save_pretrained(folder), or "
            f"take a GGUF file of the model"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the backend has no narrower kind
        raise ValueError(
            f"{path}: must be a tokenizer of the tokenizers library: {error}"
        ) from error
    if not isinstance(backend.model, (models.BPE, models.Unigram)):
        kind = type(backend.model).__name__
        raise ValueError(f"{path}: model must be BPE or Unigram, got {kind}")
    backend.no_truncation()
    backend.no_padding()
    return backend


def _kinds(backend: tokenizers.Tokenizer, added: dict[int, Any], vocab_size: int) -> Any:
    kinds = np.full(vocab_size, UNUSED, np.uint8)
    kinds[list(backend.get_vocab(with_added_tokens=False).values())] = NORMAL
    if getattr(backend.model, "byte_fallback", False):
        for byte in range(256):
            if (token_id := backend.token_to_id(f"<0x{byte:02X}>")) is not None:
                kinds[token_id] = BYTE
    unknown = getattr(backend.model, "unk_token", None)
    for token_id, token in added.items():
        kinds[token_id] = CONTROL if token.special else USER_DEFINED
        if token.content == unknown:
            kinds[token_id] = UNKNOWN
    return kinds


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
