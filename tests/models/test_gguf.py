# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as reference
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fullbeam.models.gguf import GgufFile, GgufStrings

OpenBytes = Callable[[bytes], GgufFile]
OpenGguf = Callable[..., GgufFile]
Build = Callable[..., bytes]

F32, Q8_0 = 0, 8
METADATA: dict[str, Any] = {
    "general.architecture": "tiny",
    "general.alignment": 64,
    "tiny.scale": 0.5,
    "tiny.flag": True,
    "tiny.words": ["one", "", "drei\u2581", "四"],
    "tiny.numbers": np.arange(5, dtype=np.int32),
}
TENSORS = {
    "a.weight": (F32, (2, 3), np.arange(6, dtype=np.float32).tobytes()),
    "b.weight": (Q8_0, (2, 64), bytes(range(136))),
    "c.bias": (F32, (1,), np.float32(7).tobytes()),
}


@pytest.fixture(scope="module")
def small(gguf_bytes: Build) -> bytes:
    return gguf_bytes(METADATA, TENSORS, alignment=64)


def read_all(file: GgufFile) -> None:
    for value in file.metadata.values():
        if isinstance(value, GgufStrings):
            assert len(list(value)) == len(value)
    for tensor in file.tensors.values():
        tensor.data.sum()


def test_reads_metadata_of_every_kind(open_bytes: OpenBytes, small: bytes) -> None:
    file = open_bytes(small)
    assert (file.version, file.alignment) == (3, 64)
    assert file.get("general.architecture", str) == "tiny"
    assert file.get("tiny.scale", float) == 0.5
    assert file.get("tiny.flag", bool) is True
    assert list(file.get("tiny.words", GgufStrings)) == METADATA["tiny.words"]
    np.testing.assert_array_equal(file.get("tiny.numbers", np.ndarray), np.arange(5))
    assert list(file.metadata) == list(METADATA)


@pytest.mark.parametrize(
    "value",
    [
        np.uint8(200),
        np.int8(-3),
        np.uint16(60000),
        np.int16(-30000),
        np.uint32(4e9),
        np.int32(-2e9),
        np.uint64(2**63),
        np.int64(-(2**62)),
        np.float32(0.1),
        np.float64(0.1),
        np.bool_(True),
    ],
    ids=lambda value: value.dtype.name,
)
def test_reads_numbers_of_every_width(open_gguf: OpenGguf, value: np.generic) -> None:
    file = open_gguf({"x": value, "many": np.array([value, value])})
    assert file.metadata["x"] == value.item()
    assert type(file.metadata["x"]) is type(value.item())
    many = file.get("many", np.ndarray)
    assert many.dtype == value.dtype
    assert many.tolist() == [value.item()] * 2


def test_strings_index_like_a_list(open_gguf: OpenGguf) -> None:
    words = [f"wörd {i}" * (i % 3) for i in range(50)]
    strings = open_gguf({"x": words}).get("x", GgufStrings)
    assert [strings[i] for i in range(-50, 50)] == [words[i] for i in range(-50, 50)]
    assert strings[3:40:7] == words[3:40:7]
    with pytest.raises(IndexError):
        strings[50]


def test_tensor_shapes_are_in_numpy_order_and_bytes_exact(
    open_bytes: OpenBytes, small: bytes
) -> None:
    file = open_bytes(small)
    assert list(file.tensors) == list(TENSORS)
    for name, (_, shape, raw) in TENSORS.items():
        tensor = file.tensors[name]
        assert tensor.name == name
        assert tensor.shape == shape
        assert tensor.data.tobytes() == raw
        assert tensor.offset % 64 == 0
        assert not tensor.data.flags.writeable
    assert [tensor.type for tensor in file.tensors.values()] == ["F32", "Q8_0", "F32"]


def test_version_2_reads_the_same(open_gguf: OpenGguf) -> None:
    file = open_gguf(METADATA, TENSORS, version=2, alignment=64)
    assert file.version == 2
    assert list(file.tensors) == list(TENSORS)


def test_tensor_types_agree_with_the_gguf_package(open_bytes: OpenBytes, gguf_bytes: Build) -> None:
    from fullbeam.models.gguf_header import _TENSOR_TYPES

    for kind, (block_len, block_bytes) in reference.GGML_QUANT_SIZES.items():
        if kind.value in _TENSOR_TYPES:
            assert _TENSOR_TYPES[kind.value] == (kind.name, block_len, block_bytes)


