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

from fullbeam.ops import BeamStep, Sample
from fullbeam.weight_types import WEIGHT_TYPES, dequantize, quantize

__all__ = [
    "WEIGHT_TYPES", "activation", "attention_decode", "attention_prefill", "beam_step",
    "dequantise", "dequantize", "edited_logits", "embedding", "gated_activation", "kv_write",
    "layer_norm", "linear", "logprobs", "philox", "quantize", "rms_norm", "rope",
    "round_activations", "sample", "sample_probs", "softcap", "uniform",
]  # fmt: skip

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]


def _wide(x: Any) -> Float64:
    return np.asarray(x, np.float64)


def dequantise(data: Array, kind: str, shape: tuple[int, int]) -> Float64:
    return _wide(dequantize(data, kind, shape))


def embedding(
    token_ids: Array, table: Array, *, scale: float = 1.0, residual: Array | None = None
) -> Float64:
    out: Float64 = _wide(table)[token_ids] * scale
    return out if residual is None else out + _wide(residual)


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


def layer_norm(x: Array, weight: Array, bias: Array, *, eps: float = 1e-5) -> Float64:
    centred = _wide(x) - _wide(x).mean(axis=-1, keepdims=True)
    scale = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps)
    out: Float64 = centred / scale * _wide(weight) + _wide(bias)
    return out


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


