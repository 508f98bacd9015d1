# SPDX-License-Identifier: Apache-2.0
"""Hugging Face folders (config.json and safetensors), seen as a source under GGUF's names."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fullbeam.models.gguf_header import MetadataValue
from fullbeam.models.layouts import KEYS, LAYOUTS, Layout
from fullbeam.models.ropes import llama3_factors, longrope_scale
from fullbeam.models.safetensors_file import FileTensor, SafetensorsFile
from fullbeam.models.source import Bytes, Source, Tensor

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

_TYPES = ("F32", "F16", "BF16")
# What models were saved with, but nobody reads: tables that can be computed.
_IGNORED = re.compile(
    r"\.(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)$|\.attention\.(bias|masked_bias)$"
)
# Keys that change what a model computes, and the values with which they don't.
_REFUSED: dict[str, tuple[object, ...]] = {
    "quantization_config": (None,),
    "scale_attn_weights": (None, True),
    "scale_attn_by_inverse_layer_idx": (None, False),
    "use_bidirectional_attention": (None, False),
}
_WINDOWED = {"sliding_attention": True, "full_attention": False}


@dataclass(frozen=True, eq=False)
class _Computed:
    """A tensor that config.json implies."""

    name: str
    values: npt.NDArray[np.float32]
    type: str = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def data(self) -> Bytes:
        return self.values.view(np.uint8)

    @property
    def num_bytes(self) -> int:
        return self.values.nbytes


class HuggingFaceFolder(Source):
    """An open folder; use `open`."""

    is_converted = False

    def __init__(self, path: Path, config: dict[str, Any], files: list[SafetensorsFile]) -> None:
        self.path = path
        self.config = config
        self._files = files
        model_type = config.get("model_type")
        if model_type not in LAYOUTS:
            hint = ""
            if model_type == "gemma3":
                hint = " (a model with images: take the text model's folder, or a GGUF file)"
            raise ValueError(
                f"{path / 'config.json'}: model_type must be one of {', '.join(LAYOUTS)}, "
                f"got {model_type!r}{hint}"
            )
        self._layout = LAYOUTS[model_type]
        metadata, computed = _Translation(path, config, self._layout).run()
        self.metadata = metadata
        self.tensors = self._named_tensors() | computed

    @classmethod
    def open(cls, path: str | Path) -> HuggingFaceFolder:
        """Read a folder's config.json and map its safetensors files.

        Raises
        ------
        ValueError
            Where a file is missing or damaged, the architecture or a key of config.json isn't
            known, or tensors are there that the architecture doesn't have; the text names it.
        """
        path = Path(path)
        config = read_json(path / "config.json")
        files: list[SafetensorsFile] = []
        try:
            for name in shard_names(path):
                files.append(SafetensorsFile(path / name))
            return cls(path, config, files)
        except BaseException:
            for file in files:
                file.close()
            raise

    @property
    def files(self) -> list[Path]:
        """What the folder's model is read from."""
        return [self.path / "config.json", *(file.path for file in self._files)]

    def name_of(self, name: str) -> str:
        arch, _, key = name.partition(".")
        if arch == self._layout.arch:
            known = [own for own, ours in KEYS.items() if ours == key]
            return f"config.json's {' or '.join(known) or key}"
        stem, _, ending = name.rpartition(".")
        return f"{_hugging_face_name(self._layout, stem)}.{ending}"

    def release(self, tensor: Tensor) -> None:
        if isinstance(tensor, FileTensor):
            tensor.file.release(tensor)

    def close(self) -> None:
        self.tensors = {}
        for file in self._files:
            file.close()

    def _named_tensors(self) -> dict[str, Tensor]:
        found = {name: tensor for file in self._files for name, tensor in file.tensors.items()}
        left = {name for name in found if not _IGNORED.search(name)}
        tensors: dict[str, Tensor] = {}
        for stem in _stems(self._layout, self.metadata[f"{self._layout.arch}.block_count"]):
            for ending in ("weight", "bias"):
                name = f"{_hugging_face_name(self._layout, stem)}.{ending}"
                if name not in found:  # saved without the head
                    name = name.partition(".")[2]
                if name not in found:
                    continue
                left.remove(name)
                if stem == "output" and self.config.get("tie_word_embeddings"):
                    continue
                if found[name].type not in _TYPES:
                    raise ValueError(
                        f"{self.path}: tensor {name} must be {', '.join(_TYPES)}, "
                        f"got {found[name].type}"
                    )
                tensors[f"{stem}.{ending}"] = self._arranged(stem, found[name])
        if left:
            raise ValueError(
                f"{self.path}: tensor {min(left)} must be one of a {self.config['model_type']} "
                f"model of {self.metadata[f'{self._layout.arch}.block_count']} layers"
            )
        return tensors

    def _arranged(self, stem: str, tensor: FileTensor) -> FileTensor:
        if self._layout.is_transposed and stem.startswith("blk.") and len(tensor.shape) == 2:
            return _transposed(tensor)
        if self._layout.is_qkv_by_head and stem.endswith("attn_qkv"):
            return _split_heads(tensor, self.config["num_attention_heads"])
        return tensor


