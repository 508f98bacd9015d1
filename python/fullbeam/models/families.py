# SPDX-License-Identifier: Apache-2.0
"""Model families as GGUF files name them: metadata and tensors -> DecoderConfig and Weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fullbeam import ops
from fullbeam.engine.batch import FloatArray
from fullbeam.models.decoder import DecoderConfig, LayerWeights, Rope, Weights
from fullbeam.models.gguf import GgufFile, GgufTensor


@dataclass(frozen=True)
class Family:
    """How a family differs from Llama.

    Biases, query and key norms and post-norms are read where the file has them.
    """

    rope_interleaved: bool = False
    activation: str = "silu"
    is_embedding_scaled: bool = False  # by sqrt(hidden_size)
    window_pattern: int = (
        0  # every n-th layer sees everything, the others a window; 0 = all see everything
    )
    local_rope_base: float = 0.0  # of the windowed layers
    wide_scale_layers: int = 0  # a model of so many layers scales queries by hidden_size / heads


FAMILIES = {
    "llama": Family(rope_interleaved=True),
    "qwen2": Family(),
    "qwen3": Family(),
    "gemma3": Family(
        activation="gelu_tanh",
        is_embedding_scaled=True,
        window_pattern=6,
        local_rope_base=10000.0,
        wide_scale_layers=62,
    ),
}


class WeightReader:
    """Takes tensors out of a file, checking their shapes, and lets the file's pages go."""

    def __init__(self, file: GgufFile, progress: Callable[[int], None]) -> None:
        self._file = file
        self._progress = progress

    def has(self, name: str) -> bool:
        return name in self._file.tensors

    def matrix(self, *parts: tuple[str, int, int]) -> ops.PackedWeight:
        """Stack tensors (name, rows, cols) by rows."""
        tensors = [self._find(name, (rows, cols)) for name, rows, cols in parts]

        def done(part: int, num_bytes: int) -> None:
            self._file.release(tensors[part])
            self._progress(num_bytes)

        return ops.pack_weight(
            [(t.data, t.type, (t.shape[0], t.shape[1])) for t in tensors], on_stretch=done
        )

    def vector(self, name: str, size: int) -> FloatArray:
        tensor = self._find(name, (size,))
        if tensor.type == "F32":
            values = tensor.data.view(np.float32).astype(np.float32)
        elif tensor.type == "F16":
            values = tensor.data.view(np.float16).astype(np.float32)
        elif tensor.type == "BF16":
            values = (tensor.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            raise ValueError(
                f"{self._file.path}: tensor {name} must be F32, F16 or BF16, got {tensor.type}"
            )
        self._file.release(tensor)
        self._progress(len(tensor.data))
        return values

    def optional_vector(self, name: str, size: int) -> FloatArray | None:
        return self.vector(name, size) if self.has(name) else None

    def _find(self, name: str, shape: tuple[int, ...]) -> GgufTensor:
        tensor = self._file.tensors.get(name)
        if tensor is None:
            raise ValueError(f"{self._file.path}: tensor {name} must be present, got none")
        if tensor.shape != shape:
            raise ValueError(
                f"{self._file.path}: tensor {name} must be {list(shape)}, got {list(tensor.shape)}"
            )
        return tensor


def read_config(file: GgufFile) -> DecoderConfig:
    """Read a model's shape from the file's metadata."""
    arch = file.get("general.architecture", str)
    family = FAMILIES.get(arch)
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(f"{file.path}: general.architecture must be one of {known}, got {arch}")

    def size(key: str, default: int | None = None, *, least: int = 1) -> int:
        name = f"{arch}.{key}"
        value = file.get(name, int) if default is None else file.get(name, int, default)
        if not least <= value <= 1 << 24:
            raise ValueError(f"{file.path}: {name} must be in {least}..{1 << 24}, got {value}")
        return value

    hidden_size, num_layers = size("embedding_length"), size("block_count")
    num_q_heads = size("attention.head_count")
    num_kv_heads = size("attention.head_count_kv", num_q_heads)
    head_dim = size("attention.key_length", hidden_size // num_q_heads)
    if size("attention.value_length", head_dim) != head_dim:
        raise ValueError(f"{file.path}: {arch}.attention.value_length must equal key_length")
    if num_layers > 1024 or num_q_heads % num_kv_heads or head_dim % 16 or head_dim > 512:
        raise ValueError(
            f"{file.path}: the model must have at most 1024 layers, heads of a multiple of 16 up "
            f"to 512 dimensions, and query heads a multiple of KV heads; got {num_layers} layers, "
            f"{num_q_heads} and {num_kv_heads} heads of {head_dim}"
        )
    is_wide = num_layers == family.wide_scale_layers  # Gemma 3 27B
    ropes, windows = _layer_kinds(file, arch, family, num_layers, head_dim, size)
    return DecoderConfig(
        vocab_size=_vocab_size(file),
        context_len=size("context_length"),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        ffn_size=size("feed_forward_length"),
        ropes=ropes,
        windows=windows,
        attention_scale=1.0 / math.sqrt(hidden_size / num_q_heads if is_wide else head_dim),
        norm_eps=file.get(f"{arch}.attention.layer_norm_rms_epsilon", float),
        embedding_scale=math.sqrt(hidden_size) if family.is_embedding_scaled else 1.0,
        activation=family.activation,
    )


def _vocab_size(file: GgufFile) -> int:
    table = file.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise ValueError(f"{file.path}: tensor token_embd.weight must be a matrix")
    return table.shape[0]


def _layer_kinds(
    file: GgufFile,
    arch: str,
    family: Family,
    num_layers: int,
    head_dim: int,
    size: Callable[..., int],
) -> tuple[tuple[Rope, ...], tuple[int, ...]]:
    """Rope and window of each layer."""
    num_rotated = size("rope.dimension_count", head_dim)
    if num_rotated % 2 or num_rotated > head_dim:
        raise ValueError(
            f"{file.path}: {arch}.rope.dimension_count must be even and at most {head_dim}, "
            f"got {num_rotated}"
        )
    base = file.get(f"{arch}.rope.freq_base", float, 10000.0)
    scaling = file.get(f"{arch}.rope.scaling.type", str, "none")
    if scaling not in ("none", "linear"):
        raise ValueError(
            f"{file.path}: {arch}.rope.scaling.type must be none or linear, got {scaling}"
        )
    factor = file.get(f"{arch}.rope.scaling.factor", float, 1.0) if scaling == "linear" else 1.0
    for name, value in (("freq_base", base), ("scaling.factor", factor)):
        if not value > 0 or not math.isfinite(value):
            raise ValueError(f"{file.path}: {arch}.rope.{name} must be above 0, got {value}")
    everywhere = Rope(
        _inv_freq(file, base, num_rotated) / np.float32(factor), family.rope_interleaved
    )
    if not family.window_pattern:
        return (everywhere,) * num_layers, (0,) * num_layers
    window = size("attention.sliding_window")
    local_base = file.get(f"{arch}.rope.freq_base_swa", float, family.local_rope_base)
    local = Rope(_inv_freq(file, local_base, num_rotated), family.rope_interleaved)
    is_global = [(layer + 1) % family.window_pattern == 0 for layer in range(num_layers)]
    ropes = tuple(everywhere if sees_all else local for sees_all in is_global)
    return ropes, tuple(0 if sees_all else window for sees_all in is_global)


def _inv_freq(file: GgufFile, base: float, num_rotated: int) -> FloatArray:
    inv_freq = base ** (-np.arange(0, num_rotated, 2, dtype=np.float64) / num_rotated)
    factors = file.tensors.get("rope_freqs.weight")  # Llama 3's scaling, one factor per pair
    if factors is not None:
        if factors.type != "F32" or factors.shape != (num_rotated // 2,):
            raise ValueError(
                f"{file.path}: tensor rope_freqs.weight must be F32 [{num_rotated // 2}], "
                f"got {factors.type} {list(factors.shape)}"
            )
        inv_freq = inv_freq / factors.data.view(np.float32)
    return inv_freq.astype(np.float32)


def read_weights(file: GgufFile, config: DecoderConfig, progress: Callable[[int], None]) -> Weights:
    """Pack a model's weights; ``progress`` is told bytes as they are done."""
    reader = WeightReader(file, progress)
    hidden, vocab = config.hidden_size, config.vocab_size
    embedding = reader.matrix(("token_embd.weight", vocab, hidden))
    head = embedding
    if reader.has("output.weight"):
        head = reader.matrix(("output.weight", vocab, hidden))
    return Weights(
        embedding=embedding,
        layers=tuple(_read_layer(reader, config, idx) for idx in range(config.num_layers)),
        output_norm=reader.vector("output_norm.weight", hidden),
        head=head,
    )


def _read_layer(reader: WeightReader, config: DecoderConfig, idx: int) -> LayerWeights:
    hidden, ffn, dim = config.hidden_size, config.ffn_size, config.head_dim
    q_size, kv_size = config.num_q_heads * dim, config.num_kv_heads * dim
    blk = f"blk.{idx}."
    sizes = {"attn_q": q_size, "attn_k": kv_size, "attn_v": kv_size}
    bias = None
    if reader.has(f"{blk}attn_q.bias"):
        bias = np.concatenate(
            [reader.vector(f"{blk}{name}.bias", size) for name, size in sizes.items()]
        )
    return LayerWeights(
        attention_norm=reader.vector(f"{blk}attn_norm.weight", hidden),
        qkv=reader.matrix(*((f"{blk}{name}.weight", size, hidden) for name, size in sizes.items())),
        qkv_bias=bias,
        q_norm=reader.optional_vector(f"{blk}attn_q_norm.weight", dim),
        k_norm=reader.optional_vector(f"{blk}attn_k_norm.weight", dim),
        attention_out=reader.matrix((f"{blk}attn_output.weight", hidden, q_size)),
        post_attention_norm=reader.optional_vector(f"{blk}post_attention_norm.weight", hidden),
        ffn_norm=reader.vector(f"{blk}ffn_norm.weight", hidden),
        gate_up=reader.matrix(
            (f"{blk}ffn_gate.weight", ffn, hidden), (f"{blk}ffn_up.weight", ffn, hidden)
        ),
        down=reader.matrix((f"{blk}ffn_down.weight", hidden, ffn)),
        post_ffn_norm=reader.optional_vector(f"{blk}post_ffw_norm.weight", hidden),
    )
