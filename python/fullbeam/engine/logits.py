# SPDX-License-Identifier: Apache-2.0
"""What the ops on logits take and give, for drawing and for searching alike."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from fullbeam import ops
from fullbeam.engine.batch import Int32Array
from fullbeam.engine.device import Device
from fullbeam.engine.rules import Mask
from fullbeam.engine.text import TokenLogprob
from fullbeam.ops import Array


class History:
    """The distinct tokens of a row and how often each was generated, for penalties."""

    def __init__(self, prompt_ids: Int32Array, max_tokens: int) -> None:
        seen = np.unique(prompt_ids)
        self._places = {token_id: place for place, token_id in enumerate(seen.tolist())}
        self._ids: Int32Array = np.zeros(len(seen) + max_tokens, np.int32)
        self._ids[: len(seen)] = seen
        self._counts: Int32Array = np.zeros(len(self._ids), np.int32)

    @property
    def ids(self) -> Int32Array:
        """Each token of prompt and generated text once, in the order of their coming."""
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> Int32Array:
        """How often each of `ids` was generated; 0 where it is in the prompt only."""
        return self._counts[: len(self._places)]

    def add(self, token_id: int) -> None:
        """Take a generated token."""
        place = self._places.setdefault(token_id, len(self._places))
        self._ids[place] = token_id
        self._counts[place] += 1

    def followed_by(self, token_id: int) -> History:
        """Return a history with one more token, and leave this one as it is."""
        history = copy.copy(self)
        history._places = self._places.copy()
        history._ids = self._ids.copy()
        history._counts = self._counts.copy()
        history.add(token_id)
        return history


class MaskStack:
    """The token masks of a step as an op takes them; made anew only when they change."""

    def __init__(self) -> None:
        self._masks: list[Mask | None] = []
        self._options: dict[str, Any] = {}

    def options(self, masks: list[Mask | None]) -> dict[str, Any]:
        """Return `allowed` and `allowed_idx` for the masks of some rows."""
        is_same = len(masks) == len(self._masks) and all(map(operator.is_, masks, self._masks))
        if not is_same:
            self._masks = masks
            self._options = stack_masks(masks, "allowed", "allowed_idx")
        return self._options


def stack_masks(masks: list[Mask | None], name: str, idx_name: str) -> dict[str, Any]:
    """Return the distinct masks of some rows, and which of them each row has (-1: none)."""
    distinct = {id(mask): mask for mask in masks if mask is not None}
    places = {key: place for place, key in enumerate(distinct)}
    idx = np.array([places.get(id(mask), -1) for mask in masks], np.int32)
    stack = np.stack(list(distinct.values())) if distinct else None
    return {name: stack, idx_name: idx if distinct else None}


def bias_options(biases: list[tuple[tuple[int, float], ...]]) -> dict[str, Any]:
    """Return the biases of some rows as an op takes them; nothing where no row has any."""
    pairs = [pair for row in biases for pair in row]
    if not pairs:
        return {}
    return {
        "bias_starts": starts_of([len(row) for row in biases]),
        "bias_ids": np.array([token_id for token_id, _ in pairs], np.int32),
        "bias_values": np.array([value for _, value in pairs], np.float32),
    }


def history_options(histories: list[History | None]) -> dict[str, Any]:
    """Return the histories of some rows, of which at least one has any, as an op takes them."""
    known = [history for history in histories if history is not None]
    return {
        "history_starts": starts_of([0 if item is None else len(item.ids) for item in histories]),
        "history_ids": np.concatenate([history.ids for history in known]),
        "history_counts": np.concatenate([history.counts for history in known]),
    }


def starts_of(counts: list[int]) -> Int32Array:
    """Return where each of some rows starts, and where the last one ends."""
    starts = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    return starts


def logprobs_of(
    device: Device, logits: Array, token_ids: Int32Array, num_top: int
) -> Callable[[], list[TokenLogprob]]:
    """Look up what logits say of given tokens, and of the `num_top` likeliest ones; -1: of all."""
    vocab_size = logits.shape[1]
    num_top = min(num_top, vocab_size) if num_top >= 0 else vocab_size
    results = device.select(ops.logprobs, logits, {"token_ids": token_ids}, num_top=num_top)

    def read() -> list[TokenLogprob]:
        values, ranks, top_ids, top_values = (array.tolist() for array in results.read())
        entries = zip(values, top_ids, top_values, ranks, strict=True)
        return [TokenLogprob(*entry) for entry in entries]

    return read
