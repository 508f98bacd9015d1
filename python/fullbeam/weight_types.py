# SPDX-License-Identifier: Apache-2.0
"""The GGUF weight types in plain NumPy: blocks of 32 or 256 columns, scales in float16.

The layouts are those of the GGUF specification; the kernels read the same blocks in
`csrc/core/weight_blocks.h`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_BLOCK = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q8_0": (32, 34), "Q4_0": (32, 18),
    "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q4_K": (256, 144), "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}  # fmt: skip
WEIGHT_TYPES = tuple(_BLOCK)


def _f16(blocks: Array, begin: int) -> Array:
    return blocks[:, begin : begin + 2].copy().view("<f2").astype(np.float32)


def _nibbles(q: Array, run: int) -> Array:
    """Each `run` bytes are 2 * run values: their low halves, then their high ones."""
    runs = q.reshape(len(q), -1, 1, run)
    values: Array = np.concatenate([runs & 15, runs >> 4], axis=2)
    return values.reshape(len(q), -1)


def _bits(q: Array, width: int, run: int) -> Array:
    """Each `run` bytes are 8 / width runs of values, lowest bits first."""
    shifts = np.arange(0, 8, width, dtype=np.uint8).reshape(1, 1, -1, 1)
    parts = q.reshape(len(q), -1, 1, run) >> shifts & (2**width - 1)
    return np.asarray(parts.reshape(len(q), -1))


def _k_scales(packed: Array) -> tuple[Array, Array]:
    low, mid, high = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=1)
    return scales, np.concatenate([mid & 63, (high >> 4) | (mid >> 6 << 4)], axis=1)


def _block_values(b: Array, kind: str) -> Array:
    """[num_blocks, block bytes] -> float32 [num_blocks, block columns]."""
    d = _f16(b, 0)
    if kind == "Q8_0":
        return d * b[:, 2:].view(np.int8).astype(np.float32)
    if kind == "Q4_0":
        return d * (_nibbles(b[:, 2:], 16).astype(np.float32) - 8)
    if kind == "Q4_1":
        return d * _nibbles(b[:, 4:], 16).astype(np.float32) + _f16(b, 2)
    if kind in ("Q5_0", "Q5_1"):
        at = 2 if kind == "Q5_0" else 4
        fifth = np.unpackbits(b[:, at : at + 4], axis=1, bitorder="little") << 4
        q = (_nibbles(b[:, at + 4 :], 16) | fifth).astype(np.float32)
        return np.asarray(d * (q - 16) if kind == "Q5_0" else d * q + _f16(b, 2))
    if kind in ("Q4_K", "Q5_K"):
        scales, minima = _k_scales(b[:, 4:16])
        q = _nibbles(b[:, 16:] if kind == "Q4_K" else b[:, 48:], 32)
        if kind == "Q5_K":
            q = q | _bits(b[:, 16:48], 1, 32) << 4
        tiles = q.reshape(len(b), 8, 32).astype(np.float32)
        values = (d * scales)[:, :, None] * tiles - (_f16(b, 2) * minima)[:, :, None]
        return np.asarray(values.reshape(len(b), 256))
    low = b[:, :128].reshape(-1, 64)
    q = _nibbles(low, 64).reshape(len(b), 256) | _bits(b[:, 128:192], 2, 32) << 4
    tiles = q.astype(np.int8).reshape(len(b), 16, 16).astype(np.float32) - 32
    scales = _f16(b, 208) * b[:, 192:208].view(np.int8).astype(np.float32)
    return np.asarray((scales[:, :, None] * tiles).reshape(len(b), 256))


def dequantize(data: Array, kind: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """A tensor's bytes in a GGUF file as float32.

    Parameters: `data` uint8, exactly the tensor's bytes; `kind` one of `WEIGHT_TYPES`; `shape` with
    the contiguous columns last. Raises ValueError for another type or number of bytes.
    """
    cols, num_bytes = _block_of(kind, shape)
    expected = math.prod(shape) // cols * num_bytes
    if data.size != expected:
        raise ValueError(f"dequantize: data must be {expected} bytes, got {data.size}")
    flat = np.ascontiguousarray(data).reshape(-1)
    if kind == "BF16":
        return (flat.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    if cols == 1:
        return flat.view("<f4" if kind == "F32" else "<f2").astype(np.float32).reshape(shape)
    with np.errstate(invalid="ignore"):  # infinite scales give NaN, as they should
        values = _block_values(flat.reshape(-1, num_bytes), kind)
    return values.astype(np.float32, copy=False).reshape(shape)


def _block_of(kind: str, shape: tuple[int, ...]) -> tuple[int, int]:
    if kind not in _BLOCK:
        raise ValueError(f"weight type must be one of {', '.join(_BLOCK)}, got {kind}")
    cols, num_bytes = _BLOCK[kind]
    if shape[-1] % cols != 0:
        raise ValueError(f"{kind}: columns must be a multiple of {cols}, got {shape[-1]}")
    return cols, num_bytes


def _ratio(a: Array, b: Array) -> Array:
    return np.divide(a, b, out=np.zeros(np.broadcast(a, b).shape), where=b != 0)


def _half(x: Array) -> tuple[Array, Array]:
    """A column of scales as float16 bytes, and as the numbers that these are."""
    half = x.astype("<f2").reshape(-1, 1)
    return half.view(np.uint8), half.astype(np.float64)


def _pack_nibbles(q: Array, run: int) -> Array:
    halves = q.reshape(len(q), -1, 2, run)
    packed: Array = halves[:, :, 0] | halves[:, :, 1] << 4
    return packed.reshape(len(q), -1)


def _pack_bits(q: Array, width: int, run: int) -> Array:
    shifts = np.arange(0, 8, width, dtype=np.uint8).reshape(1, 1, -1, 1)
    parts = q.reshape(len(q), -1, 8 // width, run) << shifts
    return np.asarray(np.bitwise_or.reduce(parts, axis=2).reshape(len(q), -1))


def _quantize_blocks(x: Array, kind: str) -> list[Array]:
    """[num_blocks, 32] -> the fields of each block."""
    levels = {"Q8_0": 255, "Q4_0": 16, "Q4_1": 15, "Q5_0": 32, "Q5_1": 31}[kind]
    if kind == "Q8_0":
        d_bytes, d = _half(np.abs(x).max(axis=1) / 127)
        return [d_bytes, np.clip(np.rint(_ratio(x, d)), -127, 127).astype(np.int8).view(np.uint8)]
    if kind in ("Q4_1", "Q5_1"):
        m_bytes, m = _half(x.min(axis=1))
        d_bytes, d = _half((x.max(axis=1) - m[:, 0]) / levels)
        q = np.clip(np.rint(_ratio(x - m, d)), 0, levels).astype(np.uint8)
        scales = [d_bytes, m_bytes]
    else:  # the number farthest from zero becomes the lowest level
        farthest = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)[:, 0]
        d_bytes, d = _half(farthest / (-levels / 2))
        q = np.clip(np.rint(_ratio(x, d)) + levels / 2, 0, levels - 1).astype(np.uint8)
        scales = [d_bytes]
    if kind.startswith("Q5"):
        scales.append(np.packbits(q >> 4, axis=1, bitorder="little"))
    return [*scales, _pack_nibbles(q & 15, 16)]


def _quantize_k(x: Array, kind: str) -> list[Array]:
    """[num_blocks, 256] -> the fields of each Q4_K or Q5_K block."""
    tiles = x.reshape(len(x), 8, 32)
    levels = 15 if kind == "Q4_K" else 31
    minima = np.maximum(0, -tiles.min(axis=2))
    ranges = np.maximum(0, tiles.max(axis=2) + minima) / levels
    d_bytes, d = _half(ranges.max(axis=1) / 63)
    m_bytes, m = _half(minima.max(axis=1) / 63)
    s = np.clip(np.rint(_ratio(ranges, d)), 0, 63).astype(np.uint8)
    t = np.clip(np.rint(_ratio(minima, m)), 0, 63).astype(np.uint8)
    q = np.rint(_ratio(tiles + (m * t)[:, :, None], (d * s)[:, :, None]))
    q = np.clip(q, 0, levels).astype(np.uint8).reshape(len(x), 256)
    packed = [
        s[:, :4] | s[:, 4:] >> 4 << 6,
        t[:, :4] | t[:, 4:] >> 4 << 6,
        (s[:, 4:] & 15) | (t[:, 4:] & 15) << 4,
    ]
    fifth = [_pack_bits(q >> 4, 1, 32)] if kind == "Q5_K" else []
    return [d_bytes, m_bytes, *packed, *fifth, _pack_nibbles(q & 15, 32)]


def _quantize_q6_k(x: Array) -> list[Array]:
    tiles = x.reshape(len(x), 16, 16)
    ranges = np.abs(tiles).max(axis=2) / 31
    d_bytes, d = _half(ranges.max(axis=1) / 127)
    s = np.clip(np.rint(_ratio(ranges, d)), 0, 127)
    q = np.clip(np.rint(_ratio(tiles, (d * s)[:, :, None])), -32, 31) + 32
    q = q.astype(np.uint8).reshape(len(x), 256)
    low = _pack_nibbles((q & 15).reshape(-1, 128), 64).reshape(len(x), 128)
    return [low, _pack_bits(q >> 4, 2, 32), s.astype(np.uint8), d_bytes]


def quantize(array: Array, kind: str) -> npt.NDArray[np.uint8]:
    """A simple valid encoding of an array in a GGUF type: nearest levels, no search for scales.

    Returns the bytes, flat; raises ValueError as `dequantize` does.
    """
    cols, _ = _block_of(kind, array.shape)
    if kind == "BF16":
        bits = np.asarray(array, np.float32).view(np.uint32)
        return (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype("<u2").reshape(-1).view(np.uint8)
    if cols == 1:
        half_or_float = np.ascontiguousarray(array, "<f4" if kind == "F32" else "<f2")
        return half_or_float.reshape(-1).view(np.uint8)
    x = np.asarray(array, np.float64).reshape(-1, cols)
    if kind == "Q6_K":
        fields = _quantize_q6_k(x)
    else:
        fields = _quantize_blocks(x, kind) if cols == 32 else _quantize_k(x, kind)
    return np.concatenate(fields, axis=1, dtype=np.uint8).reshape(-1)
