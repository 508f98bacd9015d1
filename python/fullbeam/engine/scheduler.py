# SPDX-License-Identifier: Apache-2.0
"""Which sequences run in a step: admission, chunked prefill, pages, preemption; their results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from fullbeam.engine.batch import Int32Array
from fullbeam.engine.pages import PagePool, PageTable
from fullbeam.engine.sequence import Row, Sequence
from fullbeam.engine.text import TokenLogprob


@dataclass(eq=False, slots=True)
class Work:
    """Consecutive tokens of one chain to compute in this step."""

    sequence: Sequence
    row: Row | None  # None: the prompt, for all rows
    table: PageTable
    ids: Int32Array  # token ids of the chain
    start: int  # first token to compute
    count: int
    drawing: list[Row]  # rows that draw a token from the logits after the last one
    score_start: int = 0  # logits after tokens score_start .. score_stop - 1 score the next ones
    score_stop: int = 0


@dataclass(eq=False, slots=True)
class Selection:
    """What came of a step's logits."""

    token_ids: list[int]  # of the drawing rows, in the order of the work; -1 without finite logit
    entries: list[TokenLogprob | None]  # likewise
    scores: dict[Work, list[TokenLogprob]]


class Scheduler:
    """First come, first served, within the limits of rows, pages and tokens for a step.

    Decoding rows always run; what is left of the token budget goes to prompts, oldest first. When
    pages run out the sequence admitted last gives up its own and waits at the head of the queue.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        copy_page: Callable[[int, int], None],
        max_pages_per_seq: int,
        max_rows: int,
        token_budget: int,
        max_scored_tokens: int,
    ) -> None:
        self.pool = pool
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission
        self.num_preemptions = 0
        self.num_reused_tokens = 0
        self._copy_page = copy_page
        self._max_pages_per_seq = max_pages_per_seq
        self._max_rows = max_rows
        self._token_budget = token_budget
        self._max_scored_tokens = max_scored_tokens
        self._tokens_left = 0
        self._scores_left = 0

    def plan(self) -> list[Work]:
        """Choose this step's work and reserve its pages; single tokens come first."""
        decoding = sum(
            row.table is not None and row.num_tokens - row.table.num_tokens == 1
            for sequence in self.running
            for row in sequence.rows
        )
        self._tokens_left = self._token_budget - decoding
        self._scores_left = self._max_scored_tokens
        num_preemptions = self.num_preemptions
        works: list[Work] = []
        idx = 0
        while idx < len(self.running):  # preemption shortens the list from its end
            sequence = self.running[idx]
            if sequence.trunk is not None:
                self._plan_prompt(sequence, sequence.trunk, works)
            else:
                self._plan_rows(sequence, works)
            idx += 1
        if self.num_preemptions > num_preemptions:
            works = [work for work in works if work.sequence.is_admitted]
        else:
            self._admit(works)
        works.sort(key=_is_chunk)
        return works

    def remove(self, sequence: Sequence) -> None:
        """Drop a sequence, wherever it is, and free its rows and pages."""
        if sequence.is_admitted:
            self.running.remove(sequence)
            sequence.release()
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def commit(self, works: list[Work], selection: Selection) -> tuple[list[Row], list[Sequence]]:
        """Record what a step computed.

        Returns the rows that have new tokens or are finished, and the sequences that drew no token
        because the model gave no finite logit: those are for the caller to remove.
        """
        changed: list[Row] = []
        failed: list[Sequence] = []
        next_draw = 0
        for work in works:
            work.table.commit(work.ids, work.count)
            sequence = work.sequence
            sequence.scores.extend(selection.scores.get(work, ()))
            for row in work.drawing:
                token_id = selection.token_ids[next_draw]
                if token_id < 0:
                    failed.append(sequence)
                else:
                    row.append(token_id, selection.entries[next_draw])
                next_draw += 1
            changed += work.drawing
            if work.row is None and work.table.num_tokens == sequence.num_trunk_tokens:
                if not work.drawing and not sequence.has_tokens:  # scored, nothing to generate
                    for row in sequence.rows:
                        row.finish_without_token()
                    changed += sequence.rows
                sequence.has_tokens = True
                self._fork(sequence, work.table)
            for row in work.drawing:
                if row.finish_reason is not None and row.table is not None:
                    row.table.release()
                    row.table = None
        for sequence in {row.sequence: None for row in changed if row.finish_reason is not None}:
            if not sequence.live_rows:
                self.remove(sequence)
        return changed, failed

    def _plan_prompt(self, sequence: Sequence, trunk: PageTable, works: list[Work]) -> None:
        start = trunk.num_tokens
        count = min(sequence.num_trunk_tokens - start, self._tokens_left)
        score_start = score_stop = 0
        if sequence.wants_scores:
            num_scored = len(sequence.scores)
            last_scored = sequence.request.num_prompt_tokens - 1
            count = min(count, max(num_scored, start) - start + self._scores_left)
            score_start = min(max(start, num_scored), last_scored)
            score_stop = max(score_start, min(start + count, last_scored))
            self._scores_left -= score_stop - score_start
        if count <= 0:
            return
        self._tokens_left -= count
        is_last = start + count == sequence.num_trunk_tokens
        draws = is_last and not sequence.has_tokens and sequence.request.max_tokens > 0
        drawing = list(sequence.rows) if draws else []
        ids = sequence.request.prompt_ids
        works.append(
            Work(sequence, None, trunk, ids, start, count, drawing, score_start, score_stop)
        )

    def _plan_rows(self, sequence: Sequence, works: list[Work]) -> None:
        for row in sequence.rows:
            table = row.table
            if table is None:
                continue
            start = table.num_tokens
            pending = row.num_tokens - start
            count = pending
            if pending > 1:  # tokens that were generated before a preemption
                count = min(pending, self._tokens_left)
                if count <= 0:
                    continue
            while not table.reserve(count, self._copy_page):
                self._preempt(self.running[-1])
                if not sequence.is_admitted:
                    return
            if pending > 1:
                self._tokens_left -= count
            drawing = [row] if count == pending else []
            works.append(Work(sequence, row, table, row.ids, start, count, drawing))

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        sequence.release()
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _admit(self, works: list[Work]) -> None:
        if not self.waiting:
            return
        num_rows = sum(len(sequence.live_rows) for sequence in self.running)
        while self.waiting and self._tokens_left > 0:
            sequence = self.waiting[0]
            num_new = len(sequence.live_rows)
            if num_rows + num_new > self._max_rows:
                return
            # A page to grow for each running row, so that newcomers are not sent back at once.
            if not self._start(sequence, spare=num_rows):
                return
            self.waiting.popleft()
            self.running.append(sequence)
            num_rows += num_new
            assert sequence.trunk is not None
            self._plan_prompt(sequence, sequence.trunk, works)

    def _start(self, sequence: Sequence, *, spare: int) -> bool:
        """Take all pages of the prompt, provided that those of tokens generated before fit too."""
        size = self.pool.page_size
        num_trunk = sequence.num_trunk_tokens
        num_pages = -(-num_trunk // size)
        if sequence.has_tokens:
            shared = num_trunk // size
            num_private = sum(-(-row.num_tokens // size) - shared for row in sequence.live_rows)
            num_pages = max(num_pages, shared + num_private)
        trunk = PageTable(self.pool, self._max_pages_per_seq)
        ids = sequence.request.prompt_ids
        num_found = trunk.reuse(ids, sequence.num_reusable, sequence.keys(size))
        if self.pool.num_available < num_pages - len(trunk.pages) + spare:
            trunk.release()
            return False
        reserved = trunk.reserve(num_trunk - num_found, self._copy_page)
        assert reserved
        self.num_reused_tokens += num_found
        sequence.trunk = trunk
        sequence.is_admitted = True
        return True

    def _fork(self, sequence: Sequence, trunk: PageTable) -> None:
        """Give every live row the prompt's pages, and cached ones of what it generated before."""
        for row in sequence.live_rows:
            row.table = trunk.fork()
            self.num_reused_tokens += row.table.reuse(row.ids, row.num_tokens - 1)
        trunk.release()
        sequence.trunk = None


def _is_chunk(work: Work) -> bool:
    return work.count != 1
