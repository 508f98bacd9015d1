# SPDX-License-Identifier: Apache-2.0
"""An op exists in every layer under one name; these tests say where one is missing."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOT_OPS = {"pack_weight"}  # prepares weights for two ops


def cmake_list(name: str) -> list[str]:
    text = (ROOT / "CMakeLists.txt").read_text()
    found = re.search(rf"^set\({name}\s+([^)]*)\)", text, re.MULTILINE)
    assert found is not None, f"CMakeLists.txt has no list {name}"
    return found[1].split()


OPS = set(cmake_list("OPS"))


def functions(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text())
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    }


def stems(pattern: str) -> set[str]:
    return {path.stem for path in ROOT.glob(pattern)}


def test_every_op_is_listed_once() -> None:
    assert len(cmake_list("OPS")) == len(OPS)


@pytest.mark.parametrize("folder", ["csrc/ops/*.h", "csrc/ops/*.cc", "csrc/cpu/*.cc"])
def test_every_op_has_its_sources(folder: str) -> None:
    assert not OPS - stems(folder), f"missing in {folder}"


@pytest.mark.parametrize("folder", ["csrc/ops/*.cc", "csrc/cpu/*.cc", "csrc/cuda/*.cu"])
def test_every_source_belongs_to_an_op(folder: str) -> None:
    assert not stems(folder) - OPS, f"in {folder}, but not in OPS"


def test_every_cuda_twin_is_there_or_still_to_come() -> None:
    to_come = set(cmake_list("CUDA_TO_COME"))
    assert stems("csrc/cuda/*.cu") | to_come == OPS
    assert not stems("csrc/cuda/*.cu") & to_come


def test_ops_h_declares_every_op() -> None:
    declared = re.findall(
        r"^FULLBEAM_API void (\w+)\(", (ROOT / "csrc/ops/ops.h").read_text(), re.MULTILINE
    )
    assert set(declared) == OPS


def test_module_binds_every_op() -> None:
    text = (ROOT / "csrc/python/module.cc").read_text()
    bound = re.findall(r'm\.def\("(\w+)",\s*&ops::(\w+)', text)
    assert all(name == function for name, function in bound)
    assert {name for name, _ in bound} == OPS


def test_python_has_every_op() -> None:
    assert functions("python/fullbeam/ops.py") - NOT_OPS == OPS


def test_reference_has_every_op() -> None:
    assert not OPS - functions("python/fullbeam/reference.py")


def test_every_op_has_its_tests() -> None:
    assert stems("tests/ops/test_*.py") == {f"test_{op}" for op in OPS}


def test_every_op_has_its_benchmark() -> None:
    tree = ast.parse((ROOT / "benchmarks/ops.py").read_text())
    cases = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "CASES"
    )
    assert isinstance(cases, ast.Dict)
    assert {ast.unparse(key) for key in cases.keys if key is not None} == OPS


def test_every_package_is_in_the_wheel_and_checked() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    packages = sorted(path.parent.name for path in ROOT.glob("python/*/py.typed"))
    assert packages == ["fullbeam", "gpt"]
    assert settings["scikit-build"]["wheel"]["packages"] == [f"python/{name}" for name in packages]
    assert settings["mypy"]["packages"] == packages
