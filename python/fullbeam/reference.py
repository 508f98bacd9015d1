# SPDX-License-Identifier: Apache-2.0
"""Every op in plain NumPy and float64: the maths, and the oracle of the tests.

The functions have the names and parameters of `fullbeam.ops`, but return their results instead of
writing in place, and take weights as dense arrays, which `dequantize` makes from a file's bytes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from fullbeam.weight_types import WEIGHT_TYPES, dequantize, quantize

__all__ = [
    "WEIGHT_TYPES", "attention_decode", "attention_prefill", "dequantize", "embedding",
    "gated_activation", "kv_write", "linear", "logprobs", "philox", "quantize", "rms_norm", "rope",
    "round_activations", "sample", "sample_probs", "uniform",
]  # fmt: skip

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]


def _wide(x: Any) -> Float64:
    return np.asarray(x, np.float64)


def embedding(token_ids: Array, table: Array, *, scale: float = 1.0) -> Float64:
    out: Float64 = _wide(table)[token_ids] * scale
    return out


def rms_norm(
    x: Array,
    weight: Array,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    residual: Array | None = None,
) -> Float64:
    wide = _wide(x)
    normed = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + eps)
    out: Float64 = normed * (_wide(weight) + weight_offset)
    return out if residual is None else out + _wide(residual)


def linear(
    x: Array, weight: Array, *, bias: Array | None = None, residual: Array | None = None
) -> Float64:
    out: Float64 = _wide(x) @ _wide(weight).T
    if bias is not None:
        out = out + _wide(bias)
    return out if residual is None else out + _wide(residual)


def round_activations(x: Array) -> Float64:
    """Activations as products with quantised weights see them: int8 by groups of 32 columns.

    d = amax / 127 and q = round_half_even(x * (127 / amax)), in float32; the value is d * q.
    """
    groups = np.asarray(x, np.float32).reshape(*x.shape[:-1], x.shape[-1] // 32, 32)
    amax = np.abs(groups).max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        inverse = np.where(amax > 0, np.float32(127) / amax, np.float32(0))
    rounded = np.rint(groups * inverse)
    return (_wide(rounded) * _wide(amax / np.float32(127))).reshape(x.shape)


def rope(
    x: Array, positions: Array, inv_freq: Array, *, interleaved: bool = False, scale: float = 1.0
) -> Float64:
    out = _wide(x).copy()
    num_freqs = len(inv_freq)
    first = slice(0, 2 * num_freqs, 2) if interleaved else slice(0, num_freqs)
    second = slice(1, 2 * num_freqs, 2) if interleaved else slice(num_freqs, 2 * num_freqs)
    angles = _wide(positions)[:, None] * _wide(inv_freq)
    angles = angles.reshape(len(positions), *[1] * (out.ndim - 2), num_freqs)
    a, b = out[..., first].copy(), out[..., second].copy()
    out[..., first] = (a * np.cos(angles) - b * np.sin(angles)) * scale
    out[..., second] = (a * np.sin(angles) + b * np.cos(angles)) * scale
    return out


def kv_write(
    k: Array, v: Array, k_pages: Array, v_pages: Array, slots: Array
) -> tuple[Array, Array]:
    page_size = k_pages.shape[2]
    written = k_pages.copy(), v_pages.copy()
    for pages, values in zip(written, (k, v), strict=True):
        wide = _wide(values)
        if pages.dtype == np.float16:
            wide = np.clip(wide, -65504, 65504)
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                pages[slot // page_size, :, slot % page_size] = wide[token]
    return written


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
) -> Float64:
    out = np.zeros(q.shape)
    group = q.shape[1] // k_pages.shape[1]
    for seq, seq_len in enumerate(seq_lens.tolist()):
        begin, end = query_starts[seq], query_starts[seq + 1]
        used = page_table[seq, : -(-seq_len // k_pages.shape[2])]
        keys, values = (
            np.concatenate([*_wide(pages[used])], axis=1)[:, :seq_len].repeat(group, axis=0)
            for pages in (k_pages, v_pages)
        )
        scores = np.einsum("thd,hkd->thk", _wide(q[begin:end]), keys) * scale
        if softcap > 0:
            scores = softcap * np.tanh(scores / softcap)
        behind = (np.arange(seq_len - (end - begin), seq_len)[:, None] - np.arange(seq_len))[
            :, None
        ]
        scores[np.broadcast_to(behind < 0, scores.shape)] = -np.inf
        if window > 0:
            scores[np.broadcast_to(behind >= window, scores.shape)] = -np.inf
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        out[begin:end] = np.einsum("thk,hkd->thd", weights, values)
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
) -> Float64:
    starts = np.arange(len(seq_lens) + 1)
    return attention_prefill(
        q, k_pages, v_pages, page_table, seq_lens, starts,
        scale=scale, window=window, softcap=softcap,
    )  # fmt: skip


def gated_activation(x: Array, *, activation: str = "silu") -> Float64:
    gate, up = np.split(_wide(x), 2, axis=-1)
    if activation == "silu":
        share = 0.5 * (1 + np.tanh(gate / 2))
    elif activation == "gelu_tanh":
        share = 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    else:
        share = 0.5 * np.vectorize(math.erfc, otypes=[np.float64])(-gate / math.sqrt(2))
    return gate * share * up


def _finite_row(row: Array) -> Float64 | None:
    """The row with +infinity as 0 and the rest as -infinity, None where it has no distribution."""
    wide = _wide(row)
    if np.isnan(wide).any() or not (wide > -np.inf).any():
        return None
    return np.where(wide == np.inf, 0.0, -np.inf) if wide.max() == np.inf else wide


def logprobs(
    logits: Array, token_ids: Array, *, num_top: int = 0
) -> tuple[Float64, Array, Array, Float64]:
    num_rows = len(logits)
    chosen, ranks = np.full(num_rows, np.nan), np.zeros(num_rows, np.int32)
    top_ids = np.full((num_rows, num_top), -1, np.int32)
    top_logprobs = np.full((num_rows, num_top), np.nan)
    for idx, token_id in enumerate(token_ids.tolist()):
        row = _finite_row(logits[idx])
        if row is None:
            continue
        values = row - row.max() - np.log(np.exp(row - row.max()).sum())
        order = np.argsort(-row, kind="stable")
        top_ids[idx] = order[:num_top]
        top_logprobs[idx] = values[order[:num_top]]
        if token_id >= 0:
            chosen[idx] = values[token_id]
            ranks[idx] = np.flatnonzero(order == token_id)[0] + 1
    return chosen, ranks, top_ids, top_logprobs


def philox(seed: int, counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Philox 4x32, 10 rounds (Salmon et al. 2011): four random words of a key and a counter."""
    low = 0xFFFFFFFF
    key = [seed & low, seed >> 32 & low]
    c = list(counter)
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [second >> 32 ^ c[1] ^ key[0], second & low, first >> 32 ^ c[3] ^ key[1], first & low]
        key = [key[0] + 0x9E3779B9 & low, key[1] + 0xBB67AE85 & low]
    return c[0], c[1], c[2], c[3]


