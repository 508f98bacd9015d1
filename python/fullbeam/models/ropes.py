# SPDX-License-Identifier: Apache-2.0
"""Rotary position embeddings as models scale them."""

from __future__ import annotations

import math

import numpy as np

from fullbeam.engine.batch import FloatArray
from fullbeam.models.config import Rope
from fullbeam.models.source import Source


def read_rope(
    source: Source, arch: str, base: float, num_rotated: int, *, context_len: int, interleaved: bool
) -> Rope:
    """Read the rope of the layers that see everything.

    Parameters
    ----------
    source : metadata `arch`.rope.* and tensors rope_*.weight say how it is scaled
    base : of the angles
    num_rotated : dimensions of a head that rotate
    context_len : most tokens of a text; LongRoPE has other factors beyond the original context
    interleaved : as in `Rope`

    Raises
    ------
    ValueError
        For a scaling that is not known, or its numbers.
    """
    inv_freq = inverse_frequencies(base, num_rotated)
    scaling = source.get(f"{arch}.rope.scaling.type", str, "none")
    original = source.get(f"{arch}.rope.scaling.original_context_length", int, 0)
    scale = source.get(f"{arch}.rope.scaling.attn_factor", float, 1.0)
    if scaling in ("linear", "yarn"):
        factor = source.get(f"{arch}.rope.scaling.factor", float)
        _require_positive(source, f"{arch}.rope.scaling.factor", factor)
        if scaling == "linear":
            inv_freq = inv_freq / factor
        else:
            _require_positive(source, f"{arch}.rope.scaling.original_context_length", original)
            fast = source.get(f"{arch}.rope.scaling.yarn_beta_fast", float, 32.0)
            slow = source.get(f"{arch}.rope.scaling.yarn_beta_slow", float, 1.0)
            ramp = _yarn_ramp(base, num_rotated, original, fast, slow)
            inv_freq = inv_freq / factor * ramp + inv_freq * (1 - ramp)
            scale *= 1.0 + 0.1 * math.log(factor) if factor > 1 else 1.0
    elif scaling not in ("none", "longrope"):
        name = source.name_of(f"{arch}.rope.scaling.type")
        raise ValueError(
            f"{source.path}: {name} must be none, linear, yarn or longrope, got {scaling}"
        )
    name = "rope_freqs.weight"  # Llama 3's scaling, one factor per pair
    if "rope_factors_long.weight" in source.tensors:
        name = f"rope_factors_{'long' if context_len > original else 'short'}.weight"
    if name in source.tensors:
        inv_freq = inv_freq / _factors(source, name, num_rotated // 2)
    return Rope(inv_freq.astype(np.float32), interleaved, scale)


def inverse_frequencies(base: float, num_rotated: int) -> FloatArray:
    """Float64 [num_rotated / 2]: angle of each pair per position."""
    return np.asarray(base ** (-np.arange(0, num_rotated, 2, dtype=np.float64) / num_rotated))


def llama3_factors(
    base: float, num_rotated: int, *, factor: float, low: float, high: float, original: float
) -> FloatArray:
    """What Llama 3 divides inverse frequencies by: `factor` for those of less than `low` turns in
    the original context, 1 for those of more than `high`, and what lies between for the others."""
    turns = original * inverse_frequencies(base, num_rotated) / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray(1 / ((1 - smooth) / factor + smooth), np.float32)


def longrope_scale(factor: float, original: int) -> float:
    """LongRoPE's factor of cosine and sine, for a context `factor` times the original one."""
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _yarn_ramp(
    base: float, num_rotated: int, original: int, fast: float, slow: float
) -> FloatArray:
    """1 where YaRN interpolates, 0 where it leaves the frequency. Peng et al. 2023, eq. 19-23
    (arXiv 2309.00071)."""

    def pair_of(turns: float) -> float:
        return num_rotated * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_of(fast)), 0)
    high = min(math.ceil(pair_of(slow)), num_rotated - 1)
    ramp = (np.arange(num_rotated // 2) - low) / max(high - low, 0.001)
    return np.asarray(np.clip(ramp, 0.0, 1.0))


def _factors(source: Source, name: str, count: int) -> FloatArray:
    tensor = source.tensors[name]
    if tensor.type != "F32" or tensor.shape != (count,):
        raise ValueError(
            f"{source.path}: {tensor.name} must be F32 [{count}], "
            f"got {tensor.type} {list(tensor.shape)}"
        )
    values = tensor.data.view(np.float32)
    if not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(f"{source.path}: {tensor.name} must be finite and above 0")
    return values


def _require_positive(source: Source, key: str, value: float) -> None:
    if not value > 0 or not math.isfinite(value):
        raise ValueError(f"{source.path}: {source.name_of(key)} must be above 0, got {value}")
