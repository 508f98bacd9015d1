# SPDX-License-Identifier: Apache-2.0
"""GGUF files, read by mmap: what they say, and views of their tensors."""

from __future__ import annotations

import mmap
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from fullbeam.models.gguf_header import GgufStrings, GgufTensor, HeaderReader, MetadataValue
from fullbeam.models.source import Source, Tensor

_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")

__all__ = ["GgufFile", "GgufStrings", "GgufTensor", "MetadataValue"]


class GgufFile(Source):
    """A GGUF file that has been checked from end to end; use `open`.

    `metadata` maps keys to str, int, float, bool, `GgufStrings` for an array of strings, or a NumPy
    array for one of numbers or bools; `tensors` maps names to `GgufTensor`, in the file's order.
    """

    version: int
    alignment: int
    tensors: Mapping[str, GgufTensor]
    is_converted = True
    is_mapped = True

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        self.path = path
        self._mapped = mapped
        reader = HeaderReader(path, mapped)
        self.version, num_tensors, num_entries = reader.preamble()
        metadata = reader.metadata(num_entries)
        self.metadata = MappingProxyType(metadata)
        self.alignment = reader.alignment(metadata)
        self.tensors = MappingProxyType(reader.tensors(num_tensors, self.alignment))
        self._header_bytes = reader.position
        self._parts: list[GgufFile] = []  # the files that follow in a split model
        self.release_metadata()

    @classmethod
    def open(cls, path: str | Path) -> GgufFile:
        """Map and check a file, and the others of its model where that is split.

        Parameters
        ----------
        path
            A GGUF file of version 2 or 3, little endian. It must keep its length while it is open.
            Of a split model any part will do.

        Returns
        -------
        The file; its tensors are read from disk only when they are touched.

        Raises
        ------
        ValueError
            Where the file is no GGUF file, or is truncated or inconsistent, or a part is missing;
            the text names what.
        OSError
            Where the file can't be opened or mapped.
        """
        path = Path(path)
        file = cls._open_one(path)
        try:
            if (count := file.get("split.count", int, 1)) < 2:
                return file
            paths = _part_paths(path, count)
            if paths[0] != path:
                file.close()
                file = cls._open_one(paths[0])
            for part in paths[1:]:
                file._append(cls._open_one(part))
            expected = file.get("split.tensors.count", int, len(file.tensors))
            if len(file.tensors) != expected:
                raise ValueError(
                    f"{path}: the {count} parts must have {expected} tensors, "
                    f"got {len(file.tensors)}"
                )
        except BaseException:
            file.close()
            raise
        return file

    @classmethod
    def _open_one(cls, path: Path) -> GgufFile:
        with path.open("rb") as stream:
            least = HeaderReader.PREAMBLE_BYTES
            if (num_bytes := stream.seek(0, 2)) < least:
                raise ValueError(f"{path}: file must be at least {least} bytes, got {num_bytes}")
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            return cls(path, mapped)
        except BaseException:
            _close(mapped)
            raise

    def _append(self, part: GgufFile) -> None:
        self._parts.append(part)
        for name in part.tensors.keys() & self.tensors.keys():
            raise ValueError(f"{part.path}: tensor {name!r} must be in one part, got it in two")
        self.tensors = MappingProxyType({**self.tensors, **part.tensors})

    def release(self, tensor: Tensor) -> None:
        """Drop a tensor's pages from this process; touching it again reads the file again."""
        for part in self._parts:
            if tensor.name in part.tensors:
                return part.release(tensor)
        if isinstance(tensor, GgufTensor) and not self._mapped.closed:
            self._release(tensor.offset, tensor.offset + tensor.data.nbytes)

    def release_metadata(self) -> None:
        """Drop the pages of the metadata from this process; reading strings brings them back."""
        if not self._mapped.closed:
            self._release(0, self._header_bytes)

    def _release(self, start: int, end: int) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):
            start -= start % mmap.PAGESIZE
            self._mapped.madvise(mmap.MADV_DONTNEED, start, end - start)

    def close(self) -> None:
        """Let go of the file; arrays still held elsewhere stay readable and keep it mapped."""
        self.tensors = MappingProxyType({})
        for part in self._parts:
            part.close()
        _close(self._mapped)

    def __repr__(self) -> str:
        return f"GgufFile({str(self.path)!r}, {len(self.tensors)} tensors)"


def _part_paths(path: Path, count: int) -> list[Path]:
    """All parts of a split model, of which `path` is one."""
    found = _PART.search(path.name)
    if found is None or int(found[2]) != count:
        raise ValueError(
            f"{path}: file of a model in {count} parts must be named "
            f"*-00001-of-{count:05}.gguf and so on, as its parts are found by that"
        )
    stem = path.name[: found.start()]
    paths = [path.with_name(f"{stem}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    for part in paths:
        if not part.is_file():
            raise ValueError(f"{path}: part {part.name} must be beside it, got none")
    return paths


def _close(mapped: mmap.mmap) -> None:
    try:
        mapped.close()
    except BufferError:  # arrays still look into it
        return
