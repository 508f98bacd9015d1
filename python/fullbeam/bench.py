# SPDX-License-Identifier: Apache-2.0
"""What a machine makes of a model: throughput, latency, and how far that is from its ceilings."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from fullbeam import _core
from fullbeam.engine.engine import Engine
from fullbeam.engine.sequence import Event
from fullbeam.engine.text import Piece
from fullbeam.models import OpenModel
from fullbeam.models.config import Weights
from fullbeam.models.decoder import Decoder
from fullbeam.params import CompletionParams

CONTEXT = 1024


@dataclass(frozen=True)
class Ceilings:
    """What memory usually gives and the processor at best, on all threads together.

    The memory of a shared machine has moments in which it is twice as fast: what a share of it
    means is told by measuring it again and again beside what is compared with it.
    """

    read_bytes: float  # per second, of data that no cache holds
    int8_ops: float  # multiplications and additions per second; 0: not known for this processor

    @classmethod
    def measure(cls, threads: int) -> Ceilings:
        """Measure for half a second."""
        before = _core.num_threads()
        _core.set_num_threads(threads)
        try:
            return cls(read_bytes_per_second(threads), _core.int8_ops_per_second())
        finally:
            _core.set_num_threads(before)

    @classmethod
    def joined(cls, found: Sequence[Ceilings]) -> Ceilings:
        """Join several measurements: the median of memory, the best of the processor."""
        return cls(
            statistics.median(each.read_bytes for each in found),
            max(each.int8_ops for each in found),
        )


def read_bytes_per_second(threads: int) -> float:
    """Return the rate at which all threads together read 512 MB that no cache holds: a median."""
    find = ctypes.CDLL(None).memchr
    find.argtypes, find.restype = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], ctypes.c_void_p
    arrays = [np.ones(2**29 // threads, np.uint8) for _ in range(threads)]
    times = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(9):
            begin = time.perf_counter()
            list(pool.map(lambda a: find(a.ctypes.data, 0, a.nbytes), arrays))
            times.append(time.perf_counter() - begin)
    return sum(array.nbytes for array in arrays) / statistics.median(times)


@dataclass(frozen=True)
class Load:
    """What tokens cost: bytes that a step reads, and products that a token takes."""

    step_bytes: int
    spared_bytes: int  # of them, where one greedy row takes the largest logit
    layer_products: int
    head_products: int

    def read_bytes(self, num_rows: int) -> int:
        """Bytes that a step of greedy rows reads at least."""
        return self.step_bytes - (self.spared_bytes if num_rows == 1 else 0)

    @classmethod
    def of(cls, weights: Weights) -> Load:
        """Count the matrices of a model."""
        matrices = [
            linear.weight
            for layer in weights.layers
            for linear in (layer.qkv, layer.attention_out, layer.up, layer.down)
        ]
        head = weights.head
        return cls(
            sum(matrix.num_bytes for matrix in matrices) + head.num_bytes,
            head.low_bytes,
            sum(matrix.shape[0] * matrix.shape[1] for matrix in matrices),
            head.shape[0] * head.shape[1],
        )


@dataclass(frozen=True)
class Task:
    """Greedy requests at once, or searches."""

    num_seqs: int
    num_prompt: int  # tokens of each prompt
    max_tokens: int
    num_beams: int = 1
    num_groups: int = 1
    num_choices: int = 1  # of each prompt, which is computed once

    @property
    def params(self) -> CompletionParams:
        """What `Engine.submit` takes for each request."""
        if self.num_beams > 1:
            return CompletionParams(
                max_tokens=self.max_tokens,
                ignore_eos=True,
                beam_size=self.num_beams // self.num_groups,
                diversity_groups=self.num_groups,
            )
        return CompletionParams(
            max_tokens=self.max_tokens, ignore_eos=True, temperature=0, n=self.num_choices
        )

    @property
    def num_rows(self) -> int:
        """Rows of a step."""
        return self.num_seqs * self.num_beams * self.num_choices

    def values(self, first_s: float, total_s: float, tokens_between: int) -> dict[str, float]:
        """Return what times come to, in the units of the names."""
        found = {"prompt tok/s": self.num_seqs * self.num_prompt / first_s}
        if self.max_tokens > 1:
            found["ms a step"] = 1e3 * (total_s - first_s) / (self.max_tokens - 1)
            if self.num_beams == 1:
                found["tok/s"] = tokens_between / (total_s - first_s)
        return found | {"first token ms": 1e3 * first_s, "total s": total_s}

    def shares(self, values: dict[str, float], load: Load, ceilings: Ceilings) -> dict[str, float]:
        """Return the percentages of the ceilings that the weights' bytes and products come to."""
        products = load.layer_products * values["prompt tok/s"]
        found = {}
        if "ms a step" in values:
            steps = 1e3 / values["ms a step"]
            found["%read"] = 100 * steps * load.read_bytes(self.num_rows) / ceilings.read_bytes
            products = steps * self.num_rows * (load.layer_products + load.head_products)
        if ceilings.int8_ops:
            found["%int8"] = 100 * 2 * products / ceilings.int8_ops
        return found