class _Translation:
    """config.json -> GGUF's metadata, and the tensors that converters compute from it."""

    def __init__(self, path: Path, config: dict[str, Any], layout: Layout) -> None:
        self._where = path / "config.json"
        self._config = config
        self._layout = layout
        self._metadata: dict[str, MetadataValue] = {"general.architecture": layout.arch}
        self._computed: dict[str, Tensor] = {}

    def run(self) -> tuple[dict[str, MetadataValue], dict[str, Tensor]]:
        for key, allowed in _REFUSED.items():
            if self._config.get(key) not in allowed:
                raise self._error(key, f"must be {allowed[-1]}", self._config[key])
        for key, name in KEYS.items():
            value = self._config.get(key)
            if value is not None and key not in self._layout.ignored_keys:
                self._set(name, value)
        scalar = self._config.get("query_pre_attn_scalar")
        if scalar is not None:
            self._set("attention.scale", float(scalar) ** -0.5)
        num_layers, hidden_size = self._get_size("block_count"), self._get_size("embedding_length")
        if not self._has("feed_forward_length"):
            self._set("feed_forward_length", 4 * hidden_size)
        self._windows(num_layers)
        if "position_embd" not in self._layout.whole:
            self._ropes()
        return self._metadata, self._computed

    def _windows(self, num_layers: int) -> None:
        config = self._config
        window, kinds = config.get("sliding_window"), config.get("layer_types")
        if config.get("use_sliding_window") is False:
            window = None
        if kinds is not None:
            unknown = [kind for kind in kinds if kind not in _WINDOWED]
            if unknown or len(kinds) != num_layers:
                requirement = f"must be {num_layers} of {', '.join(_WINDOWED)}"
                raise self._error("layer_types", requirement, kinds)
            is_local = [_WINDOWED[kind] for kind in kinds]
        elif "max_window_layers" in config:
            is_local = [idx >= config["max_window_layers"] for idx in range(num_layers)]
        elif pattern := config.get("sliding_window_pattern"):
            is_local = [(idx + 1) % pattern != 0 for idx in range(num_layers)]
        else:
            if window is not None:
                self._set("attention.sliding_window", window)
            return
        if window is None:
            is_local = [False] * num_layers
        else:
            self._set("attention.sliding_window", window)
        self._metadata[f"{self._layout.arch}.attention.sliding_window_pattern"] = np.array(is_local)

    def _ropes(self) -> None:
        config = self._config
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        base = config.get("rope_theta") or config.get("rotary_emb_base")
        local_base = config.get("rope_local_base_freq")
        if "full_attention" in rope:
            local = rope["sliding_attention"]
            if local.get("rope_type", "default") != "default":
                raise self._error("rope_parameters", "must leave windowed layers unscaled", local)
            local_base, rope = local.get("rope_theta", local_base), rope["full_attention"]
        base = rope.get("rope_theta") or base or 10000.0
        self._set("rope.freq_base", float(base))
        if local_base is not None:
            self._set("rope.freq_base_swa", float(local_base))
        num_rotated = self._head_dim()
        for partial in (rope, config):
            share = partial.get("partial_rotary_factor", partial.get("rotary_pct"))
            if share is not None:
                num_rotated = int(self._head_dim() * share)
                break
        self._set("rope.dimension_count", num_rotated)
        kind = rope.get("rope_type", rope.get("type", "default"))
        scalings: dict[str, Callable[[dict[str, Any], float, int], None]] = {
            "default": lambda *_: None,
            "dynamic": lambda *_: None,  # changes nothing within the model's context
            "linear": self._linear,
            "yarn": self._yarn,
            "llama3": self._llama3,
            "longrope": self._longrope,
            "su": self._longrope,
        }
        if kind not in scalings:
            raise self._error("rope_type", f"must be one of {', '.join(scalings)}", kind)
        try:
            scalings[kind](rope, float(base), num_rotated)
        except KeyError as error:
            raise self._error(f"rope scaling {kind}", f"must have {error}", rope) from error

    def _linear(self, rope: dict[str, Any], base: float, num_rotated: int) -> None:
        self._set("rope.scaling.type", "linear")
        self._set("rope.scaling.factor", float(rope["factor"]))

    def _yarn(self, rope: dict[str, Any], base: float, num_rotated: int) -> None:
        if not rope.get("truncate", True):
            raise self._error("rope scaling's truncate", "must be true", False)
        factor = float(rope["factor"])
        self._set("rope.scaling.type", "yarn")
        self._set("rope.scaling.factor", factor)
        self._set("rope.scaling.original_context_length", self._original_context(rope))
        self._set("rope.scaling.yarn_beta_fast", float(rope.get("beta_fast") or 32.0))
        self._set("rope.scaling.yarn_beta_slow", float(rope.get("beta_slow") or 1.0))

        def scale_of(weight: float) -> float:
            return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

        given = rope.get("attention_factor")
        if given is None and rope.get("mscale") and rope.get("mscale_all_dim"):
            given = scale_of(rope["mscale"]) / scale_of(rope["mscale_all_dim"])
        if given is not None:
            self._set("rope.scaling.attn_factor", given / scale_of(1.0))

    def _llama3(self, rope: dict[str, Any], base: float, num_rotated: int) -> None:
        factors = llama3_factors(
            base,
            num_rotated,
            factor=rope["factor"],
            low=rope["low_freq_factor"],
            high=rope["high_freq_factor"],
            original=rope["original_max_position_embeddings"],
        )
        self._compute("rope_freqs.weight", "rope scaling llama3", factors)

    def _longrope(self, rope: dict[str, Any], base: float, num_rotated: int) -> None:
        original = self._original_context(rope)
        factor = self._get_size("context_length") / original
        given = rope.get("attention_factor")
        self._set("rope.scaling.type", "longrope")
        self._set("rope.scaling.original_context_length", original)
        scale = longrope_scale(factor, original) if given is None else float(given)
        self._set("rope.scaling.attn_factor", scale)
        for which in ("long", "short"):
            factors = np.array(rope[f"{which}_factor"], np.float32)
            self._compute(f"rope_factors_{which}.weight", f"{which}_factor", factors)

    def _original_context(self, rope: dict[str, Any]) -> int:
        key = "original_max_position_embeddings"
        given = rope.get(key) or self._config.get(key)
        return self._get_size("context_length") if given is None else int(given)

    def _head_dim(self) -> int:
        if self._has("attention.key_length"):
            return self._get_size("attention.key_length")
        return self._get_size("embedding_length") // self._get_size("attention.head_count")

    def _compute(self, name: str, key: str, values: npt.NDArray[np.float32]) -> None:
        self._computed[name] = _Computed(f"config.json's {key}", values)

    def _has(self, name: str) -> bool:
        return f"{self._layout.arch}.{name}" in self._metadata

    def _set(self, name: str, value: MetadataValue) -> None:
        self._metadata[f"{self._layout.arch}.{name}"] = value

    def _get_size(self, name: str) -> int:
        value = self._metadata.get(f"{self._layout.arch}.{name}")
        if type(value) is not int or value < 1:
            keys = " or ".join(own for own, ours in KEYS.items() if ours == name)
            raise self._error(keys, "must be a whole number of at least 1", value)
        return value

    def _error(self, key: str, requirement: str, value: object) -> ValueError:
        return ValueError(f"{self._where}: {key} {requirement}, got {value!r}")


