# SPDX-License-Identifier: Apache-2.0
"""What a model is read from: metadata and tensors under the names that GGUF gives them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeAlias, TypeVar, overload

import numpy as np
import numpy.typing as npt

from fullbeam.models.gguf_header import MetadataValue

T = TypeVar("T")
D = TypeVar("D")
Bytes: TypeAlias = npt.NDArray[np.uint8]


class Tensor(Protocol):
    """A tensor of a source; `data` are its bytes, of a GGUF type, row by row."""

    @property
    def name(self) -> str:
        """What the source itself calls it."""

    @property
    def type(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def data(self) -> Bytes: ...

    @property
    def num_bytes(self) -> int: ...


class Source(ABC):
    """An open model: a GGUF file (`gguf`), a folder of safetensors (`huggingface`)."""

    path: Path
    metadata: Mapping[str, MetadataValue]
    tensors: Mapping[str, Tensor]
    is_converted: bool
    """As converters to GGUF leave it: Llama's heads interleaved, Gemma's norms plus one."""
    is_mapped = False
    """Whether tensors lie in a mapped file as they are: nothing is lost with pages dropped."""

    @overload
    def get(self, key: str, kind: type[T]) -> T: ...

    @overload
    def get(self, key: str, kind: type[T], default: D) -> T | D: ...

    def get(self, key: str, kind: type[Any], default: Any = ...) -> Any:
        """Look up a metadata value of a known kind.

        Parameters
        ----------
        key
            The full key, such as `"general.architecture"`.
        kind
            str, int, float, bool, `GgufStrings` or `np.ndarray`; an int serves as a float.
        default
            What to return where the source has no such key; without it the key is required.

        Returns
        -------
        The value, of exactly that kind.

        Raises
        ------
        ValueError
            Where the key is absent and has no default, or its value is of another kind.
        """
        value = self.metadata.get(key)
        if value is None:
            if default is ...:
                name = self.name_of(key)
                raise ValueError(f"{self.path}: metadata must have {name}, which is absent")
            return default
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            raise ValueError(
                f"{self.path}: {self.name_of(key)} must be {kind.__name__}, "
                f"got {type(value).__name__}"
            )
        return value

    def name_of(self, name: str) -> str:
        """What the source itself calls a key or a tensor, for errors."""
        return name

    @abstractmethod
    def release(self, tensor: Tensor) -> None:
        """Drop a tensor's pages from this process; touching it again reads the file again."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the files; arrays still held elsewhere stay readable and keep them mapped."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
