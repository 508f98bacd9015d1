# SPDX-License-Identifier: Apache-2.0
"""The kernels as functions on arrays.

Arrays are numpy arrays or anything with ``__dlpack__`` (torch, cupy, jax); nothing is copied.
Results are new arrays of the first argument's kind unless ``out`` is given. Activations are
float32, contiguous in their last dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fullbeam import _core
from fullbeam._core import PackedWeight

Array = Any

__all__ = [
    "PackedWeight",
    "attention_decode",
    "attention_prefill",
    "embedding",
    "gated_activation",
    "kv_write",
    "linear",
    "logprobs",
    "pack_weight",
    "rms_norm",
    "rope",
    "sample",
]


def _new(like: Array, shape: tuple[int, ...], dtype: str = "float32") -> Array:
    if isinstance(like, np.ndarray):
        return np.empty(shape, dtype)
    if hasattr(like, "new_empty"):  # torch
        import torch

        return like.new_empty(shape, dtype=getattr(torch, dtype))
    return np.empty(shape, dtype)


def pack_weight(
    parts: Sequence[tuple[Array, str, tuple[int, int]]],
    *,
    on_stretch: Callable[[int, int], None] | None = None,
) -> PackedWeight:
    """Lay a weight matrix out for `linear` and `embedding`.

    Parameters
    ----------
    parts : (data, type, (rows, cols)) each
        uint8 bytes of a GGUF tensor, row-major, and its type: F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0
        Q5_1 Q4_K Q5_K Q6_K. Parts are stacked by rows and keep their types: one product serves
        query, key and value, or gate and up.
    on_stretch : called after every few megabytes with the index of the part and the bytes packed
        Lets the caller show progress, and drop pages of a mapped file that have been read.

    Returns
    -------
    PackedWeight
        With ``shape``, ``types`` and ``num_bytes``; independent of the arrays given.

    Raises
    ------
    ValueError
        Unknown type, columns that are no multiple of its block, or a number of bytes that
        doesn't fit the shape.
    """
    return _core.pack_weight(list(parts), on_stretch)


def embedding(
    token_ids: Array, table: PackedWeight, *, scale: float = 1.0, out: Array | None = None
) -> Array:
    """``scale * table[token_ids]``, dequantised.

    Parameters
    ----------
    token_ids : int32 [num_tokens]
        An id outside the table gives zeros.
    table : PackedWeight [vocab_size, hidden_size]

    Returns
    -------
    float32 [num_tokens, hidden_size]
    """
    if out is None:
        out = _new(token_ids, (token_ids.shape[0], table.shape[1]))
    _core.embedding(token_ids, table, out, scale)
    return out


def rms_norm(
    x: Array,
    weight: Array,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    residual: Array | None = None,
    out: Array | None = None,
) -> Array:
    """``x / sqrt(mean(x**2) + eps) * (weight + weight_offset) [+ residual]``, last dimension.

    Parameters
    ----------
    x : float32 [num_tokens, size] or [num_tokens, num_heads, size]
        Token and head strides are free. ``out`` may be ``x`` or ``residual``.
    weight : float32 [size]
    eps : at least 0
    residual : like ``x``

    Returns
    -------
    float32, the shape of ``x``
    """
    if out is None:
        out = _new(x, tuple(x.shape))
    _core.rms_norm(x, weight, residual, out, eps, weight_offset)
    return out


def linear(
    x: Array,
    weight: PackedWeight,
    *,
    bias: Array | None = None,
    residual: Array | None = None,
    out: Array | None = None,
) -> Array:
    """``x @ weight.T [+ bias] [+ residual]``.

    Parameters
    ----------
    x : float32 [num_tokens, cols]
    weight : PackedWeight [rows, cols]
        Quantised parts meet ``x`` quantised to int8 per 32 columns; float parts meet it as it is.
    bias : float32 [rows]
    residual : float32 [num_tokens, rows]
        ``out`` may be ``residual``.

    Returns
    -------
    float32 [num_tokens, rows]

    Notes
    -----
    A row of the result is the same bits whatever the other rows are, and however many.
    """
    if out is None:
        out = _new(x, (x.shape[0], weight.shape[0]))
    _core.linear(x, weight, bias, residual, out)
    return out


def rope(
    x: Array, positions: Array, inv_freq: Array, *, interleaved: bool = False, scale: float = 1.0
) -> Array:
    """Rotate the first ``2 * len(inv_freq)`` dimensions of every head by its position, in place.

    Parameters
    ----------
    x : float32 [num_tokens, num_heads, head_dim]
        Token and head strides are free.
    positions : int32 [num_tokens]
    inv_freq : float32 [n]
        Angle per position; pair i is dimensions (i, i + n), or (2 i, 2 i + 1) where
        ``interleaved``.
    scale : factor of cosine and sine (YaRN's attention factor)

    Returns
    -------
    ``x``
    """
    _core.rope(x, positions, inv_freq, interleaved, scale)
    return x


def kv_write(k: Array, v: Array, k_pages: Array, v_pages: Array, slots: Array) -> None:
    """Write keys and values into their pages, in place.

    Parameters
    ----------
    k, v : float32 [num_tokens, num_kv_heads, head_dim]
    k_pages, v_pages : float32, float16 or bfloat16 [num_pages, num_kv_heads, page_size, head_dim]
        Each page contiguous, at any distance from the next. float16 saturates at its largest
        finite value.
    slots : int64 [num_tokens]
        ``page * page_size + offset``; a negative slot is skipped.

    Raises
    ------
    ValueError
        A slot beyond the cache.
    """
    _core.kv_write(k, v, k_pages, v_pages, slots)


def attention_prefill(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    page_table: Array,
    seq_lens: Array,
    query_starts: Array,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    out: Array | None = None,
) -> Array:
    """Causal attention of several query tokens per sequence over paged KV.

    Parameters
    ----------
    q : float32 [num_tokens, num_q_heads, head_dim]
        head_dim a multiple of 16 up to 512; num_q_heads a multiple of num_kv_heads.
    k_pages, v_pages : float32, float16 or bfloat16 [num_pages, num_kv_heads, page_size, head_dim]
    page_table : int32 [num_seqs, max_pages]
        Entries beyond a sequence's length are never read.
    seq_lens : int32 [num_seqs]
        Keys of each sequence, this call's tokens included.
    query_starts : int32 [num_seqs + 1]
        Sequence i owns rows query_starts[i]:query_starts[i + 1] of ``q``: its last positions.
    scale : factor of q.k
    window : keys that a query sees, its own included; 0 = all up to its own
    softcap : scores become ``softcap * tanh(score / softcap)``; 0 = off

    Returns
    -------
    float32 [num_tokens, num_q_heads, head_dim]

    Notes
    -----
    A query's result is the same bits in any chunk and batch, and from `attention_decode`.
    """
    if out is None:
        out = _new(q, tuple(q.shape))
    _core.attention_prefill(
        q, k_pages, v_pages, page_table, seq_lens, query_starts, out, scale, window, softcap
    )
    return out


def attention_decode(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    page_table: Array,
    seq_lens: Array,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    out: Array | None = None,
) -> Array:
    """Attention of one query token per sequence, at its last position, over paged KV.

    Parameters
    ----------
    q : float32 [num_seqs, num_q_heads, head_dim]
        The rest as in `attention_prefill`.

    Returns
    -------
    float32 [num_seqs, num_q_heads, head_dim]
    """
    if out is None:
        out = _new(q, tuple(q.shape))
    _core.attention_decode(q, k_pages, v_pages, page_table, seq_lens, out, scale, window, softcap)
    return out


def gated_activation(x: Array, *, activation: str = "silu", out: Array | None = None) -> Array:
    """``activation(x[:, :size]) * x[:, size:]``.

    Parameters
    ----------
    x : float32 [num_tokens, 2 * size]
        Gate, then up.
    activation : "silu", "gelu" or "gelu_tanh"

    Returns
    -------
    float32 [num_tokens, size]
    """
    if out is None:
        out = _new(x, (x.shape[0], x.shape[1] // 2))
    _core.gated_activation(x, out, activation)
    return out


def logprobs(
    logits: Array, token_ids: Array, *, num_top: int = 0
) -> tuple[Array, Array, Array, Array]:
    """Log-probabilities (natural, over the whole vocabulary) of given tokens and of the best ones.

    Parameters
    ----------
    logits : float32 [num_rows, vocab_size]
    token_ids : int32 [num_rows]
        -1 gives NaN and rank 0, as does a row without a distribution (NaN, or all -inf).
    num_top : 0..vocab_size

    Returns
    -------
    logprobs : float32 [num_rows], of ``token_ids``
    ranks : int32 [num_rows], 1 = best
    top_ids : int32 [num_rows, num_top], best first, ties by lower id
    top_logprobs : float32 [num_rows, num_top]
    """
    num_rows = logits.shape[0]
    chosen = _new(logits, (num_rows,))
    ranks = _new(logits, (num_rows,), "int32")
    top_ids = _new(logits, (num_rows, num_top), "int32")
    top = _new(logits, (num_rows, num_top))
    _core.logprobs(logits, token_ids, chosen, ranks, top_ids, top)
    return chosen, ranks, top_ids, top


def sample(
    logits: Array,
    *,
    temperature: Array,
    top_k: Array,
    top_p: Array,
    min_p: Array,
    seeds: Array,
    counters: Array,
    out: Array | None = None,
) -> Array:
    """Draw one token per row: temperature, min-p, top-k, top-p (of what top-k left), then the draw.

    Parameters
    ----------
    logits : float32 [num_rows, vocab_size]
    temperature : float32 [num_rows], at least 0
        0 is the best token, the lowest id among equals.
    top_k : int32 [num_rows]
        0 or less is off.
    top_p : float32 [num_rows] in [0, 1]
        1 is off, 0 the best token only.
    min_p : float32 [num_rows] in [0, 1]
        Least probability relative to the best token's; 0 is off.
    seeds : uint64 [num_rows]
    counters : uint32 [num_rows, 3]
        Prompt index, choice index, position: with the seed, all that the draw depends on.

    Returns
    -------
    int32 [num_rows]
        -1 where a row is all -inf or holds NaN; logits of +inf share the mass equally.
    """
    if out is None:
        out = _new(logits, (logits.shape[0],), "int32")
    _core.sample(logits, temperature, top_k, top_p, min_p, seeds, counters, out)
    return out
