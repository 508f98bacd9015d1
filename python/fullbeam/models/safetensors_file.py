# SPDX-License-Identifier: Apache-2.0
"""One safetensors file, mapped: the library checks the header, the bytes stay in the file."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from fullbeam.models.source import Bytes

_NUM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2}
_NUM_BYTES |= {"F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8}


@dataclass(frozen=True, eq=False)
class FileTensor:
    """A tensor's place in a file; `arrange` makes the bytes wanted of those that are there."""

    file: SafetensorsFile
    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
    arrange: Callable[[Bytes], Bytes] | None = None

    @property
    def data(self) -> Bytes:
        """uint8, row by row; a view of the file unless it is arranged anew."""
        raw = self.file.view(self.offset, self.num_bytes)
        return raw if self.arrange is None else self.arrange(raw)


class SafetensorsFile:
    """A mapped file; `tensors` are what it holds, by name."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError where the file is damaged or has a tensor of an unknown type."""
        from safetensors import SafetensorError, safe_open

        self.path = path
        self.metadata: dict[str, str] = {}
        self.tensors: dict[str, FileTensor] = {}
        try:
            with safe_open(path, framework="numpy") as header, path.open("rb") as stream:
                self.metadata = header.metadata() or {}
                # The library has checked that tensors follow each other without holes.
                offset = 8 + struct.unpack("<Q", stream.read(8))[0]
                for name in header.offset_keys():
                    part = header.get_slice(name)
                    kind, shape = part.get_dtype(), tuple(part.get_shape())
                    if kind not in _NUM_BYTES:
                        raise ValueError(
                            f"{path}: tensor {name} must be of a known type, got {kind}"
                        )
                    num_bytes = prod(shape) * _NUM_BYTES[kind]
                    self.tensors[name] = FileTensor(self, name, kind, shape, offset, num_bytes)
                    offset += num_bytes
                self._mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except SafetensorError as error:
            raise ValueError(f"{path}: must be a whole safetensors file: {error}") from error

    def view(self, offset: int, num_bytes: int) -> Bytes:
        """Bytes of the file."""
        return np.frombuffer(self._mapped, np.uint8, num_bytes, offset)

    def release(self, tensor: FileTensor) -> None:
        """Drop a tensor's pages from this process."""
        if hasattr(mmap, "MADV_DONTNEED") and not self._mapped.closed:
            start = tensor.offset - tensor.offset % mmap.PAGESIZE
            end = tensor.offset + tensor.num_bytes
            self._mapped.madvise(mmap.MADV_DONTNEED, start, end - start)

    def close(self) -> None:
        """Let go of the file; arrays that still look into it keep it mapped."""
        with suppress(BufferError):
            self._mapped.close()
