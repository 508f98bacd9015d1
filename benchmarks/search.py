# SPDX-License-Identifier: Apache-2.0
"""What search costs beside drawing, on the same model, turn by turn."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from fullbeam import CompletionParams, Engine, _core
from fullbeam.models import open_model
from fullbeam.models.catalog import resolve

NUM_TOKENS = 32
PROMPT_TOKENS = 200
CODE = Path(argparse.__file__).read_text()


class Bench:
    """One engine; every measurement is the median time of a decode step of one request."""

    def __init__(self, model: str, threads: int) -> None:
        opened = open_model(resolve(model), threads=threads)
        self.tokenizer = opened.tokenizer
        self.ids = opened.tokenizer.encode(CODE)
        self.bytes_per_token = opened.decoder.kv_bytes_per_token()
        self.engine = Engine(
            opened.decoder, opened.tokenizer, context=4096, max_rows=16, draft_tokens=0
        )
        self.page_size = 16

    def steps(self, first: int, num_prompt: int, **fields: Any) -> tuple[list[float], int]:
        """Milliseconds of each step after the prompt, and the most pages in use."""
        params = CompletionParams(max_tokens=NUM_TOKENS, ignore_eos=True, **fields)
        engine = self.engine
        request = engine.submit(
            self.ids[first : first + num_prompt], params, on_event=lambda event: None
        )
        times, pages = [], 0
        while not request.closed:
            before = engine.stats().num_generated_tokens
            begin = time.perf_counter()
            engine.step()
            elapsed = time.perf_counter() - begin
            stats = engine.stats()
            pages = max(pages, stats.num_used_pages)
            if before and stats.num_generated_tokens > before and num_prompt > 0:
                times.append(elapsed * 1e3)
        return times[1:], pages  # the first one computes the prompt

    def first_token(self, ids: list[int]) -> float:
        """Milliseconds until a request with one new token is done."""
        params = CompletionParams(max_tokens=1, temperature=0, ignore_eos=True)
        begin = time.perf_counter()
        self.engine.generate(ids, params)
        return (time.perf_counter() - begin) * 1e3


CASES: dict[str, dict[str, Any]] = {
    "1 drawn row": {"n": 1, "seed": 1},
    "8 drawn rows": {"n": 8, "seed": 1},
    "beam search, width 8": {"beam_size": 8},
    "4 groups of 2": {"beam_size": 2, "diversity_groups": 4, "diversity_strength": 0.5},
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks search", description=__doc__)
    parser.add_argument("model", help="GGUF file or catalogue name")
    parser.add_argument("--threads", type=int, default=_core.num_physical_cores())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the rows as JSON lines")
    args = parser.parse_args(argv)
    bench = Bench(args.model, args.threads)
    rounds: list[dict[str, float]] = []
    for idx in range(args.rounds):
        found: dict[str, float] = {}
        for name, fields in CASES.items():
            times, _ = bench.steps(idx * PROMPT_TOKENS, PROMPT_TOKENS, **fields)
            found[name] = float(np.median(times))
        for name in ("1 drawn row", "beam search, width 8"):
            _, pages = bench.steps(5000 + idx * 16, 1000, **CASES[name])
            found[f"KV of {name}, 1000-token prompt, MiB"] = (
                pages * bench.page_size * bench.bytes_per_token / 2**20
            )
        ids = bench.ids[2000 + idx * 300 : 2000 + idx * 300 + 250]
        bench.first_token(ids[:-1])
        found["next keystroke"] = bench.first_token(ids)
        rounds.append(found)
        sys.stderr.write(f"round {idx + 1} of {args.rounds}\n")
    rows = [row(name, rounds) for name in rounds[0]]
    ratios: list[tuple[str, Callable[[dict[str, float]], float]]] = [
        ("width 8 / 8 drawn rows", lambda r: r["beam search, width 8"] / r["8 drawn rows"]),
        ("4 groups of 2 / width 8", lambda r: r["4 groups of 2"] / r["beam search, width 8"]),
        (
            "KV of width 8 / one row",
            lambda r: (
                r["KV of beam search, width 8, 1000-token prompt, MiB"]
                / r["KV of 1 drawn row, 1000-token prompt, MiB"]
            ),
        ),
        ("next keystroke / step of a row", lambda r: r["next keystroke"] / r["1 drawn row"]),
    ]
    rows += [row(name, [{name: ratio(found)} for found in rounds]) for name, ratio in ratios]
    head = harness.environment(args.threads) | {
        "model": Path(args.model).name,
        "rounds": args.rounds,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NUM_TOKENS,
        "unit": "median milliseconds of a decode step, unless named",
    }
    sys.stdout.write(json.dumps(head) + "\n")
    sys.stdout.write(harness.table(rows, ["what", "median", "low", "high"]) + "\n")
    if args.json:
        harness.write(args.json, head, rows)
    return 0


def row(name: str, rounds: list[dict[str, float]]) -> dict[str, Any]:
    values = [found[name] for found in rounds]
    return {
        "what": name,
        "median": float(np.median(values)),
        "low": min(values),
        "high": max(values),
    }
