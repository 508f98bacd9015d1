# SPDX-License-Identifier: Apache-2.0
"""The header of a GGUF file, read as if an enemy had written it.

A file is: magic, version, two counts; the metadata (key, type, value); the tensor table (name,
dimensions, type, offset); padding; the tensors' bytes. All little endian. Every length, count and
offset is compared with the file's size before it is used, so a bad file costs a `ValueError` and
nothing else.
"""

from __future__ import annotations

import mmap
import struct
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn, TypeAlias, cast, overload

import numpy as np
import numpy.typing as npt

from fullbeam import _core

MetadataValue: TypeAlias = "str | int | float | bool | GgufStrings | npt.NDArray[Any]"

# ggml's type numbers: (name, elements per block, bytes per block).
_TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}

# Metadata type numbers of fixed-size values: NumPy's name for them.
_SCALARS: dict[int, str] = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "|b1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_U32, _BOOL, _STRING, _ARRAY = 4, 7, 8, 9

# Far above any real file, low enough that a hostile one is refused within a second or two.
_MAX_HEADER_BYTES = 128 << 20
_MAX_STRING_BYTES = 16 << 20
_MAX_NAME_BYTES = 65535
_MAX_ARRAY_LEN = 1 << 22
_MAX_ENTRIES = 1 << 16
_MAX_DIMS = 4


