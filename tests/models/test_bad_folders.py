# SPDX-License-Identifier: Apache-2.0
"""Folders and split files that can't be loaded: errors name the file, the tensor or the key."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import hf_models
from fullbeam import models
from fullbeam.engine import device
from fullbeam.models import open_model

Edit = Callable[[Path], Any]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    return hf_models.save("llama", hf_models.make_model("llama"), folder)


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


def edit_json(name: str, **changes: Any) -> Edit:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | changes
        content = {key: value for key, value in content.items() if value is not ...}
        (folder / name).write_text(json.dumps(content))

    return edit


def edit_tensors(**changes: Any) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path) | {name.replace("__", "."): v for name, v in changes.items()}
        save_file({name: v for name, v in tensors.items() if v is not None}, path)

    return edit


def replace_by_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04")


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def add_index(folder: Path, name: str) -> None:
    weight_map = {"lm_head.weight": name}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")


DOWN = "model__layers__1__mlp__down_proj__weight"
BAD: dict[str, tuple[Edit, str]] = {
    "architecture": (
        edit_json("config.json", model_type="mamba"),
        r"config\.json: model_type must be one of llama, .*, got 'mamba'$",
    ),
    "images": (
        edit_json("config.json", model_type="gemma3"),
        r"got 'gemma3' \(a model with images",
    ),
    "no size": (
        edit_json("config.json", hidden_size=...),
        r"config\.json: hidden_size or n_embd must be a whole number .*, got None$",
    ),
    "zero layers": (
        edit_json("config.json", num_hidden_layers=0),
        r"config\.json: num_hidden_layers or n_layer must be a whole number .*, got 0$",
    ),
    "no norm eps": (
        edit_json("config.json", rms_norm_eps=...),
        r"must have config\.json's rms_norm_eps, which is absent$",
    ),
    "kind": (
        edit_json("config.json", num_attention_heads="four"),
        r"config\.json's num_attention_heads or n_head must be int, got str$",
    ),
    "activation": (
        edit_json("config.json", hidden_act="relu2"),
        r"config\.json's hidden_act .* must be one of .*gelu.*, got relu2$",
    ),
    "rope": (
        edit_json("config.json", rope_parameters={"rope_type": "spiral"}),
        r"config\.json: rope_type must be one of default, .*, got 'spiral'$",
    ),
    "rope factor": (
        edit_json("config.json", rope_parameters={"rope_type": "linear"}),
        r"config\.json: rope scaling linear must have 'factor'",
    ),
    "layer types": (
        edit_json("config.json", layer_types=["linear_attention"] * 3),
        r"config\.json: layer_types must be 3 of sliding_attention, full_attention",
    ),
    "quantised": (
        edit_json("config.json", quantization_config={"quant_method": "gptq"}),
        r"config\.json: quantization_config must be None, got",
    ),
    "json": (
        lambda folder: (folder / "config.json").write_text("{"),
        r"config\.json: must be JSON",
    ),
    "shape": (
        edit_tensors(**{DOWN: np.zeros((64, 97), np.float32)}),
        r"tensor model\.layers\.1\.mlp\.down_proj\.weight must be \[64, 96\], got \[64, 97\]$",
    ),
    "missing tensor": (
        edit_tensors(**{DOWN: None}),
        r"tensor model\.layers\.1\.mlp\.down_proj\.weight must be present, got none$",
    ),
    "type": (
        edit_tensors(**{DOWN: np.zeros((64, 96), np.int64)}),
        r"tensor model\.layers\.1\.mlp\.down_proj\.weight must be F32, F16, BF16, got I64$",
    ),
    "strange tensor": (
        edit_tensors(model__layers__1__mlp__experts=np.zeros(3, np.float32)),
        r"tensor model\.layers\.1\.mlp\.experts must be one of a llama model of 3 layers$",
    ),
    "more layers": (
        edit_json("config.json", num_hidden_layers=2),
        r"tensor model\.layers\.2\..* must be one of a llama model of 2 layers$",
    ),
    "pickle": (replace_by_pickle, r"file pytorch_model\.bin is a pickle, .* never loaded"),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        r"file model\.safetensors or model\.safetensors\.index\.json must be there, got neither$",
    ),
    "truncated": (truncate, r"model\.safetensors: must be a whole safetensors file"),
    "missing shard": (
        lambda folder: add_index(folder, "model-00001-of-00002.safetensors"),
        r"file model-00001-of-00002\.safetensors must be there, as .*index\.json says$",
    ),
    "shard elsewhere": (
        lambda folder: add_index(folder, "../good/model.safetensors"),
        r"index\.json: weight_map must name files of this folder$",
    ),
    "no tokenizer": (
        without_tokenizer,
        r"file tokenizer\.json must be there, got tokenizer\.model: write it with transformers",
    ),
    "damaged tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        r"tokenizer\.json: must be a tokenizer of the tokenizers library",
    ),
    "eos": (
        edit_json("config.json", eos_token_id=[7, 300]),
        r"bos_token_id and eos_token_id must be in 0\.\.299, got 300$",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_are_named(folder: Path, case: str) -> None:
    edit, text = BAD[case]
    edit(folder)
    with pytest.raises(ValueError, match=text) as error:
        open_model(folder)
    assert str(folder) in str(error.value)


def test_a_model_that_does_not_fit_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "available_bytes", lambda: 100 << 10)
    with pytest.raises(ValueError, match=r"must fit in memory: they take 0 MiB, 0 MiB are"):
        models.open_model(folder)


def test_tables_that_older_versions_saved_are_no_matter(folder: Path) -> None:
    mask = np.ones((1, 1, 9, 9), np.bool_)
    edit_tensors(model__layers__0__attn__bias=mask, model__layers__0__attention__bias=mask)(folder)
    assert open_model(folder).decoder.config.num_layers == 3


def test_shards_are_one_model(tmp_path: Path) -> None:
    model = hf_models.make_model("llama")
    folder = hf_models.save("llama", model, tmp_path / "cut", max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    whole = open_model(hf_models.save("llama", model, tmp_path / "whole"))
    cut = open_model(folder)
    assert cut.decoder.config.num_layers == whole.decoder.config.num_layers
    for ours, theirs in zip(cut.decoder.weights.layers, whole.decoder.weights.layers, strict=True):
        np.testing.assert_array_equal(ours.ffn_norm.weight, theirs.ffn_norm.weight)
    assert cut.decoder.weights.embedding.num_bytes == whole.decoder.weights.embedding.num_bytes
