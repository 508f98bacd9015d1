# SPDX-License-Identifier: Apache-2.0
"""Beam search over one prompt: hypotheses in diversity groups, their shared KV, their results.

Generated tokens live in slots: all hypotheses of a request share one pool, and each sees the slots
of its own tokens by a bit mask. Choosing parents permutes masks; keys and values stay where they
are. A slot that no hypothesis sees any more takes a later token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from fullbeam import ops
from fullbeam.engine.batch import Int32Array
from fullbeam.engine.device import Device
from fullbeam.engine.full_line import FullLine, Hypothesis, Suggestion, best_score, rank_score
from fullbeam.engine.logits import bias_options, logprobs_of, stack_masks, starts_of
from fullbeam.engine.pages import PagePool, PageTable
from fullbeam.engine.rules import Rules, State
from fullbeam.engine.sequence import Request, Row, Sequence
from fullbeam.engine.text import Piece, TokenLogprob
from fullbeam.ops import Array

DoubleArray = npt.NDArray[np.float64]


class Node:
    """A token of a hypothesis, and through `parent` all before it; the root has none."""

    __slots__ = (
        "depth",
        "entry",
        "logprob",
        "parent",
        "score",
        "slot",
        "state",
        "token_id",
        "visible",
    )

    def __init__(
        self,
        parent: Node | None,
        token_id: int,
        state: State,
        score: float,
        logprob: float,
    ) -> None:
        self.parent = parent
        self.token_id = token_id
        self.depth: int = 0 if parent is None else parent.depth + 1  # tokens generated
        self.state = state
        self.score = score  # what the search ranks by: logprob less the diversity penalties
        self.logprob = logprob  # of all tokens together
        self.entry: TokenLogprob | None = None  # the model's log-probability, where reported
        self.slot = -1  # where the token's key and value are, once they are computed
        self.visible = 0  # bits of the slots of this token and those before it

    def path(self) -> list[Node]:
        """The nodes from the first token to this one."""
        nodes: list[Node] = []
        node: Node | None = self
        while node is not None and node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


@dataclass(slots=True)
class Group:
    """Hypotheses that compete with each other."""

    live: list[Node]  # best first
    finished: list[Node]


@dataclass(slots=True)
class Expansion:
    """What a search chose in a step, for each group, best first."""

    live: list[list[Node]]
    finished: list[list[Node]]

    def __len__(self) -> int:
        """Tokens chosen."""
        return sum(map(len, self.live)) + sum(map(len, self.finished))


class Search(Sequence):
    """A prompt that is computed once, and the hypotheses that continue it."""

    def __init__(self, request: Request, rules: Rules, pool: PagePool) -> None:
        super().__init__(request, range(0))
        params = request.params
        self.rules = rules
        self.groups = [
            Group([Node(None, -1, rules.start(), 0.0, 0.0)], [])
            for _ in range(params.diversity_groups)
        ]
        self.table: PageTable | None = None  # pages of the prompt, once it is computed
        self.slot_pages: list[int] = []
        self.slot_positions: Int32Array = np.zeros(0, np.int32)
        self.num_levels = 0  # tokens chosen for each live hypothesis
        self.num_computed_levels = 0  # of them, those whose keys and values are computed
        self._pool = pool
        self._num_generated = 0
        self._is_done = False

    @property
    def num_rows(self) -> int:
        """Rows of the batch that the search may take at once."""
        return self.request.params.width

    @property
    def num_pending(self) -> int:
        """Tokens of the next level, once the prompt is computed."""
        return 0 if self.table is None else len(self.level())

    @property
    def is_done(self) -> bool:
        """Whether the results stand."""
        return self._is_done

    @property
    def num_generated(self) -> int:
        """Tokens chosen so far, those of finished and of given up hypotheses included."""
        return self._num_generated

    @property
    def live(self) -> list[Node]:
        """Hypotheses that can grow: group after group, best first."""
        return [node for group in self.groups for node in group.live]

    def pages_to_start(self, page_size: int) -> int:
        """Pages of the prompt, and of the slots that a preemption gave up."""
        num_trunk = -(-self.num_trunk_tokens // page_size)
        return num_trunk + -(-self._used_slots().bit_length() // page_size)

    def take_trunk(self, trunk: PageTable, copy_page: Callable[[int, int], None]) -> int:
        """Go on from the computed prompt."""
        self.table, self.trunk = trunk, None
        return 0

    def level(self) -> list[Node]:
        """The tokens to compute next: the newest, or earlier ones that a preemption lost."""
        depth = self.num_computed_levels + 1
        nodes: dict[Node, None] = {}
        for node in self.live:
            while node.depth > depth:
                assert node.parent is not None
                node = node.parent
            nodes[node] = None
        return list(nodes)

    def reserve(self, nodes: list[Node]) -> bool:
        """Give each token a slot, the lowest free one; False where pages run out.

        Slots depend on the search alone, not on the rest of the batch or on preemptions: so does
        the order in which attention adds them up, and with it every bit of the result.
        """
        used = self._used_slots()
        for node in nodes:
            if node.slot < 0:
                assert node.parent is not None
                bit = ~used & (used + 1)
                used |= bit
                node.slot = bit.bit_length() - 1
                node.visible = node.parent.visible | bit
        num_slots = used.bit_length()
        while len(self.slot_pages) * self._pool.page_size < num_slots:
            page = self._pool.allocate()
            if page < 0:
                return False
            self.slot_pages.append(page)
        if len(self.slot_positions) < num_slots:
            self.slot_positions = np.resize(self.slot_positions, 2 * num_slots)
        for node in nodes:
            self.slot_positions[node.slot] = self.request.num_prompt_tokens + node.depth - 1
        return True

    def advance(self, expansion: Expansion) -> None:
        """Take what was chosen in a step."""
        request = self.request
        self.num_levels += 1
        self._num_generated += len(expansion)
        for group, live, finished in zip(
            self.groups, expansion.live, expansion.finished, strict=True
        ):
            group.live = live
            group.finished += finished
        has_word = request.params.mode == "ONE_TOKEN" and any(g.finished for g in self.groups)
        self._is_done = (
            has_word or not self.live or self.num_levels == request.max_tokens or self._is_decided()
        )

    def pieces(self) -> list[Piece]:
        """The results, best first: at most `n` texts, or the suggestions of a mode."""
        request = self.request
        if request.params.mode is not None:
            return [
                Piece(
                    index=request.indices.start + choice,
                    text=found.text,
                    token_ids=[step.token_id for step in node.path()],
                    finish_reason="stop" if is_finished else "length",
                    num_tokens=node.depth,
                    score=found.score,
                )
                for choice, (found, node, is_finished) in enumerate(self._suggestions())
            ]
        ranked = [(self._rank(node), node) for node in [*self._finished, *self._unfinished]]
        ranked.sort(key=lambda item: -item[0])  # stable: finished ones first, group after group
        return [
            self._piece(choice, node, score)
            for choice, (score, node) in enumerate(ranked[: request.params.n])
        ]

    def held_pages(self) -> list[int]:
        """Every page that the search holds, once for each reference."""
        prompt = [] if self.table is None else self.table.pages
        return [*super().held_pages(), *prompt, *self.slot_pages]

    def release(self) -> None:
        """Give back every page; the hypotheses stay, and keep the numbers of their slots."""
        super().release()
        while self.slot_pages:
            self._pool.release(self.slot_pages.pop())
        if self.table is not None:
            self.table.release()
            self.table = None
        self.num_computed_levels = 0

    def _used_slots(self) -> int:
        used = 0
        for node in self.live:
            used |= node.visible if node.parent is None else node.parent.visible | node.visible
        return used

    @property
    def _finished(self) -> list[Node]:
        return [node for group in self.groups for node in group.finished]

    @property
    def _unfinished(self) -> list[Node]:
        """Hypotheses that are results as they are, for want of tokens to go on with."""
        return self.live if self.num_levels == self.request.max_tokens else []

    def _rank(self, node: Node) -> float:
        params = self.request.params
        return rank_score(node.logprob, node.depth, params.len_norm, params.length_rank)

    def _is_decided(self) -> bool:
        """Whether no live hypothesis can change the results any more."""
        params = self.request.params
        wanted = params.n if params.mode is None else params.top_n
        if wanted is None or params.alike is not None:
            return False
        bound = max(
            best_score(
                node.logprob,
                node.depth,
                self.request.max_tokens,
                params.len_norm,
                params.length_rank,
            )
            for node in self.live
        )
        if sum(self._rank(node) > bound for node in self._finished) < wanted:
            return False
        if params.mode is None:
            return True
        return sum(found.score > bound for found, _, _ in self._suggestions()) >= wanted

    def _suggestions(self) -> list[tuple[Suggestion, Node, bool]]:
        """What a mode makes of the hypotheses so far, best first."""
        request, params = self.request, self.request.params
        full_line = FullLine(
            mode=params.mode or "",
            constraint=request.constraint,
            prefix=params.prefix,
            stop_strings=params.stop_strings,
            only_full_lines=params.only_full_lines,
            len_norm=params.len_norm,
            length_penalty=params.length_rank,
            alike=params.alike,
            keep_kinds=params.kept_kinds,
            group_top_n=params.group_top_n,
            top_n=params.top_n,
        )
        unfinished = set(self._unfinished)
        nodes = [
            (node, node not in unfinished, idx)
            for idx, group in enumerate(self.groups)
            for node in [*group.finished, *(node for node in group.live if node in unfinished)]
        ]
        hypotheses = []
        for node, is_finished, idx in nodes:
            ids = [step.token_id for step in node.path()]
            if ids and ids[-1] in request.end_ids:
                ids.pop()
            data = b"".join(map(request.tokenizer.token_bytes, ids))
            hypotheses.append(Hypothesis(data, node.depth, node.logprob, is_finished, idx))
        return [(found, *nodes[found.source][:2]) for found in full_line.suggestions(hypotheses)]

    def _piece(self, choice: int, node: Node, score: float) -> Piece:
        row = Row(self, choice)
        for step in node.path():
            row.append(step.token_id, step.entry)
        if row.finish_reason is None:
            row.finish_without_token()
        piece = row.take_piece()
        assert piece is not None
        return replace(piece, score=score)


def expand(
    device: Device, searches: list[Search], rows: list[list[int]], logits: Array
) -> Callable[[], list[Expansion | None]]:
    """Choose the next tokens of several searches.

    Parameters
    ----------
    device
        What computes.
    searches
        Those whose newest tokens, or prompts, were computed.
    rows
        For each, the row of `logits` of each live hypothesis, in order.
    logits
        float32 [num_logit_rows, vocab_size], on the device.

    Returns
    -------
    What waits for the choice and, of each search, gives what it chose; None where the model gave no
    finite logit.
    """
    beams = [(search, node) for search in searches for node in search.live]
    groups = [(search, group) for search in searches for group in search.groups]
    beam_rows = [row for of_search in rows for row in of_search]
    allowed = [search.rules.allowed(node.state, search.num_levels) for search, node in beams]
    terminators = [search.rules.terminators(node.state) for search, node in beams]
    widths = [search.request.params.beam_size or 0 for search, _ in groups]
    strengths = [search.request.params.diversity_strength for search in searches]
    options = {
        "beam_rows": np.array(beam_rows, np.int32),
        "sums": np.array([(node.score, node.logprob) for _, node in beams], np.float64),
        "group_starts": starts_of([len(group.live) for _, group in groups]),
        "request_starts": starts_of([len(search.groups) for search in searches]),
        "beam_sizes": np.array(widths, np.int32),
        "diversity_strengths": np.array(strengths, np.float32),
        **stack_masks(allowed, "allowed", "allowed_idx"),
        **stack_masks(terminators, "terminators", "terminator_idx"),
        **bias_options([search.request.params.biases for search, _ in beams]),
    }
    results = device.select(ops.beam_step, logits, options, max_beam=max(widths))

    def read() -> list[Expansion | None]:
        step = ops.BeamStep(*results.read())
        live = _nodes(beams, step.parents, step.token_ids, step.sums)
        finished = _nodes(beams, step.finished_parents, step.finished_token_ids, step.finished_sums)
        _add_entries(device, [*live, *finished], beams, beam_rows, logits)
        expansions: list[Expansion | None] = []
        first = first_beam = 0
        for search in searches:
            end, end_beam = first + len(search.groups), first_beam + len(search.live)
            expansion = Expansion(live[first:end], finished[first:end])
            # Where every token is allowed, only a row without finite logits leaves no candidate.
            is_lost = len(expansion) == 0 and None in allowed[first_beam:end_beam]
            expansions.append(None if is_lost else expansion)
            first, first_beam = end, end_beam
        return expansions

    return read


def _nodes(
    beams: list[tuple[Search, Node]], parents: Int32Array, token_ids: Int32Array, sums: DoubleArray
) -> list[list[Node]]:
    """The hypotheses of each group, from arrays [num_groups, max_beam] that end with -1."""
    groups: list[list[Node]] = []
    for of_group in zip(parents.tolist(), token_ids.tolist(), sums.tolist(), strict=True):
        nodes: list[Node] = []
        for beam, token_id, (score, logprob) in zip(*of_group, strict=True):
            if beam < 0:
                break
            search, parent = beams[beam]
            state = search.rules.advance(parent.state, token_id)
            nodes.append(Node(parent, token_id, state, score, logprob))
        groups.append(nodes)
    return groups


def _add_entries(
    device: Device,
    groups: list[list[Node]],
    beams: list[tuple[Search, Node]],
    beam_rows: list[int],
    logits: Array,
) -> None:
    """Look up the model's log-probabilities of the new tokens where they are to be reported."""
    num_top = {node: search.request.params.num_top for search, node in beams}
    if max(num_top.values()) < 0:
        return
    row_of = dict(zip((node for _, node in beams), beam_rows, strict=True))
    pairs = [(node, node.parent) for group in groups for node in group if node.parent is not None]
    pairs = [(node, parent) for node, parent in pairs if num_top[parent] >= 0]
    if not pairs:
        return
    token_ids = np.array([node.token_id for node, _ in pairs], np.int32)
    parents = [parent for _, parent in pairs]
    most = max(num_top[parent] for parent in parents)
    rows = logits[[row_of[parent] for parent in parents]]
    entries = logprobs_of(device, rows, token_ids, most)
    for (node, parent), entry in zip(pairs, entries(), strict=True):
        node.entry = entry.cut(num_top[parent])
