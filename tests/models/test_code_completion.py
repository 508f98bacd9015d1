# SPDX-License-Identifier: Apache-2.0
"""Code completion with a real model, where it is in the cache folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import fullbeam
from fullbeam.models.catalog import cache_folder

PATH = cache_folder() / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"  # before the tests have their own


@pytest.fixture(scope="module")
def model() -> Iterator[fullbeam.Model]:
    if not PATH.exists():
        pytest.skip(f"{PATH.name} is not in the cache folder")
    with fullbeam.load(str(PATH), context=512) as loaded:
        yield loaded


def suggest(model: fullbeam.Model, prompt: str, prefix: str) -> list[str]:
    found = model.complete(
        prompt,
        prefix=prefix,
        token_healing=True,
        mode="FULL_LINE",
        beam_size=6,
        max_tokens=8,
        len_norm_base=2.0,
        len_norm_pow=0.7,
        only_full_lines=False,
    )
    return [choice.text for choice in found.choices]


def test_a_typed_prefix_is_completed(model: fullbeam.Model) -> None:
    assert "numpy as np" in suggest(model, "import ", "num")


def test_healing_finds_the_token_that_the_prompt_cuts(model: fullbeam.Model) -> None:
    """`import num` ends inside a token; the text goes on from there."""
    assert "py as np" in suggest(model, "import num", "")


def test_the_next_keystroke_computes_one_token(model: fullbeam.Model) -> None:
    before = "def area(width, height):\n    return width * height\n\nprint(area(3, 4))\n" * 4
    ids = model.tokenizer.encode(before)
    model.complete(ids[:-1], max_tokens=1, temperature=0)
    computed = model.engine.stats().num_computed_tokens
    model.complete(ids, max_tokens=1, temperature=0)
    assert model.engine.stats().num_computed_tokens == computed + 1


def test_text_after_the_gap_is_used(model: fullbeam.Model) -> None:
    before = "def describe(shape):\n    "
    after = " = shape.area()\n    return f'area {surface:.2f}'\n"
    (with_suffix,) = model.complete(before, suffix=after, max_tokens=4, temperature=0).choices
    assert with_suffix.text.strip().startswith("surface")
