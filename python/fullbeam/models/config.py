# SPDX-License-Identifier: Apache-2.0
"""What shapes a decoder, and its weights: what files are read into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from fullbeam.engine.batch import FloatArray
from fullbeam.ops import Array

Matrix: TypeAlias = Any  # what `ops.linear` and `ops.embedding` take on the model's device


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of one layer."""

    inv_freq: FloatArray  # [rotated dimensions / 2], scaling already applied
    interleaved: bool = False  # pairs (2 i, 2 i + 1) instead of halves
    scale: float = 1.0  # factor of cosine and sine


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that tells one family's forward pass from another's."""

    vocab_size: int
    context_len: int  # positions that the model was made for
    hidden_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    ropes: tuple[Rope | None, ...]  # per layer; None: positions are learned
    windows: tuple[int, ...]  # per layer: keys that a query sees; 0 = all before it
    attention_scale: float
    norm_eps: float
    norm_offset: float = 0.0  # 1 where norm weights are stored as a difference from 1
    attention_softcap: float = 0.0
    embedding_scale: float = 1.0
    activation: str = "silu"
    is_gated: bool = True  # the MLP is activation(gate) * up rather than activation(up)
    is_parallel: bool = False  # the MLP sees the layer's input, not what attention made of it
    logit_softcap: float = 0.0


@dataclass(frozen=True)
class Linear:
    """A matrix [rows, cols] and what is added to its products."""

    weight: Matrix
    bias: Array | None = None  # [rows]


@dataclass(frozen=True)
class Norm:
    """A root-mean-square norm, or a layer norm where there is a bias."""

    weight: Array  # [hidden_size]
    bias: Array | None = None


@dataclass(frozen=True)
class LayerWeights:
    """Weights of one layer; what a family lacks is None."""

    attention_norm: Norm
    qkv: Linear  # [(num_q_heads + 2 * num_kv_heads) * head_dim, hidden_size]
    attention_out: Linear  # [hidden_size, num_q_heads * head_dim]
    ffn_norm: Norm
    up: Linear  # [2 * ffn_size, hidden_size], the gate's rows first; [ffn_size, ...] without one
    down: Linear  # [hidden_size, ffn_size]
    q_norm: Array | None = None  # [head_dim]
    k_norm: Array | None = None
    post_attention_norm: Array | None = None  # [hidden_size], before the residual is added
    post_ffn_norm: Array | None = None


@dataclass(frozen=True)
class Weights:
    """Weights of the whole model; `head` is `embedding` where the two are tied."""

    embedding: Matrix  # [vocab_size, hidden_size]
    layers: tuple[LayerWeights, ...]
    output_norm: Norm
    head: Matrix  # [vocab_size, hidden_size]
    positions: Matrix | None = None  # [context_len, hidden_size], added to the embedding
