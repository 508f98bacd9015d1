# SPDX-License-Identifier: Apache-2.0
"""Where a step's time goes: the ops of a recorded step, run and timed one by one.

Times are microseconds of a whole step, all layers together; `calls` is how many they are. `%peak`
is of the measured ceiling that the op is nearer to: memory reads or int8 products. `rest` is what
is left of the step: filling buffers, Python, and the timing itself.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from fullbeam import _core, ops
from fullbeam.bench import Ceilings
from fullbeam.engine.batch import Batch
from fullbeam.models import decoder as decoder_module
from fullbeam.models import open_model
from fullbeam.models.catalog import resolve
from fullbeam.models.decoder import Decoder

STEPS = {
    "decode-1": (1, 1, 64),
    "decode-8": (8, 1, 64),
    "decode-16": (16, 1, 64),
    "prompt-512": (1, 512, 0),
}
PAGE_SIZE = 16
CONTEXT = 1024
COLUMNS = ["step", "op", "calls", "us", "%", "GB/s", "GOP/s", "%peak", "bound"]


class Recorder:
    """`fullbeam.ops` for a decoder under recording: every call is a program of its own."""

    def __init__(self, calls: list[tuple[str, Any, int, int]], names: dict[int, str]) -> None:
        self._calls = calls
        self._names = names  # of weights, by their ids

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(ops, name)

        def call(*args: Any, **options: Any) -> Any:
            _core.start_recording()
            try:
                result = function(*args, **options)
            finally:
                program = _core.stop_recording()
            title, num_bytes, num_ops = name, 0, 0
            if name == "linear":
                x, weight = args
                title = f"linear {self._names[id(weight)]}"
                num_bytes = weight.num_bytes + 4 * len(x) * sum(weight.shape)
                if options.get("largest_only") and len(x) == 1:
                    num_bytes -= weight.low_bytes
                num_ops = 2 * len(x) * weight.shape[0] * weight.shape[1]
            self._calls.append((title, program, num_bytes, num_ops))
            return result

        return call


class TimedDecoder(Decoder):
    """A decoder that adds up the time of each op."""

    def __init__(self, other: Decoder) -> None:
        super().__init__(other.config, other.weights, device=other.device)
        self.spent: dict[str, list[float]] = {}  # calls, seconds, bytes, operations
        self._calls: dict[Any, list[Any]] = {}  # of each shape
        self._names = {id(other.weights.head): "head"}
        for layer in other.weights.layers:
            for name in ("qkv", "attention_out", "up", "down"):
                self._names[id(getattr(layer, name).weight)] = name

    def _run(self, shape: Any, record: Callable[[], None], stop: _core.Stop | None) -> bool:
        calls = self._calls.get(shape)
        if calls is None:
            calls = self._calls[shape] = []
            module: Any = decoder_module
            module.ops = Recorder(calls, self._names)
            try:
                record()
            finally:
                module.ops = ops
        for title, program, num_bytes, num_ops in calls:
            begin = time.perf_counter()
            program.run(stop)
            spent = self.spent.setdefault(title, [0, 0.0, 0, 0])
            for idx, value in enumerate((1, time.perf_counter() - begin, num_bytes, num_ops)):
                spent[idx] += value
        return True


def add_shares(rows: list[dict[str, Any]], best: Ceilings) -> None:
    """Say of each product how much it is of the ceiling that it is nearer to."""
    for row in rows:
        if row["GOP/s"] == "":
            continue
        shares = {"GB/s": 1e9 * row["GB/s"] / best.read_bytes}
        if best.int8_ops:
            shares["GOP/s"] = 1e9 * row["GOP/s"] / best.int8_ops
        bound = max(shares, key=lambda key: shares[key])
        row |= {"%peak": 100 * shares[bound], "bound": bound}


def batch_of(ids: Any, start: int) -> Batch:
    """Lay out tokens [num_seqs, count] that begin at position `start` of each sequence."""
    num_seqs, count = ids.shape
    max_pages = CONTEXT // PAGE_SIZE
    positions = np.tile(np.arange(start, start + count), num_seqs)
    seqs = np.repeat(np.arange(num_seqs), count)
    query_starts = np.arange(num_seqs + 1, dtype=np.int32) * np.int32(count)
    return Batch(
        token_ids=ids.astype(np.int32).reshape(-1),
        positions=positions.astype(np.int32),
        slots=(seqs * CONTEXT + positions).astype(np.int64),
        query_starts=query_starts,
        num_decode=num_seqs if count == 1 else 0,
        page_table=np.arange(num_seqs * max_pages, dtype=np.int32).reshape(num_seqs, max_pages),
        seq_lens=np.full(num_seqs, start + count, np.int32),
        logit_rows=query_starts[1:] - np.int32(1),
        largest_only=True,
    )


def measure(
    decoder: TimedDecoder, name: str, repeats: int, text: list[int]
) -> list[dict[str, Any]]:
    """Return a row for each op of a step, the slowest first; the steps are of a text's tokens."""
    num_seqs, count, start = STEPS[name]
    kv = decoder.allocate_kv(num_seqs * CONTEXT // PAGE_SIZE, PAGE_SIZE)

    def ids(place: int, length: int) -> Any:
        return np.array([text[97 * seq + place :][:length] for seq in range(num_seqs)])

    if start:
        decoder.forward(batch_of(ids(0, start), 0), kv)
    rounds: list[dict[str, list[float]]] = []
    totals = []
    for idx in range(repeats + 2):
        place = start + idx if count == 1 else 0
        batch, decoder.spent = batch_of(ids(place, count), place), {}
        begin = time.perf_counter()
        decoder.forward(batch, kv)
        if idx >= 2:  # the first ones record and warm up
            totals.append(time.perf_counter() - begin)
            rounds.append(decoder.spent)
    total = float(np.median(totals))
    rows = []
    for title, (calls, _, num_bytes, num_ops) in rounds[0].items():
        seconds = float(np.median([spent[title][1] for spent in rounds]))
        row = {"step": name, "op": title, "calls": calls, "us": 1e6 * seconds}
        row |= {"%": 100 * seconds / total, "GB/s": "", "GOP/s": "", "%peak": "", "bound": ""}
        if num_ops:
            row |= {"GB/s": num_bytes / seconds / 1e9, "GOP/s": num_ops / seconds / 1e9}
        rows.append(row)
    rows.sort(key=lambda row: -float(row["us"]))
    known = sum(float(row["us"]) for row in rows)
    blank = dict.fromkeys(COLUMNS, "")
    rest = {"step": name, "op": "rest", "us": 1e6 * total - known}
    rows.append(blank | rest | {"%": 100 - 100e-6 * known / total})
    return [*rows, blank | {"step": name, "op": "whole step", "us": 1e6 * total, "%": 100.0}]


def main(argv: list[str]) -> int:
    """Run `python -m benchmarks steps`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks steps", description=__doc__)
    parser.add_argument("model", help="GGUF file or catalogue name")
    parser.add_argument("--only", default=",".join(STEPS), help="some of %(default)s")
    parser.add_argument("--repeats", type=int, default=20, help="steps; default: 20")
    parser.add_argument("--threads", type=int, default=_core.num_physical_cores())
    parser.add_argument("--json", type=Path, help="write the rows as JSON lines")
    args = parser.parse_args(argv)
    names = args.only.split(",")
    if not set(names) <= set(STEPS):
        parser.error(f"--only must be some of {', '.join(STEPS)}, got {args.only}")
    if args.repeats < 1 or args.threads < 1:
        parser.error("--repeats and --threads must be at least 1")
    opened = open_model(resolve(args.model), threads=args.threads)
    decoder = TimedDecoder(opened.decoder)
    text = opened.tokenizer.encode(inspect.getsource(argparse))
    rows: list[dict[str, Any]] = []
    found: list[Ceilings] = []
    for name in names:
        found.append(Ceilings.measure(args.threads))
        rows += measure(decoder, name, args.repeats, text)
    best = Ceilings.joined([*found, Ceilings.measure(args.threads)])
    add_shares(rows, best)
    head = harness.environment(args.threads) | {
        "model": Path(args.model).name,
        "read_GB/s": best.read_bytes / 1e9,
        "int8_GOP/s": best.int8_ops / 1e9,
    }
    for name, value in head.items():
        text = f"{value:.4g}" if isinstance(value, float) else value
        sys.stdout.write(f"{name}: {text}\n")
    sys.stdout.write("\n" + harness.table(rows, COLUMNS) + "\n")
    if args.json:
        harness.write(args.json, head, rows)
    return 0
