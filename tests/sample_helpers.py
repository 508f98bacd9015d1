# SPDX-License-Identifier: Apache-2.0
"""Inputs of `ops.sample` for its tests, and the test of draws against a distribution."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
ALL_EDITS = ("allowed", "bias", "history")


def params(
    num_rows: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
) -> dict[str, Any]:
    counters = np.zeros((num_rows, 3), np.uint32)
    counters[:, 2] = np.arange(num_rows)
    return {
        "temperature": np.full(num_rows, temperature, np.float32),
        "top_k": np.full(num_rows, top_k, np.int32),
        "top_p": np.full(num_rows, top_p, np.float32),
        "min_p": np.full(num_rows, min_p, np.float32),
        "seeds": np.full(num_rows, seed, np.uint64),
        "counters": counters,
    }


def packed(masks: Array) -> Array:
    """bool [num_masks, vocab_size] as bits; those beyond the vocabulary are set."""
    num_masks, vocab_size = masks.shape
    bits = np.ones((num_masks, -(-vocab_size // 32) * 32), bool)
    bits[:, :vocab_size] = masks
    return np.packbits(bits, axis=1, bitorder="little").view(np.uint32)


def _lists(
    rng: np.random.Generator, num_rows: int, vocab_size: int, *, distinct: bool
) -> tuple[Array, Array]:
    """Starts and token ids of lists of uneven lengths, the first and the last one empty."""
    lens = rng.integers(0, min(vocab_size, 40) + 1, num_rows)
    lens[[0, -1]] = 0
    ids = [rng.choice(vocab_size, size, replace=not distinct) for size in lens]
    return np.append(0, lens.cumsum()).astype(np.int32), np.concatenate(ids).astype(np.int32)


def _last(rng: np.random.Generator, starts: Array, ids: Array, vocab_size: int) -> Array:
    """A token of each row that is in its list, or may not be, or none."""
    last = rng.integers(-1, vocab_size, len(starts) - 1).astype(np.int32)
    for row, (first, end) in enumerate(itertools.pairwise(starts)):
        if end > first and rng.random() < 0.5:
            last[row] = rng.choice(ids[first:end])
    return last


def edits(
    rng: np.random.Generator,
    num_rows: int,
    vocab_size: int,
    kinds: Sequence[str] = ALL_EDITS,
) -> dict[str, Any]:
    """Edits of these kinds for most rows."""
    found: dict[str, Any] = {}
    if "allowed" in kinds:
        found["allowed"] = packed(rng.random((3, vocab_size)) < [[0.9], [0.5], [0.02]])
        found["allowed_idx"] = rng.integers(-1, 3, num_rows).astype(np.int32)
    if "bias" in kinds:
        starts, ids = _lists(rng, num_rows, vocab_size, distinct=False)
        values = (3 * rng.standard_normal(len(ids))).astype(np.float32)
        values[rng.random(len(ids)) < 0.2] = -np.inf
        found |= {"bias_starts": starts, "bias_ids": ids, "bias_values": values}
    if "history" in kinds:
        starts, ids = _lists(rng, num_rows, vocab_size, distinct=True)
        counts = rng.integers(0, 4, len(ids)).astype(np.int32)
        found |= {"history_starts": starts, "history_ids": ids, "history_counts": counts}
        found["history_last"] = _last(rng, starts, ids, vocab_size)
        found["repetition_penalty"] = rng.uniform(0.5, 2, num_rows).astype(np.float32)
        found["frequency_penalty"] = rng.uniform(-2, 2, num_rows).astype(np.float32)
        found["presence_penalty"] = rng.uniform(-2, 2, num_rows).astype(np.float32)
    return found


def of_one_row(settings: dict[str, Any], row: int) -> dict[str, Any]:
    """What is one row's, as arguments for this row alone."""
    found = {}
    starts = [(name, "bias" if "bias" in name else "history") for name in settings]
    for name, kind in starts:
        values = settings[name]
        if name.startswith(("bias_", "history_")) and name != "history_last":
            first, last = settings[f"{kind}_starts"][row : row + 2]
            is_starts = name.endswith("_starts")
            found[name] = np.int32([0, last - first]) if is_starts else values[first:last]
        else:
            found[name] = values if name == "allowed" else values[row : row + 1]
    return found


def repeated(settings: dict[str, Any], num_rows: int) -> dict[str, Any]:
    """One row's edits for many rows."""
    found = {}
    for name, values in settings.items():
        if name.endswith("_starts"):
            found[name] = (np.arange(num_rows + 1) * values[1]).astype(np.int32)
        else:
            found[name] = values if name == "allowed" else np.tile(values, num_rows)
    return found


def assert_follows(drawn: Array, probs: Array) -> None:
    """No token without probability, and counts that chi-square accepts at 4 standard deviations."""
    counts = np.bincount(drawn, minlength=len(probs))
    assert not counts[probs == 0].any()
    expected = probs * len(drawn)
    common = expected >= 5
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    freedom = max(len(wanted) - 1, 1)
    chi_square = ((observed - wanted) ** 2 / wanted).sum()
    # Wilson and Hilferty's normal approximation
    assert chi_square < freedom * (1 - 2 / (9 * freedom) + 4 * math.sqrt(2 / (9 * freedom))) ** 3
