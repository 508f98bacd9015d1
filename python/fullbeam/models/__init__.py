# SPDX-License-Identifier: Apache-2.0
"""Files -> models ready to run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fullbeam.engine.device import Device
    from fullbeam.models.decoder import Decoder
    from fullbeam.models.source import Source
    from fullbeam.models.tokenizer import Tokenizer

__all__ = ["OpenModel", "open_model"]

_REPORT_S = 0.05  # from one report of progress to the next
_BUILD_BYTES = 240  # that building a tokenizer takes for each token, besides those it keeps


@dataclass(frozen=True)
class OpenModel:
    """A model in memory."""

    name: str
    path: Path
    decoder: Decoder
    tokenizer: Tokenizer


def open_model(
    path: Path,
    *,
    device: Device | None = None,
    threads: int | None = None,
    context: int | None = None,
    quantize: str | None = None,
    progress: Callable[[float, str], None] | None = None,
) -> OpenModel:
    """Read a model into memory.

    Parameters
    ----------
    path : a GGUF file, or a folder of config.json, safetensors and tokenizer.json
    device : what computes; None = so many threads of the CPU
    threads : threads of a step; None = physical cores
    context : most tokens of a text, where that isn't the default
    quantize : "q8" or "q4": matrices of a folder become blocks of so many bits
    progress : called with a fraction in 0..1 and what is being done

    Raises
    ------
    ValueError
        A file is damaged or missing, a model that fullbeam doesn't know, or one that doesn't fit
        in memory; the text names the file and the field.
    """
    from fullbeam import _core
    from fullbeam.engine.device import CpuDevice
    from fullbeam.engine.memory import return_free_memory
    from fullbeam.models.decoder import Decoder
    from fullbeam.models.families import read_config
    from fullbeam.models.gguf import GgufFile
    from fullbeam.models.tokenizer import Tokenizer
    from fullbeam.models.weights import read_weights

    if device is None:
        device = CpuDevice(_core.num_physical_cores() if threads is None else threads)
    report = progress if progress is not None else (lambda fraction, what: None)
    with device.active(), _open_source(path, quantize, report) as source:
        config = read_config(source, context=context)
        tensors = source.tensors.values()
        total = sum(tensor.num_bytes for tensor in tensors)
        needed = sum(device.weight_bytes(tensor.shape, tensor.num_bytes) for tensor in tensors)
        _require_room(path, needed, device.available_bytes())
        packing = device.packing(_BUILD_BYTES * config.vocab_size)
        done = 0

        def packed(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            report(min(1.0, (done + packing.packed_bytes) / total), "weights")

        weights = read_weights(source, config, device, packing, packed)
        report(0.0, "tokenizer")
        if isinstance(source, GgufFile):
            tokenizer = Tokenizer.from_gguf(source)
            source.release_metadata()
        else:
            from fullbeam.models.tokenizer_json import read_tokenizer

            tokenizer = read_tokenizer(path, config.vocab_size)
        return_free_memory()
        while not packing.wait(_REPORT_S):
            packed(0)
        decoder = Decoder(config, weights, device=device)
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer must have {config.vocab_size} tokens, the rows of "
            f"token_embd.weight, got {tokenizer.vocab_size}"
        )
    name = path.stem
    if path.is_dir():
        from fullbeam.models.huggingface import folder_name

        name = folder_name(path)
    return OpenModel(
        name=name,
        path=path,
        decoder=decoder,
        tokenizer=tokenizer,
    )


def _open_source(path: Path, quantize: str | None, report: Callable[[float, str], None]) -> Source:
    if path.is_dir():
        from fullbeam.models.huggingface import HuggingFaceFolder
        from fullbeam.models.quantise import quantised

        folder = HuggingFaceFolder.open(path)
        return folder if quantize is None else quantised(folder, quantize, folder.files, report)
    from fullbeam.models.gguf import GgufFile

    if quantize is not None:
        raise ValueError(
            f"load: quantize must be left out for a GGUF file, which has types: {path}"
        )
    return GgufFile.open(path)


def _require_room(path: Path, num_bytes: int, available: int) -> None:
    if num_bytes > available:
        raise ValueError(
            f"{path}: the weights must fit in memory: they take {num_bytes >> 20} MiB, "
            f"{available >> 20} MiB are available: choose a smaller model"
        )