def test_reads_what_the_gguf_package_writes(tmp_path: Path) -> None:
    path = tmp_path / "written.gguf"
    writer = reference.GGUFWriter(path, "llama")
    writer.add_token_list(["a", "b\u2581", "c" * 1000])
    writer.add_token_scores([0.0, -1.0, -2.5])
    writer.add_bool("flag", False)
    writer.add_float64("wide", 0.1)
    weights = np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32)
    writer.add_tensor("w", weights)
    writer.add_tensor("h", weights.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GgufFile.open(path) as file:
        assert list(file.get("tokenizer.ggml.tokens", GgufStrings)) == ["a", "b\u2581", "c" * 1000]
        assert file.get("tokenizer.ggml.scores", np.ndarray).tolist() == [0.0, -1.0, -2.5]
        assert file.get("wide", float) == 0.1
        np.testing.assert_array_equal(file.tensors["w"].data.view(np.float32), weights.ravel())
        assert file.tensors["h"].shape == (3, 64)


def test_get_names_the_key(open_bytes: OpenBytes, small: bytes) -> None:
    file = open_bytes(small)
    assert file.get("absent", int, None) is None
    assert file.get("absent", int, 7) == 7
    assert file.get("general.alignment", float) == 64.0
    with pytest.raises(ValueError, match=r"metadata must have absent, which is absent"):
        file.get("absent", int)
    with pytest.raises(ValueError, match=r"tiny\.flag must be int, got bool"):
        file.get("tiny.flag", int)
    with pytest.raises(ValueError, match=r"tiny\.scale must be str, got float"):
        file.get("tiny.scale", str, "")


def test_arrays_outlive_the_file_and_its_release(open_bytes: OpenBytes, small: bytes) -> None:
    file = open_bytes(small)
    tensor = file.tensors["b.weight"]
    words = file.get("tiny.words", GgufStrings)
    file.release(tensor)
    assert tensor.data.tobytes() == TENSORS["b.weight"][2]
    file.close()
    file.close()
    assert tensor.data.tobytes() == TENSORS["b.weight"][2]
    assert words[0] == "one"
    assert not file.tensors


def test_every_truncation_is_refused(open_bytes: OpenBytes, small: bytes) -> None:
    for num_bytes in range(len(small)):
        with pytest.raises(ValueError, match=r"\.gguf: "):
            open_bytes(small[:num_bytes])


@settings(max_examples=400, deadline=None)
@given(flips=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=4))
def test_damaged_bytes_give_a_file_or_a_value_error(
    open_bytes: OpenBytes, small: bytes, flips: list[tuple[int, int]]
) -> None:
    damaged = bytearray(small)
    for place, byte in flips:
        damaged[place % len(damaged)] = byte
    try:
        file = open_bytes(bytes(damaged))
        read_all(file)
    except ValueError:
        return


@settings(max_examples=200, deadline=None)
@given(tail=st.binary(max_size=200), counts=st.tuples(*[st.integers(0, 2**64 - 1)] * 2))
def test_noise_gives_a_value_error(
    open_bytes: OpenBytes, tail: bytes, counts: tuple[int, int]
) -> None:
    raw = struct.pack("<4sIQQ", b"GGUF", 3, *counts) + tail
    try:
        read_all(open_bytes(raw))
    except ValueError:
        return


def entry(kind: int, body: bytes) -> bytes:
    return struct.pack("<Q", 1) + b"k" + struct.pack("<I", kind) + body


def tensor(name: bytes, dims: tuple[int, ...], kind: int = F32, offset: int = 0) -> bytes:
    out = struct.pack("<Q", len(name)) + name + struct.pack("<I", len(dims))
    return out + struct.pack(f"<{len(dims)}QIQ", *dims, kind, offset)


def header(entries: bytes = b"", num_entries: int = 0, tensors: bytes = b"", num: int = 0) -> bytes:
    raw = struct.pack("<4sIQQ", b"GGUF", 3, num, num_entries) + entries + tensors
    return raw + bytes(-len(raw) % 32 + 64)


