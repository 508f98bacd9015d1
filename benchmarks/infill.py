# SPDX-License-Identifier: Apache-2.0
"""How often a removed line of real code is restored, with and without the text after it."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import random
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import harness
from fullbeam import _core, load

MODULES = [
    "argparse",
    "bisect",
    "calendar",
    "collections",
    "configparser",
    "contextlib",
    "copy",
    "csv",
    "dataclasses",
    "difflib",
    "fnmatch",
    "fractions",
    "functools",
    "gzip",
    "heapq",
    "inspect",
    "ipaddress",
    "locale",
    "logging",
    "mailbox",
    "netrc",
    "numbers",
    "optparse",
    "pathlib",
    "pprint",
    "queue",
    "random",
    "sched",
    "shelve",
    "shlex",
    "shutil",
    "socketserver",
    "statistics",
    "string",
    "subprocess",
    "tarfile",
    "tempfile",
    "textwrap",
    "threading",
    "timeit",
    "tokenize",
    "traceback",
    "types",
    "typing",
    "unittest.case",
    "urllib.parse",
    "uuid",
    "wave",
    "weakref",
    "zipfile",
]
BEFORE, AFTER = 1200, 500  # characters
LINES_PER_MODULE = 3


def gaps() -> Iterator[tuple[str, str, str]]:
    """Text before, line, text after: statements in functions, some from each module."""
    for module in MODULES:
        spec = importlib.util.find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        text = Path(spec.origin).read_text()
        lines = text.splitlines(keepends=True)
        numbers = [
            statement.lineno - 1
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.FunctionDef)
            for statement in node.body[1:]
            if statement.lineno == statement.end_lineno
        ]
        numbers = [number for number in numbers if len(lines[number].strip()) >= 12]
        draw = random.Random(module)
        for at in draw.sample(numbers, min(LINES_PER_MODULE, len(numbers))):
            before, after = "".join(lines[:at])[-BEFORE:], "".join(lines[at + 1 :])[:AFTER]
            whole_before = before[before.find("\n") + 1 :]
            yield whole_before, lines[at].strip(), "\n" + after[: after.rfind("\n") + 1]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks infill", description=__doc__)
    parser.add_argument("model", help="GGUF file or catalogue name of a model with infill tokens")
    parser.add_argument("--threads", type=int, default=_core.num_physical_cores())
    parser.add_argument("--json", type=Path, help="write the rows as JSON lines")
    args = parser.parse_args(argv)
    cases = list(gaps())
    found: dict[str, list[str]] = {}
    with load(args.model, threads=args.threads) as model, ThreadPoolExecutor(8) as pool:
        for name in ("without", "with"):

            def restore(case: tuple[str, str, str], name: str = name) -> str:
                before, _, after = case
                suffix = after if name == "with" else None
                done = model.complete(
                    before, suffix=suffix, temperature=0, max_tokens=40, stop="\n"
                )
                return done.choices[0].text.strip()

            found[name] = list(pool.map(restore, cases))
            sys.stderr.write(f"{len(cases)} lines {name} the suffix\n")
    head = harness.environment(args.threads) | {"model": Path(args.model).name}
    rows = [
        {
            "suffix": name,
            "lines": len(cases),
            "right": sum(text == line for text, (_, line, _) in zip(texts, cases, strict=True)),
        }
        for name, texts in found.items()
    ]
    sys.stdout.write(json.dumps(head) + "\n")
    sys.stdout.write(harness.table(rows, ["suffix", "lines", "right"]) + "\n")
    if args.json:
        harness.write(args.json, head, rows)
    return 0
