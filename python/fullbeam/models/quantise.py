# SPDX-License-Identifier: Apache-2.0
"""A model's float matrices as blocks of 8 or 4 bits, made once and kept in the cache folder.

Each block's scale is that of its largest number, without a search for a better one. A file of the
cache belongs to the very files that it was made from: their names, sizes and times of change.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from fullbeam.checks import shown
from fullbeam.models.catalog import cache_folder
from fullbeam.models.safetensors_file import FileTensor, SafetensorsFile
from fullbeam.models.source import Bytes, Source, Tensor
from fullbeam.weight_types import dequantize, quantize

KINDS = ("q8", "q4")
_VERSION = 1
_FLOATS = ("F32", "F16", "BF16")
_CHUNK_NUMBERS = 1 << 18  # of float64 work that stays in the cache: 98 M/s, 13 M/s all at once


class QuantisedSource(Source):
    """A source whose matrices are taken from a file of the cache."""

    def __init__(self, source: Source, file: SafetensorsFile) -> None:
        self._source = source
        self._file = file
        self.path = source.path
        self.metadata = source.metadata
        self.is_converted = source.is_converted
        types: dict[str, str] = json.loads(file.metadata["types"])
        self.tensors = dict(source.tensors) | {
            name: replace(tensor, type=types[name], shape=source.tensors[name].shape)
            for name, tensor in file.tensors.items()
        }

    def name_of(self, name: str) -> str:
        return self._source.name_of(name)

    def release(self, tensor: Tensor) -> None:
        if isinstance(tensor, FileTensor):
            tensor.file.release(tensor)

    def close(self) -> None:
        self.tensors = {}
        self._file.close()
        self._source.close()


def quantised(
    source: Source, kind: str, files: list[Path], progress: Callable[[float, str], None]
) -> Source:
    """Quantise a source's matrices, or find them in the cache.

    Parameters
    ----------
    source : closed with the result
    kind : "q8" for blocks of Q8_0, "q4" for Q4_K, or Q4_0 where a row is no multiple of 256; token
        embedding and output head are Q8_0, learned positions stay as they are
    files : what the source was read from
    progress : told a share in 0..1 and what is being done

    Raises
    ------
    ValueError
        For another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"load: quantize must be one of {', '.join(KINDS)}, got {shown(kind)}")
    stats = [(str(path.resolve()), (s := path.stat()).st_size, s.st_mtime_ns) for path in files]
    key = hashlib.sha256(json.dumps([_VERSION, kind, stats]).encode()).hexdigest()[:32]
    path = cache_folder() / "quantised" / f"{source.path.name}-{kind}-{key}.safetensors"
    if not path.is_file():
        _write(path, source, kind, progress)
    return QuantisedSource(source, SafetensorsFile(path))


def _write(path: Path, source: Source, kind: str, progress: Callable[[float, str], None]) -> None:
    from safetensors.numpy import save_file

    wanted = {
        name: t for name, tensor in source.tensors.items() if (t := _type(name, tensor, kind))
    }
    total = sum(source.tensors[name].num_bytes for name in wanted) or 1
    done = 0
    parts = {}
    for name, block_type in wanted.items():
        tensor = source.tensors[name]
        parts[name] = _quantised_bytes(tensor, block_type)
        source.release(tensor)
        done += tensor.num_bytes
        progress(done / total, "quantise")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        save_file(parts, temporary, {"types": json.dumps(wanted)})
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _type(name: str, tensor: Tensor, kind: str) -> str | None:
    if len(tensor.shape) != 2 or tensor.type not in _FLOATS or tensor.shape[1] % 32:
        return None
    if name == "position_embd.weight":
        return None
    if kind == "q8" or name in ("token_embd.weight", "output.weight"):
        return "Q8_0"
    return "Q4_0" if tensor.shape[1] % 256 else "Q4_K"


def _quantised_bytes(tensor: Tensor, block_type: str) -> Bytes:
    rows, cols = tensor.shape
    data = tensor.data.reshape(rows, -1)
    step = max(1, _CHUNK_NUMBERS // cols)
    parts = [data[start : start + step] for start in range(0, rows, step)]
    return np.concatenate(
        [quantize(dequantize(part, tensor.type, (len(part), cols)), block_type) for part in parts]
    )
