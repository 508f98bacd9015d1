# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of four families: weights under transformers' names, and their GGUF file."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from fullbeam import reference

FloatArray = npt.NDArray[np.float32]

VOCAB_SIZE = 300
_MERGES = [f"{a} {b}" for a in "etaoin" for b in "srhldu"] + ["Ġ t", "Ġt h", "Ġth e", "th e"]

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_GEMMA_NAMES = _NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """Shape of a tiny model, as a GGUF file states it."""

    arch: str = "llama"
    hidden_size: int = 64
    num_layers: int = 3
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    ffn_size: int = 96
    context_len: int = 512
    is_tied: bool = True
    rope_base: float = 10000.0
    linear_factor: float = 1.0  # positions are divided by it (Gemma: in the layers without window)
    rope_factors: tuple[float, ...] = ()  # [head_dim / 2], inverse frequencies are divided by them
    window: int = 0
    num_tokens: int = VOCAB_SIZE  # of the tokenizer; the embedding has VOCAB_SIZE

    @property
    def is_gemma(self) -> bool:
        return self.arch == "gemma3"

    def weights(self, seed: int) -> dict[str, FloatArray]:
        """Random weights under transformers' names."""
        rng = np.random.default_rng(seed)
        hidden, ffn = self.hidden_size, self.ffn_size
        q_size, kv_size = self.num_q_heads * self.head_dim, self.num_kv_heads * self.head_dim

        def matrix(rows: int, cols: int, scale: float = 1.0) -> FloatArray:
            normal = rng.standard_normal((rows, cols), np.float32)
            return normal * np.float32(scale / cols**0.5)

        def norm(size: int) -> FloatArray:
            return (rng.standard_normal(size) * 0.3 + (not self.is_gemma)).astype(np.float32)

        # Gemma scales its embedding up: small, so that a token isn't its own likeliest successor.
        scale, final = (0.25, np.float32(6)) if self.is_gemma else (3.0, np.float32(0))
        out = {"model.embed_tokens.weight": matrix(VOCAB_SIZE, hidden, scale)}
        if not self.is_tied:
            out["lm_head.weight"] = matrix(VOCAB_SIZE, hidden, 3.0)
        for idx in range(self.num_layers):
            layer = {
                "self_attn.q_proj.weight": matrix(q_size, hidden, 1.5),
                "self_attn.k_proj.weight": matrix(kv_size, hidden, 1.5),
                "self_attn.v_proj.weight": matrix(kv_size, hidden),
                "self_attn.o_proj.weight": matrix(hidden, q_size),
                "mlp.gate_proj.weight": matrix(ffn, hidden),
                "mlp.up_proj.weight": matrix(ffn, hidden),
                "mlp.down_proj.weight": matrix(hidden, ffn),
                "input_layernorm.weight": norm(hidden),
                "post_attention_layernorm.weight": norm(hidden),
            }
            if self.is_gemma:
                layer["pre_feedforward_layernorm.weight"] = norm(hidden)
                layer["post_feedforward_layernorm.weight"] = norm(hidden)
            if self.arch == "qwen2":
                for name, size in (("q", q_size), ("k", kv_size), ("v", kv_size)):
                    bias = rng.standard_normal(size) * 0.5
                    layer[f"self_attn.{name}_proj.bias"] = bias.astype(np.float32)
            if self.arch in ("qwen3", "gemma3"):
                layer["self_attn.q_norm.weight"] = norm(self.head_dim)
                layer["self_attn.k_norm.weight"] = norm(self.head_dim)
            out |= {f"model.layers.{idx}.{name}": values for name, values in layer.items()}
        return out | {"model.norm.weight": norm(hidden) + final}

    def write(self, path: Path, weights: dict[str, FloatArray], *types: str) -> Path:
        """Write a GGUF file as llama.cpp's converter does; matrices take turns in the types."""
        writer = gguf.GGUFWriter(path, self.arch)
        self._add_shape(writer)
        _add_vocabulary(writer, self.num_tokens, is_byte_level=not self.is_gemma)
        kinds = itertools.cycle(types or ("F32",))
        for name, values in weights.items():
            tensor = self._gguf_values(name, values)
            kind = next(kinds) if tensor.ndim == 2 else "F32"
            rows = reference.quantize(tensor, kind).reshape(*tensor.shape[:-1], -1)
            ggml_type = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(self._gguf_name(name), rows, raw_dtype=ggml_type)
        if self.rope_factors:
            writer.add_tensor("rope_freqs.weight", np.array(self.rope_factors, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def _add_shape(self, writer: Any) -> None:
        writer.add_context_length(self.context_len)
        writer.add_embedding_length(self.hidden_size)
        writer.add_block_count(self.num_layers)
        writer.add_feed_forward_length(self.ffn_size)
        writer.add_head_count(self.num_q_heads)
        writer.add_head_count_kv(self.num_kv_heads)
        if self.head_dim * self.num_q_heads != self.hidden_size or self.is_gemma:
            writer.add_key_length(self.head_dim)
            writer.add_value_length(self.head_dim)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_rope_freq_base(self.rope_base)
        if self.linear_factor != 1.0:
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(self.linear_factor)
        if self.window:
            writer.add_sliding_window(self.window)

    def _gguf_name(self, name: str) -> str:
        whole = {
            "model.embed_tokens.weight": "token_embd.weight",
            "model.norm.weight": "output_norm.weight",
            "lm_head.weight": "output.weight",
        }
        if name in whole:
            return whole[name]
        _, _, layer, rest = name.split(".", 3)
        part, kind = rest.rsplit(".", 1)
        return f"blk.{layer}.{(_GEMMA_NAMES if self.is_gemma else _NAMES)[part]}.{kind}"

    def _gguf_values(self, name: str, values: FloatArray) -> FloatArray:
        if self.is_gemma and name.endswith("norm.weight"):
            return values + np.float32(1)
        if self.arch == "llama" and ("q_proj" in name or "k_proj" in name):
            # The halves of a head that rotate together become neighbours.
            heads = values.reshape(-1, 2, self.head_dim // 2, values.shape[1])
            return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(values.shape)
        return values


def _add_vocabulary(writer: Any, num_tokens: int, *, is_byte_level: bool) -> None:
    if is_byte_level:
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        letters = [*map(chr, printable), *(chr(0x100 + idx) for idx in range(len(others)))]
        tokens = [*letters, *(merge.replace(" ", "") for merge in _MERGES)]
        kinds = [gguf.TokenType.NORMAL] * len(tokens)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_merges(_MERGES)
    else:
        pieces = [*(a + b for a in "etaoin" for b in "srhldu"), "\u2581", "\u2581t", "the"]
        tokens = [*(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
        kinds = [gguf.TokenType.BYTE] * 256 + [gguf.TokenType.NORMAL] * len(pieces)
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([-1.0 * idx for idx in range(num_tokens)])
        writer.add_add_space_prefix(False)
    tokens += [f"<{idx}>" for idx in range(num_tokens - len(tokens))]
    kinds += [gguf.TokenType.CONTROL] * (len(tokens) - len(kinds))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(len(tokens) - 2)
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_add_bos_token(True)
