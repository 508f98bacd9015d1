# SPDX-License-Identifier: Apache-2.0
"""Folders quantised at load: what they compute, and what is kept."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import hf_models
from fullbeam import reference
from fullbeam.models import OpenModel, open_model
from fullbeam.models.catalog import cache_folder

LAYER_TYPES = {"q8": "Q8_0", "q4": "Q4_0"}  # the tiny rows are no multiples of 256


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FULLBEAM_CACHE", str(tmp_path / "cache"))
    return hf_models.save("llama", hf_models.make_model("llama"), tmp_path / "model")


def cached_files() -> list[Path]:
    return sorted((cache_folder() / "quantised").glob("*"))


def head_products(opened: OpenModel, x: np.ndarray) -> np.ndarray:
    from fullbeam import ops

    return np.asarray(ops.linear(x, opened.decoder.weights.head))


@pytest.mark.parametrize("kind", ["q8", "q4"])
def test_matrices_are_quantised_and_the_rest_is_as_stored(folder: Path, kind: str) -> None:
    plain = open_model(folder, threads=1).decoder.weights
    opened = open_model(folder, threads=1, quantize=kind)
    weights = opened.decoder.weights
    layer = weights.layers[0]
    for linear in (layer.qkv, layer.attention_out, layer.up, layer.down):
        assert set(linear.weight.types) == {LAYER_TYPES[kind]}
    assert weights.embedding.types == weights.head.types == ["Q8_0"]
    np.testing.assert_array_equal(
        layer.attention_norm.weight, plain.layers[0].attention_norm.weight
    )


def test_products_are_those_of_the_quantised_matrix(folder: Path) -> None:
    from safetensors.numpy import load_file

    opened = open_model(folder, threads=1, quantize="q8")
    head = load_file(folder / "model.safetensors")["lm_head.weight"]
    raw = reference.quantize(head, "Q8_0")
    x = np.random.default_rng(0).standard_normal((3, head.shape[1]), np.float32)
    expected = reference.linear(
        reference.round_activations(x), reference.dequantize(raw, "Q8_0", head.shape)
    )
    np.testing.assert_allclose(head_products(opened, x), expected, rtol=1e-4, atol=1e-4)


def test_the_result_is_kept_and_belongs_to_the_files(folder: Path) -> None:
    told: list[str] = []
    open_model(folder, quantize="q4", progress=lambda _, what: told.append(what))
    assert "quantise" in told
    (kept,) = cached_files()
    told.clear()
    open_model(folder, quantize="q4", progress=lambda _, what: told.append(what))
    assert "quantise" not in told
    assert cached_files() == [kept]
    os.utime(folder / "model.safetensors", ns=(1, 1))
    open_model(folder, quantize="q4")
    open_model(folder, quantize="q8")
    assert len(cached_files()) == 3


def test_other_kinds_and_gguf_files_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^load: quantize must be one of q8, q4, got 'q5'$"):
        open_model(folder, quantize="q5")
    path = hf_models.write_gguf("llama", hf_models.make_model("llama"), tmp_path / "tiny.gguf")
    with pytest.raises(ValueError, match=r"quantize must be left out for a GGUF file"):
        open_model(path, quantize="q8")
