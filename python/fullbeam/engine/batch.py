# SPDX-License-Identifier: Apache-2.0
"""The work of one step, as the model sees it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Batch:
    """Tokens of several sequences and where their keys and values live.

    Sequences with a single query token come first. All arrays are C-contiguous and valid until the
    next step.
    """

    token_ids: Int32Array  # [num_tokens]
    positions: Int32Array  # [num_tokens], position of each token in its sequence
    slots: Int64Array  # [num_tokens], page * page_size + offset: where its key and value go
    query_starts: Int32Array  # [num_seqs + 1], offsets into the token rows
    num_decode: int  # how many of the first sequences have exactly one query token
    page_table: Int32Array  # [num_seqs, max_pages], -1 where unused
    seq_lens: Int32Array  # [num_seqs], KV length, this step's tokens included
    logit_rows: Int32Array  # [num_logit_rows], token rows whose logits are wanted, ascending
