# SPDX-License-Identifier: Apache-2.0
"""The cases that attention_prefill and attention_decode are tested with, and their float32 run."""

from __future__ import annotations

from typing import Any

import numpy as np

from op_helpers import Array, PagedKv

# num_q_heads, num_kv_heads, head_dim, page_size, window, softcap, dtype of the pages
CASES = [
    (4, 4, 32, 16, 0, 0.0, "float32"),
    (8, 2, 64, 16, 0, 0.0, "float16"),
    (4, 1, 256, 32, 0, 0.0, "float16"),
    (6, 3, 16, 128, 0, 0.0, "float32"),
    (14, 2, 64, 64, 0, 0.0, "float16"),
    (8, 2, 32, 16, 7, 0.0, "float32"),
    (4, 1, 48, 32, 33, 0.0, "float16"),
    (2, 2, 128, 16, 0, 5.0, "float32"),
    (4, 2, 80, 16, 40, 2.0, "float16"),
    (72, 1, 16, 16, 0, 0.0, "float32"),
]


def naive(
    q: Array, kv: PagedKv, query_starts: Any, *, scale: float, window: int = 0, softcap: float = 0.0
) -> Array:
    """The definition, one query row at a time, in float32."""
    out = np.zeros(q.shape, np.float32)
    num_kv_heads, page_size = kv.k_pages.shape[1:3]
    for seq, seq_len in enumerate(kv.seq_lens.tolist()):
        slots = np.arange(seq_len)
        pages, offsets = kv.page_table[seq, slots // page_size], slots % page_size
        keys = kv.k_pages[pages, :, offsets].astype(np.float32)  # [seq_len, num_kv_heads, head_dim]
        values = kv.v_pages[pages, :, offsets].astype(np.float32)
        begin, end = query_starts[seq], query_starts[seq + 1]
        for token in range(begin, end):
            position = seq_len - end + token
            first = max(0, position - window + 1) if window else 0
            for head in range(q.shape[1]):
                kv_head = head * num_kv_heads // q.shape[1]
                seen = slice(first, position + 1)
                scores = keys[seen, kv_head] @ q[token, head] * np.float32(scale)
                if softcap:
                    scores = np.float32(softcap) * np.tanh(scores / np.float32(softcap))
                weights = np.exp(scores - scores.max())
                out[token, head] = weights @ values[seen, kv_head] / weights.sum()
    return out
