# SPDX-License-Identifier: Apache-2.0
"""Logits to next tokens, and to the log-probabilities that were asked for."""

from __future__ import annotations

from typing import Any

import numpy as np

from fullbeam.engine.batch import FloatArray
from fullbeam.engine.logits import MaskStack, bias_options, history_options, logprobs_of
from fullbeam.engine.scheduler import Selection, Work
from fullbeam.engine.search import Expansion, expand
from fullbeam.engine.sequence import Row
from fullbeam.engine.text import TokenLogprob


class Selector:
    """Chooses the tokens of a step from its logits."""

    def __init__(self) -> None:
        self._draws: Draws | None = None

    def select(self, works: list[Work], logits: FloatArray) -> Selection:
        """Draw the tokens and score the prompts that the work names.

        Parameters
        ----------
        works
            What was computed, in the order of the batch.
        logits
            float32 [num_logit_rows, vocab_size], in the same order: scored tokens, then the last.
        """
        drawing: list[tuple[Row, list[int]]] = []  # with its draft: it draws at each place of it
        sources: list[int] = []  # logit row of each draw
        scores: dict[Work, list[TokenLogprob]] = {}
        expanding: list[Work] = []
        search_rows: list[list[int]] = []
        next_row = 0
        for work in works:
            num_scored = work.score_stop - work.score_start
            if num_scored:
                targets = work.ids[work.score_start + 1 : work.score_stop + 1]
                num_top = work.sequence.request.params.num_top_scored
                scores[work] = logprobs_of(
                    logits[next_row : next_row + num_scored], targets, num_top
                )
                next_row += num_scored
            if work.expands:
                expanding.append(work)
                last = [next_row] * len(work.search.live)  # all hypotheses start from the prompt
                search_rows.append([*range(next_row, next_row + len(work.nodes))] or last)
            drawing += [(row, work.drafts) for row in work.drawing]
            if work.drafts:
                sources += range(next_row, next_row + work.num_draws)
            else:
                sources += [next_row] * len(work.drawing)
            next_row += work.num_draws
        chosen: dict[Work, Expansion] = {}
        if expanding:
            found = expand([work.search for work in expanding], search_rows, logits)
            pairs = zip(expanding, found, strict=True)
            chosen = {work: expansion for work, expansion in pairs if expansion is not None}
        if not drawing:
            return Selection([], [], scores, chosen)
        rows = [row for row, drafts in drawing for _ in range(1 + len(drafts))]
        if self._draws is None or rows != self._draws.rows:
            self._draws = Draws(rows, logits.shape[1])
        return Selection(*self._draws.draw(_take(logits, sources), drawing), scores, chosen)


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

    def draw(
        self, logits: FloatArray, drawing: list[tuple[Row, list[int]]]
    ) -> tuple[list[int], list[TokenLogprob | None]]:
        """Return each row's token, -1 where there is none to draw, and its log-probabilities.

        `drawing` has each row once, with its draft: every place is drawn at as if those before it
        held.
        """
        from fullbeam import ops

        rows = self.rows
        options = self._options
        self._counters[:, 2] = [
            row.num_tokens + place for row, drafts in drawing for place in range(1 + len(drafts))
        ]
        if self._has_rules:
            masks = [mask for row, drafts in drawing for mask in row.masks(drafts)]
            options |= self._masks.options(masks)
        if self._has_history:
            histories = [item for row, drafts in drawing for item in row.histories(drafts)]
            options |= history_options(histories)
        drawn = ops.sample(logits, **options)
        token_ids: list[int] = drawn.token_ids.tolist()
        if "num_top" not in options:
            return token_ids, [None] * len(rows)
        found = zip(
            self._num_top,
            drawn.logprobs.tolist(),
            drawn.top_ids.tolist(),
            drawn.top_logprobs.tolist(),
            drawn.ranks.tolist(),
            strict=True,
        )
        return token_ids, [
            TokenLogprob(logprob, top_ids[:num_top], top_logprobs[:num_top], rank)
            if num_top >= 0
            else None
            for num_top, logprob, top_ids, top_logprobs, rank in found
        ]


def _take(logits: FloatArray, rows: list[int]) -> FloatArray:
    """Return some rows, without a copy where they follow each other."""
    first, count = rows[0], len(rows)
    if rows == list(range(first, first + count)):
        return logits[first : first + count]
    return logits[rows]
