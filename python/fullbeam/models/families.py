# SPDX-License-Identifier: Apache-2.0
"""Model families: metadata as GGUF names it -> DecoderConfig."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from fullbeam.engine.memory import DEFAULT_CONTEXT
from fullbeam.models.config import DecoderConfig, Rope
from fullbeam.models.ropes import inverse_frequencies, read_rope
from fullbeam.models.source import Source

_MAX_SIZE = 1 << 24


@dataclass(frozen=True)
class Family:
    """How a family differs from Llama.

    Norms with biases, biases of products, query and key norms, post-norms, fused matrices and
    learned positions are read where the tensors are there.
    """

    rope_interleaved: bool = False  # in GGUF files
    activation: str = "silu"
    is_gated: bool = True
    is_parallel: bool = False  # unless the metadata says otherwise
    is_norm_offset: bool = False  # norms are trained as a difference from 1
    is_embedding_scaled: bool = False  # by sqrt(hidden_size)
    window_pattern: int = 0  # every n-th layer sees everything; 0: all layers are alike
    local_rope_base: float = 0.0  # of the windowed layers, where it is another
    wide_scale_layers: int = 0  # a model of so many layers scales queries by hidden_size / heads


_GEMMA = Family(activation="gelu_tanh", is_norm_offset=True, is_embedding_scaled=True)

FAMILIES = {
    "llama": Family(rope_interleaved=True),
    "qwen2": Family(),
    "qwen3": Family(),
    "gemma3": replace(_GEMMA, window_pattern=6, local_rope_base=10000.0, wide_scale_layers=62),
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA, window_pattern=2, wide_scale_layers=46),
    "starcoder2": Family(activation="gelu_tanh", is_gated=False),
    "phi3": Family(),
    "gpt2": Family(activation="gelu_tanh", is_gated=False),
    "gptneox": Family(activation="gelu", is_gated=False, is_parallel=True),
}

# What else activations are called.
_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
} | {name: name for name in ("silu", "gelu", "gelu_tanh")}


class _Sizes:
    """The metadata of a source's architecture."""

    def __init__(self, source: Source, arch: str) -> None:
        self.source = source
        self.arch = arch

    def size(self, key: str, default: int | None = None) -> int:
        name = f"{self.arch}.{key}"
        get = self.source.get
        value = get(name, int) if default is None else get(name, int, default)
        if not 1 <= value <= _MAX_SIZE:
            raise self.error(key, f"must be in 1..{_MAX_SIZE}", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        name = f"{self.arch}.{key}"
        get = self.source.get
        value = get(name, float) if default is None else get(name, float, default)
        if not value >= 0 or not math.isfinite(value):
            raise self.error(key, "must be finite and at least 0", value)
        return value

    def error(self, key: str, requirement: str, value: object) -> ValueError:
        name = self.source.name_of(f"{self.arch}.{key}")
        return ValueError(f"{self.source.path}: {name} {requirement}, got {value}")


def read_config(source: Source, *, context: int | None = None) -> DecoderConfig:
    """Read a model's shape from a source's metadata.

    Parameters
    ----------
    source : what the model is read from
    context : most tokens of a text, where the caller wants another number than the default
    """
    arch = source.get("general.architecture", str)
    family = FAMILIES.get(arch)
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(f"{source.path}: general.architecture must be one of {known}, got {arch}")
    data = _Sizes(source, arch)
    hidden_size, num_layers = data.size("embedding_length"), data.size("block_count")
    num_q_heads = data.size("attention.head_count")
    num_kv_heads = data.size("attention.head_count_kv", num_q_heads)
    head_dim = data.size("attention.key_length", hidden_size // num_q_heads)
    if data.size("attention.value_length", head_dim) != head_dim:
        raise ValueError(f"{source.path}: {arch}.attention.value_length must equal key_length")
    if num_layers > 1024 or num_q_heads % num_kv_heads or head_dim % 16 or head_dim > 512:
        raise ValueError(
            f"{source.path}: the model must have at most 1024 layers, heads of a multiple of 16 up "
            f"to 512 dimensions, and query heads a multiple of KV heads; got {num_layers} layers, "
            f"{num_q_heads} and {num_kv_heads} heads of {head_dim}"
        )
    is_wide = num_layers == family.wide_scale_layers
    scale = 1.0 / math.sqrt(hidden_size / num_q_heads if is_wide else head_dim)
    is_rms = source.get(f"{arch}.attention.layer_norm_epsilon", float, None) is None
    eps_key = "attention.layer_norm_rms_epsilon" if is_rms else "attention.layer_norm_epsilon"
    context_len = data.size("context_length")
    windows = _windows(data, family, num_layers)
    wanted = min(context_len, DEFAULT_CONTEXT if context is None else context)
    return DecoderConfig(
        vocab_size=_vocab_size(source),
        context_len=context_len,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        ffn_size=data.size("feed_forward_length"),
        ropes=_ropes(data, family, windows, head_dim, wanted),
        windows=windows,
        attention_scale=data.number("attention.scale", scale),
        norm_eps=data.number(eps_key),
        norm_offset=float(family.is_norm_offset and not source.is_converted),
        attention_softcap=data.number("attn_logit_softcapping", 0.0),
        embedding_scale=math.sqrt(hidden_size) if family.is_embedding_scaled else 1.0,
        activation=_activation(data, family),
        is_gated=family.is_gated,
        is_parallel=source.get(f"{arch}.use_parallel_residual", bool, family.is_parallel),
        logit_softcap=data.number("final_logit_softcapping", 0.0),
    )


def _vocab_size(source: Source) -> int:
    table = source.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        name = source.name_of("token_embd.weight")
        raise ValueError(f"{source.path}: tensor {name} must be a matrix")
    return table.shape[0]


def _activation(data: _Sizes, family: Family) -> str:
    name = data.source.get(f"{data.arch}.hidden_activation", str, family.activation)
    if name not in _ACTIVATIONS:
        raise data.error("hidden_activation", f"must be one of {', '.join(_ACTIVATIONS)}", name)
    return _ACTIVATIONS[name]


def _windows(data: _Sizes, family: Family, num_layers: int) -> tuple[int, ...]:
    """Keys that each layer sees; 0: all."""
    source, arch = data.source, data.arch
    is_local = [f"{arch}.attention.sliding_window" in source.metadata] * num_layers
    if family.window_pattern:
        is_local = [(idx + 1) % family.window_pattern != 0 for idx in range(num_layers)]
    given = source.get(f"{arch}.attention.sliding_window_pattern", np.ndarray, None)
    if given is not None:
        if given.dtype != np.bool_ or len(given) != num_layers:
            raise data.error(
                "attention.sliding_window_pattern", f"must be {num_layers} bools", given
            )
        is_local = given.tolist()
    window = data.size("attention.sliding_window") if any(is_local) else 0
    return tuple(window if local else 0 for local in is_local)


def _ropes(
    data: _Sizes, family: Family, windows: tuple[int, ...], head_dim: int, context_len: int
) -> tuple[Rope | None, ...]:
    source, arch = data.source, data.arch
    if "position_embd.weight" in source.tensors:
        return (None,) * len(windows)
    num_rotated = data.size("rope.dimension_count", head_dim)
    if num_rotated % 2 or num_rotated > head_dim:
        raise data.error(
            "rope.dimension_count", f"must be even and at most {head_dim}", num_rotated
        )
    base = data.number("rope.freq_base", 10000.0)
    if base <= 1:
        raise data.error("rope.freq_base", "must be above 1", base)
    interleaved = family.rope_interleaved and source.is_converted
    everywhere = read_rope(
        source, arch, base, num_rotated, context_len=context_len, interleaved=interleaved
    )
    if not family.local_rope_base:
        return (everywhere,) * len(windows)
    local_base = data.number("rope.freq_base_swa", family.local_rope_base)
    local = Rope(inverse_frequencies(local_base, num_rotated).astype(np.float32), interleaved)
    return tuple(local if window else everywhere for window in windows)