@dataclass(frozen=True, slots=True, eq=False)
class GgufTensor:
    """One tensor's place in a file.

    `shape` is in NumPy's order, the contiguous dimension last; `data` is a read-only uint8 view of
    exactly the tensor's bytes in the mapped file, quantised as `type` says; `offset` is where they
    start in the file.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]
    offset: int

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return self.data.nbytes


class GgufStrings(Sequence[str]):
    """An array of strings, each decoded when it is asked for: a vocabulary takes no memory.

    Taking one that is not UTF-8 raises a `ValueError` that names it.
    """

    def __init__(self, name: str, raw: memoryview, ends: array[int]) -> None:
        self._name = name
        self._raw = raw  # of each string: 8 bytes of length, its bytes
        self._ends = ends

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start = self._ends[index - 1] if index else 0
        return self._decode(index, bytes(self._raw[start + 8 : self._ends[index]]))

    def __iter__(self) -> Iterator[str]:
        texts = _core.decode_strings(self._raw, self._ends)
        if len(texts) < len(self):
            texts.append(self[len(texts)])  # raises
        return iter(texts)

    def __repr__(self) -> str:
        return f"GgufStrings({len(self)} strings)"

    def _decode(self, index: int, raw: bytes) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise ValueError(f"{self._name}[{index}] must be UTF-8, got {raw[:64]!r}") from None


class HeaderReader:
    """A cursor over the header; each method reads one part of it and moves on."""

    PREAMBLE_BYTES = 24

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        self._path = path
        self._buffer = mapped
        self._file_bytes = len(mapped)
        self._end = min(self._file_bytes, _MAX_HEADER_BYTES)
        self.position = 0

    def preamble(self) -> tuple[int, int, int]:
        magic, version, num_tensors, num_entries = struct.unpack_from("<4sIQQ", self._buffer)
        if magic != b"GGUF":
            self._fail(f"magic must be b'GGUF', got {magic!r}")
        if version and not version & 0xFFFF:
            self._fail("byte order must be little endian, got a big-endian file")
        if version not in (2, 3):
            self._fail(f"version must be 2 or 3, got {version}")
        for field, count in (("tensor count", num_tensors), ("metadata count", num_entries)):
            if count > _MAX_ENTRIES:
                self._fail(f"{field} must be at most {_MAX_ENTRIES}, got {count}")
        self.position = self.PREAMBLE_BYTES
        return version, num_tensors, num_entries

    def metadata(self, num_entries: int) -> dict[str, MetadataValue]:
        values: dict[str, MetadataValue] = {}
        for index in range(num_entries):
            key = self._string(f"metadata key {index}", _MAX_NAME_BYTES)
            if not key:
                self._fail(f"metadata key {index} must not be empty")
            if key in values:
                self._fail(f"metadata keys must be distinct, got {key!r} twice")
            values[key] = self._value(key)
        return values

    def alignment(self, metadata: Mapping[str, MetadataValue]) -> int:
        value = metadata.get("general.alignment", 32)
        if type(value) is not int or value < 1 or value & (value - 1):
            self._fail(f"general.alignment must be a power of two, got {value!r}")
        return value

    def tensors(self, num_tensors: int, alignment: int) -> dict[str, GgufTensor]:
        table: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
        for index in range(num_tensors):
            name = self._string(f"tensor name {index}", _MAX_NAME_BYTES)
            if name in table:
                self._fail(f"tensor names must be distinct, got {name!r} twice")
            table[name] = self._tensor_entry(name, alignment)
        if not table:
            return {}
        start = -(-self.position // alignment) * alignment
        previous, free = "", start
        for name, (_, _, offset, num_bytes) in sorted(table.items(), key=lambda row: row[1][2]):
            if start + offset + num_bytes > self._file_bytes:
                self._fail(
                    f"tensor {name!r} must end within the file's {self._file_bytes} bytes, "
                    f"got {num_bytes} bytes at {start + offset}"
                )
            if start + offset < free:
                self._fail(f"tensors must not overlap, got {previous!r} and {name!r}")
            previous, free = name, start + offset + num_bytes
        data = np.frombuffer(self._buffer, np.uint8)
        return {
            name: GgufTensor(
                name, kind, shape, data[start + offset : start + offset + num_bytes], start + offset
            )
            for name, (kind, shape, offset, num_bytes) in table.items()
        }

    def _tensor_entry(self, name: str, alignment: int) -> tuple[str, tuple[int, ...], int, int]:
        where = f"tensor {name!r}"
        (num_dims,) = self._unpack("<I", f"{where}: number of dimensions")
        if not 1 <= num_dims <= _MAX_DIMS:
            self._fail(f"{where}: number of dimensions must be 1 to {_MAX_DIMS}, got {num_dims}")
        dims = self._unpack(f"<{num_dims}Q", f"{where}: dimensions")
        if 0 in dims:
            self._fail(f"{where}: dimensions must be at least 1, got {dims}")
        type_id, offset = self._unpack("<IQ", f"{where}: type and offset")
        if type_id not in _TENSOR_TYPES:
            self._fail(f"{where}: type must be a known tensor type, got {type_id}")
        kind, block_len, block_bytes = _TENSOR_TYPES[type_id]
        if dims[0] % block_len:
            self._fail(
                f"{where}: row length must be a multiple of {block_len} for {kind}, got {dims[0]}"
            )
        if offset % alignment:
            self._fail(f"{where}: offset must be a multiple of {alignment}, got {offset}")
        return kind, dims[::-1], offset, prod(dims) // block_len * block_bytes

    def _value(self, key: str) -> MetadataValue:
        (kind,) = self._unpack("<I", f"{key}: type")
        if kind == _STRING:
            return self._string(key, _MAX_STRING_BYTES)
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            self._fail(f"{key}: type must be a metadata type, got {kind}")
        return cast("int | float | bool", self._numbers(key, kind, 1)[0].item())

    def _array(self, key: str) -> MetadataValue:
        kind, count = self._unpack("<IQ", f"{key}: array type and length")
        if kind not in _SCALARS and kind != _STRING:
            self._fail(f"{key}: array type must be numbers, bools or strings, got {kind}")
        if count > _MAX_ARRAY_LEN:
            self._fail(f"{key}: array length must be at most {_MAX_ARRAY_LEN}, got {count}")
        return self._strings(key, count) if kind == _STRING else self._numbers(key, kind, count)

    def _numbers(self, key: str, kind: int, count: int) -> npt.NDArray[Any]:
        dtype = np.dtype(_SCALARS[kind])
        start = self._take(key, count * dtype.itemsize)
        raw = np.frombuffer(self._buffer, np.uint8, count * dtype.itemsize, start).copy()
        if kind == _BOOL and raw.size and raw.max() > 1:
            self._fail(f"{key}: bools must be 0 or 1, got {raw.max()}")
        values = raw.view(dtype)
        values.flags.writeable = False
        return values

    def _strings(self, key: str, count: int) -> GgufStrings:
        buffer, start = memoryview(self._buffer), self.position
        if count * 8 > self._end - start:
            self._fail_past_end(key, count * 8)
        ends = array("I", _core.string_ends(buffer[start : self._end], count))
        index = len(ends)
        self.position = pos = start + (ends[-1] if ends else 0)
        if index < count:
            (length,) = self._unpack("<Q", f"{key}[{index}]: length")
            self._fail_past_end(f"{key}[{index}]", length)
        return GgufStrings(f"{self._path}: {key}", buffer[start:pos], ends)

    def _string(self, field: str, max_bytes: int) -> str:
        (length,) = self._unpack("<Q", f"{field}: length")
        if length > max_bytes:
            self._fail(f"{field}: length must be at most {max_bytes}, got {length}")
        start = self._take(field, length)
        try:
            return self._buffer[start : start + length].decode()
        except UnicodeDecodeError:
            self._fail(f"{field} must be UTF-8, got {self._buffer[start : start + length][:64]!r}")

    def _unpack(self, layout: str, field: str) -> tuple[int, ...]:
        start = self._take(field, struct.calcsize(layout))
        return struct.unpack_from(layout, self._buffer, start)

    def _take(self, field: str, num_bytes: int) -> int:
        start = self.position
        if num_bytes > self._end - start:
            self._fail_past_end(field, num_bytes)
        self.position = start + num_bytes
        return start

    def _fail_past_end(self, field: str, num_bytes: int, start: int | None = None) -> NoReturn:
        limit = "the file's end" if self._end == self._file_bytes else "the largest header's"
        start = self.position if start is None else start
        self._fail(
            f"{field} must end before {limit} at {self._end}, got {num_bytes} bytes at {start}"
        )

    def _fail(self, text: str) -> NoReturn:
        raise ValueError(f"{self._path}: {text}")
