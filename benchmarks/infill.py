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
from pathlib import Path
from typing import Any

import numpy as np

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
BEFORE, AFTER = 2000, 1000  # characters


def lines() -> Iterator[tuple[str, str, str]]:
    """Text before, line, text after: a statement in a function, one from each module."""
    for module in MODULES:
        spec = importlib.util.find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        text = Path(spec.origin).read_text()
        rows = text.splitlines(keepends=True)
        bodies = [
            statement.lineno - 1
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.FunctionDef)
            for statement in node.body[1:]
            if statement.lineno == statement.end_lineno and isinstance(statement, ast.stmt)
        ]
        at = random.Random(module).choice([row for row in bodies if len(rows[row].strip()) >= 12])
        before, after = "".join(rows[:at])[-BEFORE:], "".join(rows[at + 1 :])[:AFTER]
        yield before, rows[at].strip(), "\n" + after


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks infill", description=__doc__)
    parser.add_argument("model", help="GGUF file or catalogue name of a model with infill tokens")
    parser.add_argument("--threads", type=int, default=_core.num_physical_cores())
    parser.add_argument("--json", type=Path, help="write the rows as JSON lines")
    args = parser.parse_args(argv)
    found: list[dict[str, Any]] = []
    with load(args.model, threads=args.threads) as model:
        for before, line, after in lines():
            row: dict[str, Any] = {"line": line}
            for name, suffix in (("without", None), ("with", after)):
                result = model.complete(
                    before, suffix=suffix, temperature=0, max_tokens=48, stop="\n"
                )
                text = result.choices[0].text
                if not text.strip():  # a blank line first
                    result = model.complete(
                        before + text + "\n", suffix=suffix, temperature=0, max_tokens=48, stop="\n"
                    )
                    text = result.choices[0].text
                row[name] = text.strip()
            found.append(row)
            sys.stderr.write(f"\r{len(found)} of {len(MODULES)} lines")
    sys.stderr.write("\n")
    head = harness.environment(args.threads) | {"model": Path(args.model).name}
    right = {name: [row[name] == row["line"] for row in found] for name in ("without", "with")}
    rows = [
        {"suffix": name, "lines": len(found), "right": int(np.sum(values))}
        for name, values in right.items()
    ]
    sys.stdout.write(json.dumps(head) + "\n")
    sys.stdout.write(harness.table(rows, ["suffix", "lines", "right"]) + "\n")
    if args.json:
        harness.write(args.json, head, [*rows, *found])
    return 0
