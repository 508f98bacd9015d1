# SPDX-License-Identifier: Apache-2.0
"""Work to Batch, Batch to logits."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from fullbeam._core import Stop
from fullbeam.engine.batch import Batch
from fullbeam.engine.device import Device
from fullbeam.engine.scheduler import Work
from fullbeam.ops import Array


class ModelConfig(Protocol):
    """What the engine reads of a model's configuration."""

    @property
    def vocab_size(self) -> int:
        """Number of logits in a row."""

    @property
    def context_len(self) -> int:
        """Most positions that the model was made for."""


class KvCache(Protocol):
    """Keys and values of all layers, in pages."""

    def copy_page(self, src: int, dst: int) -> None:
        """Copy one page to another, in all layers."""


class Interrupted(Exception):
    """A forward pass was stopped."""


class Decoder(Protocol):
    """A model: tokens and their places in, logits out.

    The numbers of a token never depend on the rest of the batch nor on how a chain is cut into
    steps: prefix reuse, forks and preemption rely on it.
    """

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""

    @property
    def device(self) -> Device:
        """What computes."""

    @property
    def row_cost(self) -> float:
        """What one more token adds to a step of few, as a share of a step of one."""

    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token takes."""

    def allocate_kv(self, num_pages: int, page_size: int) -> KvCache:
        """Make room for `num_pages` pages of `page_size` tokens."""

    def forward(self, batch: Batch, kv: Any, stop: Stop) -> Array:
        """Return logits [num_logit_rows, vocab_size] on the device, valid until the next call.

        Where only the largest matter, others may be anything below it from their true value up.
        `kv` comes from its own allocate_kv. Raises `Interrupted` once `stop` is set.
        """


class Runner:
    """Runs the model on a step's work; keeps the batch's arrays from step to step."""

    def __init__(
        self,
        decoder: Decoder,
        kv: KvCache,
        *,
        page_size: int,
        max_pages_per_seq: int,
        max_seqs: int,
        max_tokens: int,
    ) -> None:
        self._decoder = decoder
        self._kv = kv
        self._page_size = page_size
        self._token_ids = np.zeros(max_tokens, np.int32)
        self._positions = np.zeros(max_tokens, np.int32)
        self._slots = np.zeros(max_tokens, np.int64)
        self._query_starts = np.zeros(max_seqs + 1, np.int32)
        self._page_table = np.full((max_seqs, max_pages_per_seq), -1, np.int32)
        self._seq_lens = np.zeros(max_seqs, np.int32)

    def forward(self, works: list[Work], stop: Stop, drawn: Array | None = None) -> Array:
        """Return the logits that the work asks for, in its order: scored tokens, then the last.

        `drawn` are tokens on the device, which work that has a `source` goes on from.
        """
        return self._decoder.forward(self.batch(works, drawn), self._kv, stop)

    def batch(self, works: list[Work], drawn: Array | None = None) -> Batch:
        """Lay the work out for the model."""
        size = self._page_size
        token_ids, positions, slots = self._token_ids, self._positions, self._slots
        num_tokens = num_decode = 0
        logit_rows: list[int] = []
        for idx, work in enumerate(works):
            start, count = work.start, work.count
            if work.nodes:
                num_decode += 1
                self._lay_out_level(work, idx, num_tokens)
            elif count == 1:
                num_decode += 1
                token_ids[num_tokens] = work.ids[start] if work.source < 0 else 0
                positions[num_tokens] = start
                slots[num_tokens] = work.table.pages[start // size] * size + start % size
            else:
                end = num_tokens + count
                token_ids[num_tokens:end] = work.ids[start : start + count]
                span = np.arange(start, start + count)
                positions[num_tokens:end] = span
                pages = work.table.row[span // size].astype(np.int64)
                slots[num_tokens:end] = pages * size + span % size
            if not work.nodes:
                width = work.table.row.size
                self._page_table[idx, :width] = work.table.row
                self._page_table[idx, width:] = -1
                self._seq_lens[idx] = start + count
            if work.score_stop > work.score_start:
                first = num_tokens - start
                logit_rows += range(first + work.score_start, first + work.score_stop)
            num_tokens += count
            self._query_starts[idx + 1] = num_tokens
            logit_rows += range(num_tokens - work.num_draws, num_tokens)
        num_seqs = len(works)
        sources = [] if drawn is None else [work.source for work in works]
        return Batch(
            token_ids=token_ids[:num_tokens],
            positions=positions[:num_tokens],
            slots=slots[:num_tokens],
            query_starts=self._query_starts[: num_seqs + 1],
            num_decode=num_decode,
            page_table=self._page_table[:num_seqs],
            seq_lens=self._seq_lens[:num_seqs],
            logit_rows=np.array(logit_rows, np.int32),
            largest_only=all(work.wants_largest_only for work in works),
            drawn=drawn,
            sources=np.array(sources, np.int32),
            **self._slot_arrays(works[:num_decode]),
        )

    def _lay_out_level(self, work: Work, idx: int, first: int) -> None:
        """One row for each hypothesis: its newest token, at the same position, in its own slot."""
        size, search = self._page_size, work.search
        assert search.table is not None
        end = first + work.count
        own = np.array([node.slot for node in work.nodes])
        pages = np.array(search.slot_pages)
        self._token_ids[first:end] = [node.token_id for node in work.nodes]
        self._positions[first:end] = work.start
        self._slots[first:end] = pages[own // size] * size + own % size
        prompt = search.table.pages
        width = len(prompt) + len(pages)
        if width > self._page_table.shape[1]:
            grown = np.full((len(self._page_table), 2 * width), -1, np.int32)
            grown[:, : self._page_table.shape[1]] = self._page_table
            self._page_table = grown
        row = self._page_table[idx]
        row[: len(prompt)] = prompt
        row[len(prompt) : width] = pages
        row[width:] = -1
        self._seq_lens[idx] = search.request.num_prompt_tokens

    def _slot_arrays(self, works: list[Work]) -> dict[str, Any]:
        """The slots of the searches among the works that decode; nothing where there is none."""
        if not any(work.nodes for work in works):
            return {}
        size, num_seqs = self._page_size, len(works)
        num_slots = np.zeros(num_seqs, np.int32)
        slot_starts = np.zeros(num_seqs, np.int32)
        for idx, work in enumerate(works):
            if work.nodes:
                num_slots[idx] = max(node.visible.bit_length() for node in work.nodes)
                slot_starts[idx] = len(work.table.pages) * size
        num_words = -(-int(num_slots.max()) // 32)
        visible = np.zeros((sum(work.count for work in works), num_words), np.uint32)
        slot_positions = np.zeros((num_seqs, 32 * num_words), np.int32)
        row = 0
        for idx, work in enumerate(works):
            if work.nodes:
                bits = b"".join(
                    node.visible.to_bytes(4 * num_words, "little") for node in work.nodes
                )
                visible[row : row + work.count] = np.frombuffer(bits, "<u4").reshape(-1, num_words)
                positions = work.search.slot_positions[: num_slots[idx]]
                slot_positions[idx, : len(positions)] = positions
            row += work.count
        return {
            "slot_starts": slot_starts,
            "num_slots": num_slots,
            "visible": visible,
            "slot_positions": slot_positions,
        }