TASKS = {
    "prompt": Task(1, 512, 1),
    "decode, 1 row": Task(1, 64, 33),
    "decode, 8 rows": Task(8, 64, 33),
    "decode, 16 rows": Task(16, 64, 33),
    "beam search, width 8": Task(1, 200, 32, num_beams=8),
}


@dataclass
class Timing:
    """Requests that were run together; the clock starts before the first is submitted."""

    first_s: float  # until every request had its first token
    total_s: float
    tokens_between: int  # generated by all of them between the two
    token_ids: list[list[int]]  # [num_requests], those of its first choice


def run(engine: Engine, prompts: Sequence[Sequence[int]], params: CompletionParams) -> Timing:
    """Run prompts at once, in this thread, on an idle engine.

    Raises
    ------
    ValueError, RuntimeError
        As `Engine.submit`, or what a request failed with.
    """
    events: list[list[Event]] = [[] for _ in prompts]
    first_s, at_first = 0.0, 0
    begin = time.perf_counter()
    requests = [
        engine.submit(ids, params, on_event=events[idx].append, prompt_index=idx)
        for idx, ids in enumerate(prompts)
    ]
    while not all(request.closed for request in requests):
        engine.step()
        if not first_s and all(request.first_token_at is not None for request in requests):
            first_s = time.perf_counter() - begin
            at_first = engine.stats().num_generated_tokens
    total_s = time.perf_counter() - begin
    token_ids = []
    for found in events:
        for event in found:
            if isinstance(event, Exception):
                raise event
        pieces = [event for event in found if isinstance(event, Piece)]
        token_ids.append(min(pieces, key=lambda piece: piece.index).token_ids)
    tokens_between = engine.stats().num_generated_tokens - at_first
    return Timing(first_s, total_s, tokens_between, token_ids)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median and bounds."""
    return {"median": float(np.median(values)), "min": min(values), "max": max(values)}


class Bench:
    """A model with an engine of its own, to be used by nobody else, and without drafts.

    Raises ValueError for a model whose context is too short.
    """

    def __init__(self, opened: OpenModel) -> None:
        context = min(CONTEXT, opened.decoder.config.context_len)
        longest = max(task.num_prompt + task.max_tokens for task in TASKS.values())
        if longest > context:
            raise ValueError(
                f"bench: the model's context must be at least {longest}, got {context}"
            )
        self._decoder: Decoder = opened.decoder
        self.engine = Engine(opened.decoder, opened.tokenizer, context=context, draft_tokens=0)

    def measure(
        self, *, rounds: int = 3, progress: Callable[[float, str], None] | None = None
    ) -> dict[str, Any]:
        """Take every task once to warm up, then `rounds` times.

        Returns
        -------
        dict
            `read_GB/s` and `int8_GOP/s`, the ceilings, measured before each round, and `rows`:
            `task`, and `median`, `min` and `max` of what its times come to. `%read` and `%int8` are
            the shares of the ceilings that the weights' bytes and products come to, at the medians.
        """
        report = progress if progress is not None else (lambda share, what: None)
        threads, load = self._decoder.device.threads, Load.of(self._decoder.weights)
        found: list[Ceilings] = []
        samples: dict[str, list[dict[str, float]]] = {name: [] for name in TASKS}
        turns = [(idx, name) for idx in range(rounds + 1) for name in TASKS]
        for place, (idx, name) in enumerate(turns):
            report(place / len(turns), name)
            if place % len(TASKS) == 0:
                found.append(Ceilings.measure(threads))
            task = TASKS[name]
            timing = run(self.engine, self._prompts(idx, task), task.params)
            if idx:
                values = task.values(timing.first_s, timing.total_s, timing.tokens_between)
                samples[name].append(values)
        ceilings = Ceilings.joined(found)
        rows = []
        for name, task in TASKS.items():
            spreads = {key: spread([s[key] for s in samples[name]]) for key in samples[name][0]}
            medians = {key: value["median"] for key, value in spreads.items()}
            rows.append({"task": name} | spreads | task.shares(medians, load, ceilings))
        head = {"read_GB/s": ceilings.read_bytes / 1e9, "int8_GOP/s": ceilings.int8_ops / 1e9}
        return head | {"rows": rows}

    def _prompts(self, idx: int, task: Task) -> list[list[int]]:
        """Return prompts that no other round and task has begun with."""
        vocab_size = self._decoder.config.vocab_size
        rng = np.random.default_rng([idx, task.num_seqs, task.num_prompt])
        ids = rng.integers(vocab_size // 8, vocab_size, (task.num_seqs, task.num_prompt))
        found: list[list[int]] = ids.tolist()
        return found
