# SPDX-License-Identifier: Apache-2.0
"""Requests of every kind, and engines over tiny models to put them to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fullbeam.engine.engine import Engine
from fullbeam.engine.sequence import Event
from fullbeam.engine.text import Piece
from fullbeam.models import OpenModel
from fullbeam.params import CompletionParams
from tiny_models import Tiny

CONTEXT = 128
PAGE_SIZE = 8

TINY = {
    "llama": (Tiny(hidden_size=256, num_layers=2, head_dim=64, ffn_size=512), ("Q4_K", "Q6_K")),
    "gemma3": (
        Tiny(arch="gemma3", hidden_size=256, num_layers=6, num_kv_heads=1, ffn_size=256, window=16),
        ("Q5_0", "Q8_0", "Q4_0", "F16"),
    ),
    "qwen2": (
        Tiny(arch="qwen2", hidden_size=256, num_layers=2, head_dim=64, ffn_size=512, is_tied=False),
        ("Q4_1", "Q5_1", "Q5_K", "BF16"),
    ),
}

Request = tuple[list[int], CompletionParams]


def requests(seed: int = 11) -> list[Request]:
    """Eleven different ones, greedy, sampled and searched, of 1 to 70 prompt tokens."""
    rng = np.random.default_rng(seed)
    shapes: list[tuple[int, dict[str, Any]]] = [
        (1, {"temperature": 0.0}),
        (9, {"temperature": 0.8, "seed": 1}),
        (16, {"temperature": 1.0, "top_p": 0.9, "seed": 2, "n": 2}),
        (33, {"temperature": 0.0}),
        (64, {"temperature": 1.3, "top_k": 20, "seed": 3}),
        (70, {"temperature": 0.0, "echo": True}),
        (40, {"temperature": 1.0, "min_p": 0.05, "seed": 4}),
        (15, {"temperature": 1.0, "seed": 5}),
        (12, {"beam_size": 3, "n": 3}),
        (37, {"beam_size": 2, "diversity_groups": 2, "diversity_strength": 0.5, "n": 4}),
        (20, {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "seed": 6, "best_of": 3}),
    ]
    return [
        (
            rng.integers(0, 256, length).tolist(),
            CompletionParams(max_tokens=20, logprobs=4, ignore_eos=True, **fields),
        )
        for length, fields in shapes
    ]


def make_engine(model: OpenModel, **options: Any) -> Engine:
    options = {"context": CONTEXT, "max_rows": 16, "page_size": PAGE_SIZE} | options
    return Engine(model.decoder, model.tokenizer, **options)


def complete(engine: Engine, batch: Sequence[Request]) -> list[list[Piece]]:
    """All requests together; the choices of each in order."""
    events: list[list[Event]] = [[] for _ in batch]
    for (prompt, params), own in zip(batch, events, strict=True):
        engine.submit(prompt, params, on_event=own.append)
    while engine.step():
        pass
    engine.check()
    return [sorted(_pieces(own), key=lambda piece: piece.index) for own in events]


def _pieces(events: list[Event]) -> list[Piece]:
    for event in events:
        if isinstance(event, Exception):
            raise event
    return [event for event in events if isinstance(event, Piece)]


def alone(model: OpenModel, batch: Sequence[Request]) -> list[list[Piece]]:
    """Each request in an engine of its own, its prompt computed at once."""
    return [complete(make_engine(model), [request])[0] for request in batch]


def repeating_requests(seed: int = 12) -> list[Request]:
    """Texts that say their prompts again, as few tokens are left to them; a search beside them."""
    rng = np.random.default_rng(seed)
    stems = [rng.integers(0, 256, length).tolist() for length in (3, 5, 8)]
    shapes: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.7, "seed": 1, "n": 2},
        {"temperature": 0.0, "frequency_penalty": 0.2, "repetition_penalty": 1.05},
        {"temperature": 0.9, "seed": 2, "min_tokens": 30, "top_p": 0.9},
        {"beam_size": 3, "n": 3},
    ]
    batch = []
    for idx, fields in enumerate(shapes):
        stem = stems[idx % 3]
        wanted: dict[str, Any] = {"logit_bias": dict.fromkeys(stem, 40.0)} if idx % 2 else {}
        if not wanted:
            wanted = {"allowed_token_ids": stem}
        params = CompletionParams(max_tokens=40, logprobs=4, ignore_eos=True, **wanted, **fields)
        batch.append((stem * (40 // len(stem)), params))
    return batch
