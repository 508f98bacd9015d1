# SPDX-License-Identifier: Apache-2.0
"""Where the parts for programs in C++ are: the headers, the library, and CMake's package file."""

from __future__ import annotations

from pathlib import Path


def _folder(name: str) -> str:
    folder = Path(__file__).parent / name
    if not folder.is_dir():
        raise FileNotFoundError(
            f"fullbeam: {folder} must be there, and is only in an installed package: pip install ."
        )
    return str(folder)


def include_dir() -> str:
    """The folder for the compiler's -I: ``#include "fullbeam/ops/ops.h"``.

    Raises FileNotFoundError in a source tree, as the others do.
    """
    return _folder("include")


def library_dir() -> str:
    """The folder of libfullbeam.so, for -L and -rpath."""
    return _folder("lib")


def cmake_dir() -> str:
    """What CMake's ``fullbeam_DIR`` must be for ``find_package(fullbeam)``."""
    return _folder("cmake")
