# SPDX-License-Identifier: Apache-2.0
"""Logits to next tokens, and to the log-probabilities that were asked for."""

from __future__ import annotations

import numpy as np

from fullbeam.engine.batch import FloatArray, Int32Array
from fullbeam.engine.scheduler import Selection, Work
from fullbeam.engine.sequence import Row
from fullbeam.engine.text import TokenLogprob


class Selector:
    """Draws each row's token with its own parameters, whatever else is in the batch."""

    def __init__(self) -> None:
        self._rows: list[Row] = []  # the rows that the arrays below describe
        self._temperature: FloatArray = np.zeros(0, np.float32)
        self._top_k: Int32Array = np.zeros(0, np.int32)
        self._top_p: FloatArray = np.zeros(0, np.float32)
        self._min_p: FloatArray = np.zeros(0, np.float32)
        self._seeds = np.zeros(0, np.uint64)
        self._counters = np.zeros((0, 3), np.uint32)

    def select(self, works: list[Work], logits: FloatArray) -> Selection:
        """Draw the tokens and score the prompts that the work names.

        Parameters
        ----------
        works
            What was computed, in the order of the batch.
        logits
            float32 [num_logit_rows, vocab_size], in the same order: scored tokens, then the last.
        """
        rows: list[Row] = []
        sources: list[int] = []  # logit row that each row draws from
        scores: dict[Work, list[TokenLogprob]] = {}
        next_row = 0
        for work in works:
            num_scored = work.score_stop - work.score_start
            if num_scored:
                targets = work.ids[work.score_start + 1 : work.score_stop + 1]
                num_top = work.sequence.request.params.logprobs or 0
                scores[work] = _logprobs(logits[next_row : next_row + num_scored], targets, num_top)
                next_row += num_scored
            if work.drawing:
                rows += work.drawing
                sources += [next_row] * len(work.drawing)
                next_row += 1
        if not rows:
            return Selection([], [], scores)
        token_ids = self._sample(rows, _take(logits, sources))
        return Selection(token_ids.tolist(), _entries(rows, sources, logits, token_ids), scores)

    def _sample(self, rows: list[Row], logits: FloatArray) -> Int32Array:
        from fullbeam import ops

        if rows != self._rows:
            self._describe(rows)
        self._counters[:, 2] = [row.num_tokens for row in rows]
        token_ids: Int32Array = ops.sample(
            logits,
            temperature=self._temperature,
            top_k=self._top_k,
            top_p=self._top_p,
            min_p=self._min_p,
            seeds=self._seeds,
            counters=self._counters,
        )
        return token_ids

    def _describe(self, rows: list[Row]) -> None:
        self._rows = rows
        requests = [row.sequence.request for row in rows]
        params = [request.params for request in requests]
        self._temperature = np.array([p.temperature for p in params], np.float32)
        self._top_p = np.array([p.top_p for p in params], np.float32)
        self._top_k = np.array([p.top_k for p in params], np.int32)
        self._min_p = np.array([p.min_p for p in params], np.float32)
        self._seeds = np.array([request.seed for request in requests], np.uint64)
        self._counters = np.zeros((len(rows), 3), np.uint32)
        self._counters[:, 0] = [request.prompt_index for request in requests]
        self._counters[:, 1] = [row.choice for row in rows]


def _take(logits: FloatArray, rows: list[int]) -> FloatArray:
    """Return some rows, without a copy where they follow each other."""
    first, count = rows[0], len(rows)
    if rows == list(range(first, first + count)):
        return logits[first : first + count]
    return logits[rows]


def _entries(
    rows: list[Row], sources: list[int], logits: FloatArray, token_ids: Int32Array
) -> list[TokenLogprob | None]:
    entries: list[TokenLogprob | None] = [None] * len(rows)
    groups: dict[int, list[int]] = {}
    for idx, row in enumerate(rows):
        num_top = row.sequence.request.params.logprobs
        if num_top is not None and token_ids[idx] >= 0:
            groups.setdefault(num_top, []).append(idx)
    for num_top, members in groups.items():
        chosen = _take(logits, [sources[idx] for idx in members])
        for idx, entry in zip(members, _logprobs(chosen, token_ids[members], num_top), strict=True):
            entries[idx] = entry
    return entries


def _logprobs(logits: FloatArray, token_ids: Int32Array, num_top: int) -> list[TokenLogprob]:
    from fullbeam import ops

    num_top = min(num_top, logits.shape[1])
    values, _, top_ids, top_values = ops.logprobs(logits, token_ids, num_top=num_top)
    return [
        TokenLogprob(*entry)
        for entry in zip(values.tolist(), top_ids.tolist(), top_values.tolist(), strict=True)
    ]
