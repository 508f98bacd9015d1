# SPDX-License-Identifier: Apache-2.0
"""What the wheel brings for programs in C++: they find it, compile, link and run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fullbeam
from backends import tool
from fullbeam import _core, headers

ROOT = Path(__file__).parents[1]


@pytest.fixture
def _is_installed() -> None:
    if Path(fullbeam.__file__).is_relative_to(ROOT / "python"):
        pytest.skip("fullbeam is imported from the source tree: pip install . to test its headers")


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.usefixtures("_is_installed")
def test_example_builds_and_runs(tmp_path: Path) -> None:
    found = run(sys.executable, "-m", "fullbeam", "--cmakedir").strip()
    assert found == fullbeam.cmake_dir()
    configure = [f"-Dfullbeam_DIR={found}", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", "-G", "Ninja"]
    run(tool("cmake"), "-S", str(ROOT / "examples/cpp"), "-B", str(tmp_path), *configure)
    run(tool("cmake"), "--build", str(tmp_path))
    assert run(str(tmp_path / "example")).splitlines() == [
        "0.8485 2.2627 0.8485 2.2627",
        "0.8485 2.2627 6.0000 8.0000",
        "rms_norm: weight must be [size=4], got [2]",
    ]


@pytest.mark.usefixtures("_is_installed")
def test_every_header_stands_alone_and_needs_no_folder_of_ours(tmp_path: Path) -> None:
    """Compiled in C++17, with warnings, with nothing of fullbeam before it."""
    folder = Path(fullbeam.include_dir())
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.h"))
    ops = {path.stem for path in (ROOT / "csrc/cpu").glob("*.cc")}
    assert {f"fullbeam/ops/{op}.h" for op in ops} <= set(found)
    sources = []
    for idx, header in enumerate(found):
        sources.append(tmp_path / f"{idx}.cc")
        sources[-1].write_text(f'#include "{header}"\n')
    compiler = shutil.which("c++")
    assert compiler is not None
    flags = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
    run(compiler, *flags, f"-I{folder}", *map(str, sources))


@pytest.mark.usefixtures("_is_installed")
def test_library_exports_the_api_and_nothing_else() -> None:
    """Kernels stay hidden, and so does CUDA's runtime; weak symbols are the compiler's own."""
    nm = shutil.which("nm")
    assert nm is not None
    library = str(Path(fullbeam.library_dir()) / "libfullbeam.so")
    exported = [
        line.split(" ", 2)[1:] for line in run(nm, "-DC", "--defined-only", library).splitlines()
    ]
    names = [name for kind, name in exported if kind not in "VWu"]
    assert any(name.startswith("fullbeam::ops::attention_decode(") for name in names)
    assert any(name.startswith("fullbeam::run(fullbeam::RmsNormParams const&") for name in names)
    others = [name for name in names if "fullbeam::" not in name]
    assert not others, f"exported, but not fullbeam's: {others}"
    kernels = [name for name in names if "fullbeam::cpu::" in name]
    assert not kernels, f"kernels must be hidden: {kernels}"


@pytest.mark.usefixtures("_is_installed")
def test_native_libraries_need_nothing_that_a_plain_linux_lacks() -> None:
    """What manylinux wheels may need, and each other; the driver of CUDA is found at run time."""
    readelf = shutil.which("readelf")
    assert readelf is not None
    plain = {"libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6", "libpthread.so.0"}
    plain |= {"libdl.so.2", "librt.so.1", "ld-linux-x86-64.so.2", "libfullbeam.so"}
    for library in (_core.__file__, str(Path(fullbeam.library_dir()) / "libfullbeam.so")):
        needed = re.findall(r"\(NEEDED\).*\[(.*)\]", run(readelf, "-dW", library))
        assert "libstdc++.so.6" in needed
        assert set(needed) <= plain, library


def test_a_source_tree_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "__file__", str(tmp_path / "headers.py"))
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/lib must be there.*pip install"):
        headers.library_dir()
