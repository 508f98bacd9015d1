# SPDX-License-Identifier: Apache-2.0
"""The cases that attention_prefill and attention_decode are tested with, their float32 run, and
searches: prompts with a tree of generated tokens in slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fullbeam import ops, reference
from op_helpers import Array, PagedKv, as_activation, paged_kv, wide

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

# For tensor cores: the head sizes that have kernels of their own, and some that are padded; groups
# of 1 to 8, and more rows than one warp, or one block, has. float16 and bfloat16 are both run.
# num_q_heads, num_kv_heads, head_dim, page_size, window, softcap
HALF_CASES = [
    (1, 1, 64, 16, 0, 0.0),
    (4, 2, 80, 16, 40, 2.0),
    (3, 1, 96, 32, 0, 0.0),
    (8, 2, 128, 64, 0, 0.0),
    (5, 1, 128, 128, 33, 0.0),
    (12, 2, 64, 24, 7, 0.0),
    (7, 1, 256, 32, 0, 5.0),
    (8, 1, 48, 16, 0, 0.0),
    (20, 1, 160, 16, 40, 0.0),
    (72, 1, 16, 8, 0, 0.0),
]


def halves(q: Array, kv: PagedKv, dtype: str) -> tuple[Any, PagedKv]:
    """Queries and pages of that dtype."""
    pages = (as_activation(pages, dtype) for pages in (kv.k_pages, kv.v_pages))
    return as_activation(q, dtype), PagedKv(*pages, kv.page_table, kv.seq_lens)


def widened(q: Any, kv: PagedKv) -> tuple[Array, PagedKv]:
    """The numbers of `halves` in float32."""
    pages = (wide(pages).astype(np.float32) for pages in (kv.k_pages, kv.v_pages))
    return wide(q).astype(np.float32), PagedKv(*pages, kv.page_table, kv.seq_lens)


def naive(
    q: Array,
    kv: PagedKv,
    query_starts: Any,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    weights_dtype: str = "float32",
) -> Array:
    """The definition, one query row at a time, in float32, softmax weights rounded to a dtype."""
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
                rounded = wide(as_activation(weights, weights_dtype)).astype(np.float32)
                out[token, head] = rounded @ values[seen, kv_head] / weights.sum()
    return out


def grow_tree(
    rng: np.random.Generator, width: int, depth: int
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """A search with random parents, step by step: the parent of each beam, and the slots on the
    way to it. A step's tokens go to slots that no live beam descends from, in any order.
    """
    paths: list[list[int]] = [[]]
    for _ in range(depth):
        parents = rng.integers(0, len(paths), width).tolist()
        taken = {slot for parent in parents for slot in paths[parent]}
        free = sorted(set(range(len(taken) + width)) - taken)
        chosen = rng.permutation(free[:width]).tolist()
        paths = [[*paths[parent], slot] for parent, slot in zip(parents, chosen, strict=True)]
        yield parents, paths


def visible_words(path: list[int], num_words: int) -> Array:
    """A row of `visible` in which exactly these slots are seen."""
    bits = np.zeros(32 * num_words, bool)
    bits[path] = True
    return np.packbits(bits, bitorder="little").view(np.uint32)


@dataclass(frozen=True)
class Searches:
    """Sequences of one call, some of them searches, and each row's keys as a plain sequence."""

    kv: PagedKv  # NaN in what no row sees, pages out of all bounds where there is nothing
    slots: dict[str, Any]  # the arguments of attention_decode
    chains: PagedKv  # one sequence per row

    def decode(self, q: Array, **options: Any) -> Any:
        kv = self.kv
        return ops.attention_decode(
            q, kv.k_pages, kv.v_pages, kv.page_table, kv.seq_lens, **self.slots, **options
        )

    def oracle(self, q: Array, **options: Any) -> Any:
        kv = self.kv
        return reference.attention_decode(
            q, kv.k_pages, kv.v_pages, kv.page_table, kv.seq_lens, **self.slots, **options
        )

    def rounded(self, dtype: str) -> tuple[Searches, Searches]:
        """With pages of that dtype, and with the same numbers in float32."""
        none = np.zeros((0, 1, 1), np.float32)
        pairs = []
        for kv in (self.kv, self.chains):
            narrow = halves(none, kv, dtype)[1]
            pairs.append((narrow, widened(none, narrow)[1]))
        (kv, wide_kv), (chains, wide_chains) = pairs
        return Searches(kv, self.slots, chains), Searches(wide_kv, self.slots, wide_chains)

    def only(self, seq: int, rows: list[int]) -> Searches:
        """One of the sequences, with these of its rows."""
        one, kv, slots = slice(seq, seq + 1), self.kv, self.slots
        own = [slots["query_starts"][seq] + row for row in rows]
        return Searches(
            PagedKv(kv.k_pages, kv.v_pages, kv.page_table[one], kv.seq_lens[one]),
            {
                "query_starts": np.array([0, len(rows)], np.int32),
                "slot_starts": slots["slot_starts"][one],
                "num_slots": slots["num_slots"][one],
                "visible": slots["visible"][own],
                "slot_positions": slots["slot_positions"][one],
                "positions": slots["positions"][own],
            },
            self.chains,
        )

    def slot_pages(self, seq: int, slot: int) -> tuple[int, int]:
        """Page and offset of a slot."""
        key, page_size = self.slots["slot_starts"][seq] + slot, self.kv.k_pages.shape[2]
        return self.kv.page_table[seq, key // page_size], key % page_size


def searches(
    rng: np.random.Generator, shapes: list[tuple[int, int, int]], **pages: Any
) -> Searches:
    """Of each (prompt length, width, depth) a search; a plain sequence where depth is 0."""
    size = pages.get("page_size", 16)
    trees = [list(grow_tree(rng, width, depth)) for _, width, depth in shapes]
    paths = [tree[-1][1] if tree else [[]] for tree in trees]
    num_slots = [max((slot + 1 for path in own for slot in path), default=0) for own in paths]
    prompts = np.array([prompt for prompt, *_ in shapes], np.int32)
    starts = np.cumsum([0, *map(len, paths)]).astype(np.int32)
    # Slots begin behind a page that is not in use.
    slot_starts = ((-(-prompts // size) + 1) * size).astype(np.int32)
    kv = paged_kv(rng, np.where(num_slots, slot_starts + num_slots, prompts).tolist(), **pages)
    lens = [prompt + len(path) for prompt, own in zip(prompts, paths, strict=True) for path in own]
    chains = paged_kv(rng, lens, **pages)
    num_words = -(-max(num_slots) // 32)
    visible = np.zeros((starts[-1], num_words), np.uint32)
    slot_positions = np.full((len(shapes), 32 * num_words), -(2**31), np.int32)
    for seq, (prompt, table) in enumerate(zip(prompts, kv.page_table, strict=True)):
        slots = slot_starts[seq] + np.arange(num_slots[seq])
        used = set().union(*paths[seq])
        for key in {*range(prompt, slots[-1] + 1 if len(slots) else 0)} - {*slots[[*used]]}:
            kv.k_pages[table[key // size], :, key % size] = np.nan
            kv.v_pages[table[key // size], :, key % size] = np.nan
        if len(slots):
            table[-(-prompt // size)] = -1
        for row, path in enumerate(paths[seq], starts[seq]):
            # Bits beyond the last slot are set too.
            beyond = range(num_slots[seq], 32 * num_words)
            visible[row] = visible_words([*path, *beyond], num_words)
            slot_positions[seq, path] = prompt + np.arange(len(path))
            keys, places = np.array([*range(prompt), *slots[path]]), np.arange(lens[row])
            from_page, to_page = table[keys // size], chains.page_table[row, places // size]
            for source, target in ((kv.k_pages, chains.k_pages), (kv.v_pages, chains.v_pages)):
                target[to_page, :, places % size] = source[from_page, :, keys % size]
    arguments = {
        "query_starts": starts,
        "slot_starts": slot_starts,
        "num_slots": np.array(num_slots, np.int32),
        "visible": visible,
        "slot_positions": slot_positions,
        "positions": np.array(lens, np.int32) - 1,
    }
    return Searches(PagedKv(kv.k_pages, kv.v_pages, kv.page_table, prompts), arguments, chains)
