# SPDX-License-Identifier: Apache-2.0
"""GGUF files, read by mmap: what they say, and views of their tensors."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from fullbeam.models.gguf_header import GgufStrings, GgufTensor, HeaderReader, MetadataValue
from fullbeam.models.source import Source, Tensor

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
        self.release_metadata()

    @classmethod
    def open(cls, path: str | Path) -> GgufFile:
        """Map and check a file.

        Parameters
        ----------
        path
            A GGUF file of version 2 or 3, little endian. It must keep its length while it is open.

        Returns
        -------
        The file; its tensors are read from disk only when they are touched.

        Raises
        ------
        ValueError
            Where the file is no GGUF file, or is truncated or inconsistent; the text names what.
        OSError
            Where the file can't be opened or mapped.
        """
        path = Path(path)
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

    def release(self, tensor: Tensor) -> None:
        """Drop a tensor's pages from this process; touching it again reads the file again."""
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
        _close(self._mapped)

    def __repr__(self) -> str:
        return f"GgufFile({str(self.path)!r}, {len(self.tensors)} tensors)"


def _close(mapped: mmap.mmap) -> None:
    try:
        mapped.close()
    except BufferError:  # arrays still look into it
        return
