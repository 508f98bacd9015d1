# SPDX-License-Identifier: Apache-2.0
"""Logits to next tokens, and to the log-probabilities that were asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fullbeam import ops
from fullbeam.engine.device import Device, Results
from fullbeam.engine.logits import MaskStack, bias_options, history_options, logprobs_of
from fullbeam.engine.scheduler import Selection, Work
from fullbeam.engine.search import expand
from fullbeam.engine.sequence import Row
from fullbeam.engine.text import TokenLogprob
from fullbeam.ops import Array


@dataclass(frozen=True, slots=True)
class Choice:
    """The tokens of a step, being chosen."""

    token_ids: Array | None  # int32, on the device: draws in the order of the work
    finish: Callable[[], Selection]  # waits for them


class Selector:
    """Chooses the tokens of a step from its logits."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._draws: Draws | None = None

    def start(self, works: list[Work], logits: Array, drawn: Array | None = None) -> Choice:
        """Draw the tokens and score the prompts that the work names.

        Parameters
        ----------
        works
            What was computed, in the order of the batch.
        logits
            float32 [num_logit_rows, vocab_size] on the device, in the same order: scored tokens,
            then the last.
        drawn
            Tokens on the device, which work that has a `source` goes on from.
        """
        drawing: list[Drawing] = []
        sources: list[int] = []  # logit row of each draw
        scoring: dict[Work, Callable[[], list[TokenLogprob]]] = {}
        expanding: list[Work] = []
        search_rows: list[list[int]] = []
        next_row = 0
        for work in works:
            num_scored = work.score_stop - work.score_start
            if num_scored:
                targets = work.ids[work.score_start + 1 : work.score_stop + 1]
                num_top = work.sequence.request.params.num_top_scored
                scoring[work] = logprobs_of(
                    self._device, logits[next_row : next_row + num_scored], targets, num_top
                )
                next_row += num_scored
            if work.expands:
                expanding.append(work)
                last = [next_row] * len(work.search.live)  # all hypotheses start from the prompt
                search_rows.append([*range(next_row, next_row + len(work.nodes))] or last)
            num_tokens = work.start + work.count - len(work.drafts)
            drawing += [Drawing(row, work.drafts, num_tokens, work.source) for row in work.drawing]
            if work.drafts:
                sources += range(next_row, next_row + work.num_draws)
            else:
                sources += [next_row] * len(work.drawing)
            next_row += work.num_draws
        expansions = draws = results = None
        if expanding:
            searches = [work.search for work in expanding]
            expansions = expand(self._device, searches, search_rows, logits)
        if drawing:
            rows = [item.row for item in drawing for _ in range(1 + len(item.drafts))]
            if self._draws is None or rows != self._draws.rows:
                self._draws = Draws(rows, logits.shape[1])
            draws = self._draws
            results = draws.start(self._device, _take(logits, sources), drawing, drawn)

        def finish() -> Selection:
            token_ids: list[int] = []
            entries: list[TokenLogprob | None] = []
            if draws is not None and results is not None:
                token_ids, entries = draws.read(results)
            found = [] if expansions is None else expansions()
            return Selection(
                token_ids,
                entries,
                {work: scores() for work, scores in scoring.items()},
                {work: new for work, new in zip(expanding, found, strict=True) if new is not None},
            )

        return Choice(None if results is None else results.first, finish)


@dataclass(frozen=True, slots=True)
class Drawing:
    """A row that draws."""

    row: Row
    drafts: list[int]  # it draws at each place of them too
    num_tokens: int  # of it, prompt included, before its draft
    source: int  # the last of them is this one of the tokens on the device; -1: the host knows it


class Draws:
    """Draws the tokens of some rows, each with its own parameters, whatever else is in the batch.

    What stays the same while these rows decode together is laid out once. A row with a draft is
    there once more for each token of it.
    """

    def __init__(self, rows: list[Row], vocab_size: int) -> None:
        self.rows = rows
        requests = [row.sequence.request for row in rows]
        params = [request.params for request in requests]
        self._counters = np.zeros((len(rows), 3), np.uint32)
        self._counters[:, 0] = [request.prompt_index for request in requests]
        self._counters[:, 1] = [row.choice for row in rows]
        self._num_top = [min(p.num_top, vocab_size) for p in params]
        self._masks = MaskStack()
        self._has_rules = any(request.rules is not None for request in requests)
        self._has_history = any(row.history is not None for row in rows)
        self._options: dict[str, Any] = {
            "temperature": np.array([p.temperature for p in params], np.float32),
            "top_k": np.array([p.top_k for p in params], np.int32),
            "top_p": np.array([p.top_p for p in params], np.float32),
            "min_p": np.array([p.min_p for p in params], np.float32),
            "seeds": np.array([request.seed for request in requests], np.uint64),
            "counters": self._counters,
            **bias_options([p.biases for p in params]),
        }
        if max(self._num_top) >= 0:
            self._options["num_top"] = np.array(self._num_top, np.int32)
        if self._has_history:
            for name in ("repetition_penalty", "frequency_penalty", "presence_penalty"):
                self._options[name] = np.array([getattr(p, name) for p in params], np.float32)

    def start(
        self, device: Device, logits: Array, drawing: list[Drawing], drawn: Array | None
    ) -> Results:
        """Draw for each row, at each place of its draft as if those before it held."""
        options = self._options
        self._counters[:, 2] = [
            item.num_tokens + place for item in drawing for place in range(1 + len(item.drafts))
        ]
        if self._has_rules:
            masks = [mask for item in drawing for mask in item.row.masks(item.drafts)]
            options |= self._masks.options(masks)
        if self._has_history:
            histories = [known for item in drawing for known in item.row.histories(item.drafts)]
            options |= history_options(histories)
            last = [item.source for item in drawing]
            options["history_last"] = None if drawn is None else np.array(last, np.int32)
        else:
            drawn = None
        max_top = max(self._num_top) if "num_top" in options else None
        return device.select(ops.sample, logits, options, drawn, max_top=max_top)

    def read(self, results: Results) -> tuple[list[int], list[TokenLogprob | None]]:
        """Return each row's token, -1 where there is none to draw, and its log-probabilities."""
        token_ids, *reported = results.read()
        ids: list[int] = token_ids.tolist()
        if "num_top" not in self._options:
            return ids, [None] * len(ids)
        logprobs, ranks, top_ids, top_logprobs, _ = (array.tolist() for array in reported)
        found = zip(self._num_top, logprobs, top_ids, top_logprobs, ranks, strict=True)
        return ids, [
            TokenLogprob(logprob, top_ids[:num_top], top_logprobs[:num_top], rank)
            if num_top >= 0
            else None
            for num_top, logprob, top_ids, top_logprobs, rank in found
        ]


def _take(logits: Array, rows: list[int]) -> Array:
    """Return some rows, without a copy where they follow each other."""
    first, count = rows[0], len(rows)
    if rows == list(range(first, first + count)):
        return logits[first : first + count]
    return logits[rows]