def shard_names(path: Path) -> list[str]:
    """The safetensors files of a folder, in order.

    Raises
    ------
    ValueError
        Where there are none, or one of them is missing.
    """
    if (path / INDEX).is_file():
        names = indexed_files(path / INDEX)
        for name in names:
            if not (path / name).is_file():
                raise ValueError(f"{path}: file {name} must be there, as {INDEX} says")
        return names
    if (path / SINGLE).is_file():
        return [SINGLE]
    pickles = [file.name for ending in ("bin", "pt", "pth") for file in path.glob(f"*.{ending}")]
    if pickles:
        raise ValueError(
            f"{path}: file {min(pickles)} is a pickle, which may run code and is never loaded: "
            "save the model as safetensors (save_pretrained of transformers does)"
        )
    raise ValueError(f"{path}: file {SINGLE} or {INDEX} must be there, got neither")


def indexed_files(index: Path) -> list[str]:
    """The safetensors files that an index names."""
    weight_map = read_json(index).get("weight_map")
    names = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise ValueError(f"{index}: weight_map must name files of this folder")
    return names


def folder_name(folder: Path) -> str:
    """The folder's name, or the repository's where it is a snapshot of the hub's library."""
    if folder.parent.name != "snapshots":
        return folder.name
    return folder.parents[1].name.split("--")[-1]


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object; a ValueError names it where it doesn't."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: must be JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must be a JSON object, got {type(content).__name__}")
    return content


