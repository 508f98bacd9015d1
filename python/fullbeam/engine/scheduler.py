# SPDX-License-Identifier: Apache-2.0
"""Which sequences run in a step: admission, chunked prefill, pages, preemption; their results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from fullbeam.engine.batch import Int32Array
from fullbeam.engine.drafts import Allowance
from fullbeam.engine.pages import PagePool, PageTable
from fullbeam.engine.search import Expansion, Node, Search
from fullbeam.engine.sequence import Row, Sequence
from fullbeam.engine.text import TokenLogprob


@dataclass(eq=False, slots=True)
class Work:
    """Tokens to compute in this step: consecutive ones of a chain, or a level of a search."""

    sequence: Sequence
    row: Row | None  # None: the prompt, for all rows, or a search
    table: PageTable
    ids: Int32Array  # token ids of the chain
    start: int  # first token to compute
    count: int
    drawing: list[Row]  # rows that draw a token from the logits after the last one
    score_start: int = 0  # logits after tokens score_start .. score_stop - 1 score the next ones
    score_stop: int = 0
    nodes: list[Node] = field(default_factory=list)  # of a search: one token for each
    expands: bool = False  # the search chooses its next tokens from the logits
    drafts: list[int] = field(default_factory=list)  # the last tokens: guessed, to be drawn at
    source: int = -1  # the one token is what this row of the step under way draws
    num_taken: int = 0  # tokens that came of it, of the row that got most; set by commit

    @property
    def search(self) -> Search:
        """The sequence, where it is a search."""
        assert isinstance(self.sequence, Search)
        return self.sequence

    @property
    def is_void(self) -> bool:
        """Whether its row ended, or its sequence was dropped, while the step was under way."""
        return self.row is not None and self.row.table is not self.table

    @property
    def wants_largest_only(self) -> bool:
        """Whether all that it wants of a row of logits is the largest one."""
        is_scored = self.score_stop > self.score_start
        return not (is_scored or self.expands) and all(
            row.takes_largest(self.drafts) for row in self.drawing
        )

    @property
    def num_draws(self) -> int:
        """Rows of logits that tokens are drawn or chosen from."""
        if self.expands:
            return max(1, len(self.nodes))
        return 1 + len(self.drafts) if self.drawing else 0


@dataclass(eq=False, slots=True)
class Selection:
    """What came of a step's logits."""

    token_ids: list[int]  # draws in the order of the work, of drafts too; -1: no finite logit
    entries: list[TokenLogprob | None]  # likewise
    scores: dict[Work, list[TokenLogprob]]
    chosen: dict[Work, Expansion] = field(default_factory=dict)  # of the searches that expand


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
        draft_tokens: int,
        row_cost: float,
    ) -> None:
        self.pool = pool
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission
        self.num_preemptions = 0
        self.num_reused_tokens = 0
        self.num_generated_tokens = 0
        self.num_drafted_tokens = 0
        self.num_accepted_tokens = 0
        self._copy_page = copy_page
        self._max_pages_per_seq = max_pages_per_seq
        self._max_rows = max_rows
        self._token_budget = token_budget
        self._max_scored_tokens = max_scored_tokens
        self.draft_tokens = draft_tokens
        self._row_cost = row_cost
        self._tokens_left = 0
        self._scores_left = 0
        self._num_decoding = 0
        self._allowance = Allowance(0, row_cost)

    def plan(self) -> list[Work]:
        """Choose this step's work and reserve its pages; single tokens come first."""
        decoding = sum(sequence.num_pending for sequence in self.running)
        self._tokens_left = self._token_budget - decoding
        self._scores_left = self._max_scored_tokens
        self._num_decoding = decoding
        self._allowance = Allowance(decoding, self._row_cost)
        num_preemptions = self.num_preemptions
        works: list[Work] = []
        idx = 0
        while idx < len(self.running):  # preemption shortens the list from its end
            sequence = self.running[idx]
            if sequence.trunk is not None:
                self._plan_prompt(sequence, sequence.trunk, works)
            elif isinstance(sequence, Search):
                self._plan_level(sequence, works)
            else:
                self._plan_rows(sequence, works)
            idx += 1
        if self.num_preemptions > num_preemptions:
            works = [work for work in works if work.sequence.is_admitted]
        else:
            self._admit(works)
        works.sort(key=_is_chunk)
        return works

    def plan_ahead(self, works: list[Work]) -> list[Work]:
        """Choose the work of the step after the one under way, whose tokens are not known yet.

        None unless all that runs are rows that draw a token each, freely: what they may draw, or
        which of them go on, must not hang on those tokens. A row that turns out to have ended
        computes one token for nothing.
        """
        live = [work for work in works if not work.is_void]
        if len(live) != sum(sequence.num_rows for sequence in self.running):
            return []
        if not all(_draws_freely(work) for work in works) or self._can_admit():
            return []
        if self.pool.num_available < len(live):  # a preemption must see the tokens
            return []
        ahead: list[Work] = []
        for idx, work in enumerate(works):
            row, start = work.row, work.start + work.count
            if row is not None and not work.is_void and start + 1 < len(row.ids):
                reserved = work.table.reserve(start + 1 - work.table.num_tokens, self._copy_page)
                assert reserved
                ahead.append(
                    Work(work.sequence, row, work.table, row.ids, start, 1, [row], source=idx)
                )
        return ahead

    def remove(self, sequence: Sequence) -> None:
        """Drop a sequence, wherever it is, and free its rows and pages."""
        if sequence.is_admitted:
            self.running.remove(sequence)
            sequence.release()
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def commit(
        self, works: list[Work], selection: Selection
    ) -> tuple[list[Row], list[Sequence], list[Sequence]]:
        """Record what a step computed.

        Returns the rows that have new tokens or are finished, the sequences that are done, and
        those that got no token because the model gave no finite logit, which the caller removes.
        """
        changed: list[Row] = []
        failed: list[Sequence] = []
        live = [work for work in works if not work.is_void]
        next_draw = 0
        for work in works:
            sequence = work.sequence
            if work.is_void:
                next_draw += work.num_draws
                continue
            for row in work.drawing:
                draws = slice(next_draw, next_draw + 1 + len(work.drafts))
                num_taken = row.take(
                    selection.token_ids[draws], selection.entries[draws], work.drafts
                )
                if num_taken == 0:
                    failed.append(sequence)
                self.num_generated_tokens += num_taken
                work.num_taken = max(work.num_taken, num_taken)
                next_draw = draws.stop
            changed += work.drawing
            if isinstance(sequence, Search) and work.nodes:
                sequence.num_computed_levels += 1
            else:
                work.table.commit(work.ids, work.count - self._num_rejected(work))
            sequence.scores.extend(selection.scores.get(work, ()))
            if work.table is sequence.trunk and work.table.num_tokens == sequence.num_trunk_tokens:
                if sequence.request.max_tokens == 0:  # scored, nothing to generate
                    sequence.finish_without_token()
                    changed += sequence.rows
                sequence.has_tokens = True
                self.num_reused_tokens += sequence.take_trunk(work.table, self._copy_page)
            if work.expands and isinstance(sequence, Search):
                expansion = selection.chosen.get(work)
                if expansion is None:
                    failed.append(sequence)
                else:
                    sequence.advance(expansion)
                    self.num_generated_tokens += len(expansion)
                    work.num_taken = 1
            for row in work.drawing:
                if row.finish_reason is not None and row.table is not None:
                    row.table.release()
                    row.table = None
        done = [work.sequence for work in live if work.sequence.is_done]
        done = list(dict.fromkeys(done))
        for sequence in done:
            self.remove(sequence)
        return changed, done, failed

    def _num_rejected(self, work: Work) -> int:
        """Return how many drafted tokens did not hold, and learn from it."""
        if work.row is None or not work.drafts:
            return 0
        num_drafted, num_held = len(work.drafts), max(0, work.num_taken - 1)
        self.num_drafted_tokens += num_drafted
        self.num_accepted_tokens += num_held
        work.row.drafter.note(num_drafted, num_held)
        return num_drafted - num_held

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
        expands = draws and isinstance(sequence, Search)
        works.append(
            Work(
                sequence,
                None,
                trunk,
                ids,
                start,
                count,
                drawing,
                score_start,
                score_stop,
                expands=expands,
            )
        )

    def _plan_level(self, search: Search, works: list[Work]) -> None:
        nodes = search.level()
        while not search.reserve(nodes):
            self._preempt(self.running[-1])
            if not search.is_admitted:
                return
        table = search.table
        assert table is not None
        start = table.num_tokens + search.num_computed_levels
        expands = search.num_computed_levels + 1 == search.num_levels
        ids = search.request.prompt_ids
        works.append(
            Work(search, None, table, ids, start, len(nodes), [], nodes=nodes, expands=expands)
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
            drafts = self._draft(row, table) if pending == 1 else []
            count += len(drafts)
            works.append(Work(sequence, row, table, row.ids, start, count, drawing, drafts=drafts))

    def _draft(self, row: Row, table: PageTable) -> list[int]:
        """Guess a row's next tokens, if they are worth it and room for them is free."""
        # The last token that is asked for is drawn behind the draft.
        most = min(self.draft_tokens, self._tokens_left, len(row.ids) - row.num_tokens - 1)
        if most <= 0 or self._allowance.is_spent:
            return []
        if not row.drafter.look(row.ids, row.num_tokens):
            return []
        count = self._allowance.take(row.drafter.share, most)
        # Pages that another row may need to go on are not taken for a guess.
        if count == 0 or self.pool.num_available < self._num_decoding + count:
            return []
        reserved = table.reserve(1 + count, self._copy_page)
        assert reserved
        self._tokens_left -= count
        return row.drafter.draft(row.ids, row.num_tokens, count)

    def _can_admit(self) -> bool:
        num_rows = sum(sequence.num_rows for sequence in self.running)
        return bool(self.waiting) and num_rows + self.waiting[0].num_rows <= self._max_rows

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        sequence.release()
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _admit(self, works: list[Work]) -> None:
        if not self.waiting:
            return
        num_rows = sum(sequence.num_rows for sequence in self.running)
        while self.waiting and self._tokens_left > 0:
            sequence = self.waiting[0]
            num_new = sequence.num_rows
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
        num_pages = sequence.pages_to_start(size)
        trunk = PageTable(self.pool, self._max_pages_per_seq)
        ids = sequence.request.prompt_ids
        num_found = trunk.reuse(ids, sequence.num_reusable, self._copy_page, sequence.keys(size))
        if self.pool.num_available < num_pages - len(trunk.pages) + spare:
            trunk.release()
            return False
        reserved = trunk.reserve(num_trunk - num_found, self._copy_page)
        assert reserved
        self.num_reused_tokens += num_found
        sequence.trunk = trunk
        sequence.is_admitted = True
        return True


def _draws_freely(work: Work) -> bool:
    """Whether a row draws, with no mask that changes with the tokens before."""
    row = work.row
    if row is None or not work.drawing or work.drafts:
        return False
    return row.sequence.request.rules is None


def _is_chunk(work: Work) -> bool:
    return work.count != 1 and not work.nodes
