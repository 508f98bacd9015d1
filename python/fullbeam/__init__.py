# SPDX-License-Identifier: Apache-2.0
"""A decode backend for text and code completion."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fullbeam import ops
    from fullbeam.engine.engine import Engine
    from fullbeam.engine.text import Piece, RankedLogprob
    from fullbeam.headers import cmake_dir, include_dir, library_dir
    from fullbeam.model import Model, load
    from fullbeam.params import CompletionParams
    from fullbeam.results import Choice, Completion, Score, Usage

    __version__: str

__all__ = [
    "Choice",
    "Completion",
    "CompletionParams",
    "Engine",
    "Model",
    "Piece",
    "RankedLogprob",
    "Score",
    "Usage",
    "__version__",
    "cmake_dir",
    "include_dir",
    "library_dir",
    "load",
    "ops",
]

_HOMES = {
    "Choice": "fullbeam.results",
    "Completion": "fullbeam.results",
    "CompletionParams": "fullbeam.params",
    "Engine": "fullbeam.engine.engine",
    "Model": "fullbeam.model",
    "Piece": "fullbeam.engine.text",
    "RankedLogprob": "fullbeam.engine.text",
    "Score": "fullbeam.results",
    "Usage": "fullbeam.results",
    "cmake_dir": "fullbeam.headers",
    "include_dir": "fullbeam.headers",
    "library_dir": "fullbeam.headers",
    "load": "fullbeam.model",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    value: Any
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    elif name == "ops":
        return import_module("fullbeam.ops")
    elif name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            value = version("fullbeam")
        except PackageNotFoundError:  # a source tree that is not installed
            value = "0+source"
    else:
        raise AttributeError(f"module 'fullbeam' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
