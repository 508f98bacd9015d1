# SPDX-License-Identifier: Apache-2.0
"""Tokens per second with and without drafts, on the same model, turn by turn.

Edits repeat a function of the standard library with a name changed; free texts are drawn, so that
little in them repeats. Every answer has to be the same with drafts and without.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import itertools
import re
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from fullbeam import CompletionParams, Engine, _core
from fullbeam.engine.drafts import DEFAULT_DRAFT_TOKENS
from fullbeam.engine.sequence import Request
from fullbeam.models import open_model
from fullbeam.models.catalog import resolve

EDITS = [  # module, function, name to change, new name
    ("textwrap", "TextWrapper._wrap_chunks", "cur_line", "line"),
    ("shlex", "split", "lex", "lexer"),
    ("difflib", "get_close_matches", "cutoff", "threshold"),
    ("fnmatch", "filter", "pat", "pattern"),
    ("statistics", "quantiles", "method", "kind"),
    ("copy", "_deepcopy_dict", "memo", "seen"),
]
FREE = [
    "The lighthouse keeper counted the ships again, and",
    "In the spring of that year the river rose higher than anyone could remember, and so",
    "My grandmother used to say that",
    "import socket\n\nclass Server:\n",
    "// Parses a date from a string\nfunction parseDate(",
    "class LinkedList:\n    def __init__(self):\n",
]
DRAWN: dict[str, Any] = {"temperature": 1.0, "seed": 5}


def edit_prompt(module: str, name: str, old: str, new: str) -> str:
    """A function, what to do with it, and the first line of the result."""
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    source = textwrap.dedent(inspect.getsource(found))
    first = re.sub(rf"\b{old}\b", new, source.split("\n", 1)[0])
    task = f"# The same function, with `{old}` renamed to `{new}`."
    return f"# {module}.py\n\n{source}\n\n{task}\n\n{first}\n"


def cases() -> dict[str, tuple[list[list[str]], int, dict[str, Any]]]:
    """Batches of prompts, new tokens of each prompt, parameters."""
    edits = [edit_prompt(*edit) for edit in EDITS]
    return {
        "edit, 1 row": ([[text] for text in edits], 96, {"temperature": 0}),
        "edit, drawn, 1 row": ([[text] for text in edits[:3]], 64, {"temperature": 0.5, "seed": 5}),
        "free text, drawn, 1 row": ([[text] for text in FREE], 64, DRAWN),
        "free text, drawn, 16 rows": ([(FREE * 6)[:16]], 48, DRAWN),
        "free text, drawn, 32 rows": ([(FREE * 6)[:32]], 48, DRAWN),
        "edits, 8 rows": ([(edits * 2)[:8]], 48, {"temperature": 0}),
        "edits, 32 rows": ([(edits * 6)[:32]], 48, {"temperature": 0}),
    }


class Bench:
    """One engine, whose drafts are switched on and off."""

    def __init__(self, model: str, threads: int, draft_tokens: int) -> None:
        opened = open_model(resolve(model), threads=threads)
        self.engine = Engine(opened.decoder, opened.tokenizer, context=2048, max_rows=32)
        self.draft_tokens = {"on": draft_tokens, "off": 0}

    def switch(self, name: str) -> None:
        self.engine._scheduler.draft_tokens = self.draft_tokens[name]

    def start(
        self, prompts: list[str], num_tokens: int, **fields: Any
    ) -> tuple[list[Request], list[list[int]]]:
        """Step until every prompt has a token; the requests, and where their tokens will be."""
        engine = self.engine
        params = CompletionParams(max_tokens=num_tokens, ignore_eos=True, **fields)
        answers: list[list[int]] = [[] for _ in prompts]
        requests = []
        for idx, prompt in enumerate(prompts):
            take = answers[idx].extend
            requests.append(
                engine.submit(
                    prompt,
                    params,
                    prompt_index=idx,
                    on_event=lambda event, take=take: take(getattr(event, "token_ids", ())),
                )
            )
        while not all(request.num_generated for request in requests):
            engine.step()
        return requests, answers

    def run(
        self, name: str, prompts: list[str], num_tokens: int, **fields: Any
    ) -> tuple[float, list[list[int]]]:
        """Seconds from the step after the last prompt's to the end, and the tokens."""
        self.switch(name)
        requests, answers = self.start(prompts, num_tokens, **fields)
        begin = time.perf_counter()
        while not all(request.closed for request in requests):
            self.engine.step()
        return time.perf_counter() - begin, answers

    def take_turns(self, prompts: list[str], num_tokens: int, **fields: Any) -> dict[str, float]:
        """Tokens per second while all rows run, switched every other step: what else the machine
        does meets both."""
        requests, _ = self.start(prompts, num_tokens, **fields)
        tokens, seconds = {"on": 0, "off": 0}, {"on": 0.0, "off": 0.0}
        names = itertools.cycle(["on", "on", "off", "off"])
        while not any(request.closed for request in requests):
            name = next(names)
            self.switch(name)
            before = self.engine.stats().num_generated_tokens
            begin = time.perf_counter()
            self.engine.step()
            seconds[name] += time.perf_counter() - begin
            tokens[name] += self.engine.stats().num_generated_tokens - before
        while not all(request.closed for request in requests):
            self.engine.step()
        return {name: tokens[name] / seconds[name] for name in tokens}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks drafts", description=__doc__)
    parser.add_argument("model", help="GGUF file or catalogue name")
    parser.add_argument("--threads", type=int, default=_core.num_physical_cores())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--draft-tokens", type=int, default=DEFAULT_DRAFT_TOKENS)
    parser.add_argument("--only", help="cases whose names contain this")
    parser.add_argument("--json", type=Path, help="write the rows as JSON lines")
    args = parser.parse_args(argv)
    bench = Bench(args.model, args.threads, args.draft_tokens)
    rows = []
    for case, (batches, num_tokens, fields) in cases().items():
        if args.only and args.only not in case:
            continue
        found: dict[str, list[float]] = {"on": [], "off": []}
        stats = bench.engine.stats()
        for idx in range(args.rounds + 1):
            if idx and len(batches[0]) > 1:
                for name, rate in bench.take_turns(batches[0], num_tokens, **fields).items():
                    found[name].append(rate)
                continue
            seconds = dict.fromkeys(found, 0.0)
            for prompts in batches:
                answers = {}
                for name in ("on", "off") if idx % 2 else ("off", "on"):
                    elapsed, answers[name] = bench.run(name, prompts, num_tokens, **fields)
                    seconds[name] += elapsed
                assert answers["on"] == answers["off"], "drafts changed an answer"
            if idx:  # the first round warms up, and checks
                for name, elapsed in seconds.items():
                    found[name].append(sum(map(len, batches)) * (num_tokens - 1) / elapsed)
        now = bench.engine.stats()
        num_drafted = now.num_drafted_tokens - stats.num_drafted_tokens
        num_accepted = now.num_accepted_tokens - stats.num_accepted_tokens
        ratios = [on / off for on, off in zip(found["on"], found["off"], strict=True)]
        rows.append(
            {
                "case": case,
                "tokens/s": float(np.median(found["on"])),
                "without": float(np.median(found["off"])),
                "ratio": float(np.median(ratios)),
                "low": min(ratios),
                "high": max(ratios),
                "drafted": num_drafted,
                "accepted": num_accepted,
            }
        )
        sys.stderr.write(f"{case}: {rows[-1]['ratio']:.2f}\n")
    head = harness.environment(args.threads) | {
        "model": Path(args.model).name,
        "rounds": args.rounds,
        "draft_tokens": args.draft_tokens,
        "python": sys.version.split()[0],
    }
    columns = ["case", "tokens/s", "without", "ratio", "low", "high", "drafted", "accepted"]
    sys.stdout.write(f"{head}\n{harness.table(rows, columns)}\n")
    if args.json:
        harness.write(args.json, head, rows)
    return 0
