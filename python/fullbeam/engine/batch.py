# SPDX-License-Identifier: Apache-2.0
"""The work of one step, as the model sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = Any  # of the device's kind
Int32Array = npt.NDArray[np.int32]
Uint32Array = npt.NDArray[np.uint32]
Int64Array = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


_NO_NUMBERS: Int32Array = np.zeros(0, np.int32)
_NO_WORDS: Uint32Array = np.zeros((0, 0), np.uint32)
_NO_PLACES: Int32Array = np.zeros((0, 0), np.int32)


@dataclass(frozen=True, slots=True)
class Batch:
    """Tokens of several sequences and where their keys and values live.

    Sequences that decode come first, then those that read several tokens of their prompt. Of the
    former, a plain one has one token row. A search (num_slots above 0) has a row for each live
    beam; its keys are the prompt, which all its rows see, and slots of generated tokens, of which
    each row sees those on the way to it: see `ops.attention_decode`. All arrays are C-contiguous
    and valid until the next step.
    """

    token_ids: Int32Array  # [num_tokens]
    positions: Int32Array  # [num_tokens], position of each token in its sequence
    slots: Int64Array  # [num_tokens], page * page_size + offset: where its key and value go
    query_starts: Int32Array  # [num_seqs + 1], offsets into the token rows
    num_decode: int  # how many of the first sequences decode
    page_table: Int32Array  # [num_seqs, max_pages], -1 where unused; any width
    seq_lens: Int32Array  # [num_seqs], KV length, this step's tokens included; a search's: prompt
    logit_rows: Int32Array  # [num_logit_rows], token rows whose logits are wanted, ascending
    largest_only: bool = False  # of which only the largest in each row matter
    # Of the sequences that decode: the searches among them. num_words is 0 where there is none.
    slot_starts: Int32Array = field(default_factory=lambda: _NO_NUMBERS)  # [num_decode], key index
    num_slots: Int32Array = field(default_factory=lambda: _NO_NUMBERS)  # [num_decode], 0: plain
    # [num_decode_rows, num_words], bit j of word w: slot 32 w + j
    visible: Uint32Array = field(default_factory=lambda: _NO_WORDS)
    # [num_decode, 32 * num_words], of the tokens in slots
    slot_positions: Int32Array = field(default_factory=lambda: _NO_PLACES)

    # Where the last step's tokens are not known to the host yet:
    drawn: Array | None = None  # int32 [num_drawn], on the device
    sources: Int32Array = field(
        default_factory=lambda: _NO_NUMBERS
    )  # [num_tokens] of drawn; -1: token_ids

    @property
    def num_decode_rows(self) -> int:
        """Token rows of the sequences that decode: the first ones."""
        return int(self.query_starts[self.num_decode])

    @property
    def num_words(self) -> int:
        """Words of 32 slots in a row of `visible`."""
        return int(self.visible.shape[1])
