# SPDX-License-Identifier: Apache-2.0
"""GGUF files made in the tests, byte by byte."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fullbeam.models.gguf import GgufFile
from fullbeam.models.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED

TYPE_OF_DTYPE = {
    "uint8": 0,
    "int8": 1,
    "uint16": 2,
    "int16": 3,
    "uint32": 4,
    "int32": 5,
    "float32": 6,
    "bool": 7,
    "uint64": 10,
    "int64": 11,
    "float64": 12,
}


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def value(item: Any) -> bytes:
    """Type and bytes of a value; plain ints go as uint32, floats as float32."""
    if isinstance(item, str):
        return struct.pack("<I", 8) + string(item)
    if type(item) in (bool, int, float):
        item = {bool: np.bool_, int: np.uint32, float: np.float32}[type(item)](item)
    if isinstance(item, np.generic):
        return struct.pack("<I", TYPE_OF_DTYPE[item.dtype.name]) + item.tobytes()
    if isinstance(item, np.ndarray):
        kind = TYPE_OF_DTYPE[item.dtype.name]
        return struct.pack("<IIQ", 9, kind, len(item)) + item.tobytes()
    return struct.pack("<IIQ", 9, 8, len(item)) + b"".join(map(string, item))


def build_gguf(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[int, tuple[int, ...], bytes]] | None = None,
    *,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """A whole file; a tensor is (ggml type number, shape in NumPy's order, bytes)."""
    tensors = tensors or {}
    out = struct.pack("<4sIQQ", b"GGUF", version, len(tensors), len(metadata))
    out += b"".join(string(key) + value(item) for key, item in metadata.items())
    data = b""
    for name, (kind, shape, raw) in tensors.items():
        data += b"\0" * (-len(data) % alignment)
        out += string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        out += struct.pack("<IQ", kind, len(data))
        data += raw
    return out + b"\0" * (-len(out) % alignment) + data if tensors else out


@pytest.fixture(scope="session")
def open_bytes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bytes], GgufFile]:
    """Open a file with these bytes."""
    folder = tmp_path_factory.mktemp("gguf")
    numbers = itertools.count()

    def open_(raw: bytes) -> GgufFile:
        path = Path(folder) / f"{next(numbers)}.gguf"
        path.write_bytes(raw)
        try:
            return GgufFile.open(path)
        finally:
            path.unlink()

    return open_


@pytest.fixture(scope="session")
def open_gguf(open_bytes: Callable[[bytes], GgufFile]) -> Callable[..., GgufFile]:
    """Build a file from `build_gguf`'s arguments and open it."""
    return lambda *args, **kwargs: open_bytes(build_gguf(*args, **kwargs))


@pytest.fixture(scope="session")
def gguf_bytes() -> Callable[..., bytes]:
    return build_gguf


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FULLBEAM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def build_llama_metadata(
    tokens: list[str], scores: list[float], kinds: list[int], **more: Any
) -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    } | {f"tokenizer.ggml.{key}": item for key, item in more.items()}


@pytest.fixture(scope="session")
def llama_metadata() -> Callable[..., dict[str, Any]]:
    """Metadata of a SentencePiece vocabulary; more keys as keywords."""
    return build_llama_metadata


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., dict[str, Any]]:
    """The same: `<unk> <s> </s>`, the bytes, pieces, `<tool>` (user-defined), `<|im_end|>`."""
    texts = [f"<0x{byte:02X}>" for byte in range(256)]

    def build(pieces: list[str], scores: list[float], **more: Any) -> dict[str, Any]:
        kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(pieces)]
        return build_llama_metadata(
            ["<unk>", "<s>", "</s>", *texts, *pieces, "<tool>", "<|im_end|>"],
            [0.0] * 259 + scores + [-1000.0] * 2,
            [*kinds, USER_DEFINED, CONTROL],
            **more,
        )

    return build


@pytest.fixture(scope="session")
def gpt2_metadata() -> Callable[..., dict[str, Any]]:
    """Metadata of a byte-level vocabulary; more keys as keywords."""

    def build(
        tokens: list[str], merges: list[str], kinds: list[int], pre: str, **more: Any
    ) -> dict[str, Any]:
        return {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        } | {f"tokenizer.ggml.{key}": item for key, item in more.items()}

    return build