def _attend(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    table: Array,
    seen: Array,
    scale: float,
    softcap: float,
) -> Float64:
    """One query [num_q_heads, head_dim] over the keys of these indices."""
    page_size, group = k_pages.shape[2], len(q) // k_pages.shape[1]
    keys, values = (
        _wide(pages[table[seen // page_size], :, seen % page_size]).repeat(group, axis=1)
        for pages in (k_pages, v_pages)
    )
    scores = np.einsum("hd,khd->hk", _wide(q), keys) * scale
    if softcap > 0:
        scores = softcap * np.tanh(scores / softcap)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    out: Float64 = np.einsum("hk,khd->hd", weights / weights.sum(axis=1, keepdims=True), values)
    return out


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
    for seq, table in enumerate(page_table):
        end = query_starts[seq + 1]
        for row in range(query_starts[seq], end):
            position = seq_lens[seq] - (end - row)
            seen = np.arange(max(0, position - window + 1) if window > 0 else 0, position + 1)
            out[row] = _attend(q[row], k_pages, v_pages, table, seen, scale, softcap)
    return out


def attention_decode(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    page_table: Array,
    seq_lens: Array,
    *,
    query_starts: Array | None = None,
    slot_starts: Any = None,
    num_slots: Any = None,
    visible: Any = None,
    slot_positions: Any = None,
    positions: Any = None,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Float64:
    out = np.zeros(q.shape)
    for seq, table in enumerate(page_table):
        rows = [seq] if query_starts is None else range(*query_starts[seq : seq + 2])
        for row in rows:
            position = seq_lens[seq] - 1
            seen = places = np.arange(seq_lens[seq])
            if query_starts is not None and num_slots[seq] > 0:
                position = positions[row]
                bits = visible[row][:, None] >> np.arange(32, dtype=np.uint32) & 1
                slots = np.flatnonzero(bits.reshape(-1)[: num_slots[seq]])
                seen = np.concatenate([seen, slot_starts[seq] + slots])
                places = np.concatenate([places, slot_positions[seq, slots]])
            if window > 0:
                seen = seen[places > position - window]
            out[row] = _attend(q[row], k_pages, v_pages, table, seen, scale, softcap)
    return out


def _activated(x: Float64, kind: str) -> Float64:
    if kind == "silu":
        share = 0.5 * (1 + np.tanh(x / 2))
    elif kind == "gelu_tanh":
        share = 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    else:
        share = 0.5 * np.vectorize(math.erfc, otypes=[np.float64])(-x / math.sqrt(2))
    return np.asarray(x * share)


def activation(x: Array, *, activation: str = "gelu") -> Float64:
    return _activated(_wide(x), activation)


def gated_activation(x: Array, *, activation: str = "silu") -> Float64:
    gate, up = np.split(_wide(x), 2, axis=-1)
    return _activated(gate, activation) * up


def softcap(x: Array, cap: float) -> Float64:
    return cap * np.tanh(_wide(x) / cap)


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


def edited_logits(
    logits: Array,
    idx: int,
    *,
    allowed: Any = None,
    allowed_idx: Any = None,
    bias_starts: Any = None,
    bias_ids: Any = None,
    bias_values: Any = None,
    history_starts: Any = None,
    history_ids: Any = None,
    history_counts: Any = None,
    history_last: Any = None,
    repetition_penalty: Any = None,
    frequency_penalty: Any = None,
    presence_penalty: Any = None,
) -> npt.NDArray[np.float32]:
    """Row ``idx`` as `sample` draws from it; every step is rounded to float32."""
    row = np.array(logits[idx], np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        if allowed is not None and allowed_idx[idx] >= 0:
            tokens = np.arange(len(row))
            words = allowed[allowed_idx[idx]][tokens // 32]
            row[words >> (tokens % 32).astype(np.uint32) & 1 == 0] = -np.inf
        if bias_starts is not None:
            for entry in range(bias_starts[idx], bias_starts[idx + 1]):
                token_id, value = bias_ids[entry], bias_values[entry]
                row[token_id] = -np.inf if value == -np.inf else row[token_id] + value
        if history_starts is not None:
            one, zero = np.float32(1), np.float32(0)
            repetition = one if repetition_penalty is None else repetition_penalty[idx]
            frequency = zero if frequency_penalty is None else frequency_penalty[idx]
            presence = zero if presence_penalty is None else presence_penalty[idx]
            entries = slice(history_starts[idx], history_starts[idx + 1])
            ids, numbers = history_ids[entries].tolist(), history_counts[entries].tolist()
            counts = dict(zip(ids, numbers, strict=True))
            if history_last is not None and history_last[idx] >= 0:
                last = int(history_last[idx])
                counts[last] = counts.get(last, 0) + 1
            for token_id, number in counts.items():
                value, count = row[token_id], np.float32(number)
                value = value / repetition if value > 0 else value * repetition
                row[token_id] = value - (count * frequency + presence if count > 0 else zero)
    return row


def sample(
    logits: Array,
    *,
    temperature: Array,
    top_k: Array,
    top_p: Array,
    min_p: Array,
    seeds: Array,
    counters: Array,
    num_top: Array | None = None,
    **edits: Any,
) -> Sample:
    """``edits`` are those of `edited_logits`."""
    num_rows = len(logits)
    token_ids = np.full(num_rows, -1, np.int32)
    log_sums = np.full((num_rows, 2), np.nan)
    for idx in range(num_rows):
        row = edited_logits(logits, idx, **edits)
        if np.isnan(logits[idx]).any():
            continue
        probs = sample_probs(
            row,
            temperature=float(temperature[idx]),
            top_k=int(top_k[idx]),
            top_p=float(top_p[idx]),
            min_p=float(min_p[idx]),
        )
        divisor = float(temperature[idx]) or 1.0
        log_sums[idx] = _log_sum(_wide(logits[idx])), _log_sum(_wide(row) / divisor)
        a, b, c = (int(word) for word in counters[idx])
        if probs.any():
            mass = np.cumsum(probs)
            above = mass > uniform(int(seeds[idx]), (a, b, c)) * mass[-1]
            token_ids[idx] = np.argmax(above)
    if num_top is None:
        return Sample(token_ids)
    max_top = int(max([0, *num_top]))
    values = logprobs(logits, token_ids, num_top=max_top)
    for idx, wanted in enumerate(num_top.tolist()):
        if wanted < 0:
            values[0][idx], values[1][idx], log_sums[idx] = np.nan, 0, np.nan
        values[2][idx, max(wanted, 0) :] = -1
        values[3][idx, max(wanted, 0) :] = np.nan
    return Sample(token_ids, *values, log_sums)


def _log_sum(row: Float64) -> float:
    """``ln(sum(e^x))``; NaN where the row has no distribution."""
    top = row.max(initial=-np.inf)
    if not top > -np.inf or top == np.inf:
        return math.inf if top == np.inf else math.nan
    return float(top + np.log(np.exp(row - top).sum()))


def _mask(
    masks: Array | None, mask_idx: Array | None, beam: int, size: int, *, default: bool
) -> Array:
    """The beam's token mask as booleans; all `default` where it has none."""
    if masks is None or mask_idx is None or mask_idx[beam] < 0:
        return np.full(size, default)
    words = np.ascontiguousarray(masks[mask_idx[beam]]).view(np.uint8)
    return np.unpackbits(words, bitorder="little")[:size].astype(bool)


def beam_step(
    logits: Array,
    *,
    beam_rows: Array,
    sums: Array,
    group_starts: Array,
    request_starts: Array,
    beam_sizes: Array,
    diversity_strengths: Array,
    allowed: Array | None = None,
    allowed_idx: Array | None = None,
    terminators: Array | None = None,
    terminator_idx: Array | None = None,
    bias_starts: Array | None = None,
    bias_ids: Array | None = None,
    bias_values: Array | None = None,
) -> BeamStep:
    num_groups, size = len(beam_sizes), logits.shape[1]
    max_beam = max([1, *beam_sizes.tolist()])
    live, finished = (
        tuple(np.full((num_groups, max_beam, *rest), fill) for fill, *rest in parts)
        for parts in [[(-1,), (-1,), (np.nan,), (np.nan, 2)]] * 2
    )

    def logprobs_of(beam: int) -> Float64:
        row = np.array(logits[beam_rows[beam]], np.float32)
        if bias_starts is not None and bias_ids is not None and bias_values is not None:
            for i in range(bias_starts[beam], bias_starts[beam + 1]):
                is_ban = bias_values[i] == -np.inf
                row[bias_ids[i]] = -np.inf if is_ban else row[bias_ids[i]] + bias_values[i]
        wide = _finite_row(row)
        if wide is None:
            return np.full(size, -np.inf)
        return wide - _log_sum(wide)

    def step_group(group: int, strength: float, seen: list[int]) -> None:
        candidates = []
        for beam in range(group_starts[group], group_starts[group + 1]):
            logprobs = logprobs_of(beam)
            is_allowed = _mask(allowed, allowed_idx, beam, size, default=True)
            is_last = _mask(terminators, terminator_idx, beam, size, default=False)
            for token in np.flatnonzero(is_allowed & (logprobs > -np.inf)).tolist():
                score = sums[beam, 0] + logprobs[token] - strength * seen.count(token)
                total = sums[beam, 1] + logprobs[token]
                candidates.append((-score, beam, token, logprobs[token], total, is_last[token]))
        num_live, num_finished = 0, 0
        for rank, (below, beam, token, logprob, total, ends) in enumerate(sorted(candidates)):
            if num_live == beam_sizes[group]:
                break
            if ends and rank >= beam_sizes[group]:
                continue
            out, place = (finished, num_finished) if ends else (live, num_live)
            for part, value in zip(out, (beam, token, logprob, (-below, total)), strict=True):
                part[group, place] = value
            num_finished, num_live = num_finished + bool(ends), num_live + (not ends)

    for request, strength in enumerate(diversity_strengths.tolist()):
        seen: list[int] = []
        for group in range(request_starts[request], request_starts[request + 1]):
            step_group(group, strength, seen)
            seen += [token for token in live[1][group].tolist() if token >= 0]
    return BeamStep(*live, *finished)