HUGE = 2**64 - 1
HOSTILE = {
    "empty": (b"", "file must be at least 24 bytes, got 0"),
    "magic": (b"GGML" + bytes(40), "magic must be b'GGUF', got b'GGML'"),
    "version": (struct.pack("<4sIQQ", b"GGUF", 1, 0, 0), "version must be 2 or 3, got 1"),
    "big endian": (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "must be little endian, got a big-e"),
    "tensor count": (
        header(num=HUGE),
        "tensor count must be at most 65536, got 18446744073709551615",
    ),
    "metadata count": (header(num_entries=2**40), "metadata count must be at most 65536"),
    "key length": (header(struct.pack("<Q", HUGE), 1), "metadata key 0: length must be at most"),
    "empty key": (header(struct.pack("<Q", 0), 1), "metadata key 0 must not be empty"),
    "key bytes": (header(struct.pack("<Q", 1) + b"\xff", 1), r"metadata key 0 must be UTF-8"),
    "key twice": (header(entry(0, b"1") * 2, 2), "metadata keys must be distinct, got 'k' twice"),
    "value type": (header(entry(13, b""), 1), "k: type must be a metadata type, got 13"),
    "bool": (header(entry(7, b"\x02"), 1), "k: bools must be 0 or 1, got 2"),
    "string length": (header(entry(8, struct.pack("<Q", HUGE)), 1), "k: length must be at most"),
    "string end": (
        header(entry(8, struct.pack("<Q", 5000)), 1),
        "k must end before the file's end",
    ),
    "array length": (
        header(entry(9, struct.pack("<IQ", 0, HUGE)), 1),
        "k: array length must be at most 4194304",
    ),
    "array end": (
        header(entry(9, struct.pack("<IQ", 12, 4_000_000)), 1),
        "k must end before the file's end at .*, got 32000000 bytes",
    ),
    "strings end": (
        header(entry(9, struct.pack("<IQ", 8, 4_000_000)), 1),
        "k must end before the file's end",
    ),
    "one string's end": (
        header(entry(9, struct.pack("<IQQQ", 8, 2, 0, HUGE)), 1),
        r"k\[1\] must end before the file's end",
    ),
    "nested array": (
        header(entry(9, struct.pack("<IQ", 9, 1)), 1),
        "k: array type must be numbers, bools or strings, got 9",
    ),
    "no dimensions": (header(tensors=tensor(b"t", ()), num=1), "must be 1 to 4, got 0"),
    "dimensions": (header(tensors=tensor(b"t", (1,) * 5), num=1), "must be 1 to 4, got 5"),
    "zero dimension": (
        header(tensors=tensor(b"t", (0, 4)), num=1),
        "dimensions must be at least 1",
    ),
    "overflow": (
        header(tensors=tensor(b"t", (2**32, 2**32, 2**32)), num=1),
        "tensor 't' must end within the file's",
    ),
    "tensor type": (header(tensors=tensor(b"t", (4,), 4), num=1), "must be a known tensor type"),
    "row length": (
        header(tensors=tensor(b"t", (33,), Q8_0), num=1),
        "row length must be a multiple of 32 for Q8_0, got 33",
    ),
    "offset": (
        header(tensors=tensor(b"t", (4,), F32, 2**64 - 32), num=1),
        "tensor 't' must end within the file's",
    ),
    "unaligned offset": (
        header(tensors=tensor(b"t", (4,), F32, 8), num=1),
        "offset must be a multiple of 32, got 8",
    ),
    "tensor twice": (
        header(tensors=tensor(b"t", (4,)) * 2, num=2),
        "tensor names must be distinct",
    ),
    "overlap": (
        header(tensors=tensor(b"s", (9,)) + tensor(b"t", (4,), F32, 32), num=2),
        "tensors must not overlap, got 's' and 't'",
    ),
    "tensor name": (header(tensors=tensor(b"\xc3", (4,)), num=1), "tensor name 0 must be UTF-8"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_by_name_and_without_memory(
    open_bytes: OpenBytes, case: str
) -> None:
    raw, text = HOSTILE[case]
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=rf"\.gguf: .*{text}"):
            open_bytes(raw)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("alignment", [0, 3, 48, np.uint64(2**63 + 1), "32", -8])
def test_alignment_must_be_a_power_of_two(open_gguf: OpenGguf, alignment: Any) -> None:
    value = np.int32(alignment) if alignment == -8 else alignment
    with pytest.raises(ValueError, match=r"general\.alignment must be a power of two, got"):
        open_gguf({"general.alignment": value})


def test_a_huge_alignment_puts_tensors_past_the_end(open_gguf: OpenGguf) -> None:
    with pytest.raises(ValueError, match="must end within the file's"):
        open_gguf({"general.alignment": np.uint64(2**63)}, {"t": (F32, (1,), bytes(4))})


def test_strings_that_are_not_utf8_are_named(open_bytes: OpenBytes) -> None:
    body = struct.pack("<IQ", 8, 2) + struct.pack("<Q", 1) + b"a" + struct.pack("<Q", 1) + b"\xff"
    strings = open_bytes(header(entry(9, body), 1)).get("k", GgufStrings)
    with pytest.raises(ValueError, match=r"k\[1\] must be UTF-8, got b'\\xff'"):
        list(strings)
    with pytest.raises(ValueError, match=r"k\[1\] must be UTF-8, got b'\\xff'"):
        strings[1]


def test_files_that_cannot_be_opened_say_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        GgufFile.open(tmp_path / "absent.gguf")
    with pytest.raises(IsADirectoryError):
        GgufFile.open(tmp_path)
