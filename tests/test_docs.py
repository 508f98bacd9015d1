# SPDX-License-Identifier: Apache-2.0
"""The documents name what exists; the README lists every parameter and every op."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from fullbeam import CompletionParams
from fullbeam.models.catalog import CATALOG

ROOT = Path(__file__).parents[1]
PLACES = sorted(set(re.findall(r"`([\w/.]+\.\w+):(\w+)`", (ROOT / "docs/request.md").read_text())))


@pytest.mark.parametrize(("file", "name"), PLACES)
def test_request_document_names_what_exists(file: str, name: str) -> None:
    text = (ROOT / file).read_text()
    assert re.search(rf"(def|class) {name}\b|\b{name}\s*\(", text), f"{file} has no {name}"


def test_request_document_covers_the_way() -> None:
    assert len(PLACES) > 15


def test_readme_lists_every_parameter() -> None:
    section = (ROOT / "README.md").read_text().split("\n## Parameters\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert [field.name for field in fields(CompletionParams)] == rows


def test_readme_lists_every_op() -> None:
    ops = re.search(r"set\(OPS\s([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())
    assert ops is not None
    rows = re.findall(r"^\| `ops\.(\w+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(ops.group(1).split())


def test_readme_names_models_of_the_catalogue() -> None:
    names = re.findall(r'model="([\w.-]+)"', (ROOT / "README.md").read_text())
    assert names
    assert set(names) <= set(CATALOG)