def _stems(layout: Layout, num_layers: object) -> list[str]:
    assert isinstance(num_layers, int)
    parts = [f"blk.{idx}.{part}" for idx in range(num_layers) for part in layout.layer]
    return [*layout.whole, *parts]


def _hugging_face_name(layout: Layout, stem: str) -> str:
    if stem in layout.whole:
        return layout.whole[stem]
    _, idx, part = stem.split(".")
    return layout.layer_prefix.format(idx) + layout.layer.get(part, part)


def _elements(tensor: FileTensor) -> str:
    return "<u4" if tensor.type == "F32" else "<u2"


def _transposed(tensor: FileTensor) -> FileTensor:
    rows, cols = tensor.shape

    def arrange(raw: Bytes) -> Bytes:
        matrix = raw.view(_elements(tensor)).reshape(rows, cols)
        return np.ascontiguousarray(matrix.T).reshape(-1).view(np.uint8)

    return replace(tensor, shape=(cols, rows), arrange=arrange)


def _split_heads(tensor: FileTensor, num_heads: int) -> FileTensor:
    """Rows by (head, query or key or value, dimension) -> all queries, all keys, all values."""
    num_rows = tensor.shape[0]
    if num_rows % (3 * num_heads):
        return tensor  # refused for its shape when it is read

    def arrange(raw: Bytes) -> Bytes:
        rows = raw.reshape(num_heads, 3, num_rows // (3 * num_heads), -1)
        return np.ascontiguousarray(rows.swapaxes(0, 1)).reshape(-1)

    return replace(tensor, arrange=arrange)