def uniform(seed: int, counter: tuple[int, int, int]) -> float:
    """The number in [0, 1) that `sample` draws with: 53 bits of the first two words."""
    first, second, _, _ = philox(seed, (*counter, 0))
    return ((first >> 5) * 2**26 + (second >> 6)) / 2**53


def sample_probs(
    row: Array, *, temperature: float, top_k: int, top_p: float, min_p: float
) -> Float64:
    """The distribution that `sample` draws a row's token from; all zero where it returns -1."""
    probs = np.zeros(len(row))
    logits = _finite_row(row)
    if logits is None:
        return probs
    order = np.argsort(-logits, kind="stable")  # equal logits by lower id
    if temperature == 0 or top_p == 0:
        probs[order[0]] = 1.0
        return probs
    if min_p > 0:
        order = order[logits[order] >= logits.max() + temperature * math.log(min_p)]
    if top_k > 0:
        order = order[:top_k]
    with np.errstate(over="ignore"):
        weights = np.exp((logits[order] - logits.max()) / temperature)
    if top_p < 1:
        mass = np.cumsum(weights)
        num_kept = int(np.searchsorted(mass, top_p * mass[-1])) + 1
        order, weights = order[:num_kept], weights[:num_kept]
    probs[order] = weights / weights.sum()
    return probs


def sample(
    logits: Array,
    *,
    temperature: Array,
    top_k: Array,
    top_p: Array,
    min_p: Array,
    seeds: Array,
    counters: Array,
) -> npt.NDArray[np.int32]:
    out = np.full(len(logits), -1, np.int32)
    for idx, row in enumerate(logits):
        probs = sample_probs(
            row,
            temperature=float(temperature[idx]),
            top_k=int(top_k[idx]),
            top_p=float(top_p[idx]),
            min_p=float(min_p[idx]),
        )
        a, b, c = (int(word) for word in counters[idx])
        if probs.any():
            mass = np.cumsum(probs)
            above = mass > uniform(int(seeds[idx]), (a, b, c)) * mass[-1]
            out[idx] = np.argmax(above)
    return out
