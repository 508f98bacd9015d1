# SPDX-License-Identifier: Apache-2.0
"""Row by row stand-ins for the two ops that the engine calls, where the native ones are absent."""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

import numpy as np


def _draw(seed: int, counter: Any) -> float:
    words = [seed & 0xFFFFFFFF, seed >> 32, *map(int, counter)]
    return float(np.random.Generator(np.random.PCG64(words)).random())


def sample(
    logits: Any, *, temperature: Any, top_k: Any, top_p: Any, min_p: Any, seeds: Any, counters: Any
) -> Any:
    out = np.empty(len(logits), np.int32)
    for idx, row in enumerate(logits):
        if not np.isfinite(row).any():
            out[idx] = -1
        elif temperature[idx] == 0:
            out[idx] = np.argmax(row)
        else:
            probs = np.exp((row - row.max()).astype(np.float64) / temperature[idx])
            probs[probs < min_p[idx] * probs.max()] = 0
            order = np.argsort(-probs, kind="stable")
            if top_k[idx]:
                probs[order[top_k[idx] :]] = 0
            probs /= probs.sum()
            before = np.cumsum(probs[order]) - probs[order]
            before[0] = -1  # the top token stays
            probs[order[before >= top_p[idx]]] = 0
            edges = np.cumsum(probs / probs.sum())
            out[idx] = np.searchsorted(edges, _draw(int(seeds[idx]), counters[idx]), side="right")
    return out


def logprobs(logits: Any, token_ids: Any, *, num_top: int = 0) -> Any:
    wide = logits.astype(np.float64)
    top = wide.max(axis=1, keepdims=True)
    values = (wide - top - np.log(np.exp(wide - top).sum(axis=1, keepdims=True))).astype(np.float32)
    rows = np.arange(len(logits))
    chosen = values[rows, token_ids]
    order = np.argsort(-values, axis=1, kind="stable")[:, :num_top].astype(np.int32)
    ranks = (values > chosen[:, None]).sum(axis=1).astype(np.int32) + 1
    return chosen, ranks, order, np.take_along_axis(values, order, axis=1)


def install(monkeypatch: Any) -> None:
    """Put the stand-ins in place of `fullbeam.ops` where that cannot be imported."""
    try:
        if importlib.util.find_spec("fullbeam.ops") is not None:
            importlib.import_module("fullbeam.ops")
            return
    except ImportError:
        pass
    import fullbeam

    module = types.ModuleType("fullbeam.ops")
    module.sample, module.logprobs = sample, logprobs  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fullbeam.ops", module)
    monkeypatch.setattr(fullbeam, "ops", module, raising=False)
