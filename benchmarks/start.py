# SPDX-License-Identifier: Apache-2.0
"""From the start of a process to its first token: `fullbeam serve` beside llama.cpp's llama-server.

Each is started, asked for /health every few milliseconds until that is 200, then for a stream of
/v1/completions, and ended; they take turns in each round, after a round that is not counted and
leaves the file in the page cache. `complete` is the command `fullbeam complete` for one token, to
its end. Cells are medians of the rounds [lowest-highest] in seconds; the ratio is fullbeam's time
to the first token beside llama.cpp's in the same round: below 1, fullbeam is faster.
"""

from __future__ import annotations

import argparse
import http.client
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks import harness, peers
from benchmarks.server import LIMIT_S, Server
from fullbeam import _core
from fullbeam.bench import spread

PROMPT = "def fibonacci(n):"
LLAMA_OPTIONS = "--no-warmup --no-webui --ctx-size 4096 --parallel 1"
POLL_S = 0.004
FIRST = "to first token s"


class Started(Server):
    """A server that was just started; entered without waiting for it."""

    def _wait_ready(self) -> None:
        pass

    def times(self) -> dict[str, float]:
        """Return the seconds from now to the first 200 of /health, and to the first token."""
        begin = time.perf_counter()
        while True:
            with suppress(OSError, http.client.HTTPException, ValueError):
                if self._send("GET", "/health")[0] == 200:
                    break
            if self._process.poll() is not None or time.perf_counter() - begin > LIMIT_S:
                raise RuntimeError(f"start: {self.name} does not get ready")
            time.sleep(POLL_S)
        ready_s = time.perf_counter() - begin
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT_S)
        fields = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0, "stream": True}
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(fields), headers)
        line = connection.getresponse().readline()
        first_s = time.perf_counter() - begin
        connection.close()
        if not line.startswith(b"data: {"):
            raise RuntimeError(f"start: {self.name} answers {line!r}")
        return {"to /health s": ready_s, FIRST: first_s}


def complete_s(command: Sequence[str]) -> float:
    """Return the seconds that a command takes."""
    begin = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - begin


def measure(commands: dict[str, list[str]], complete: list[str], rounds: int) -> dict[str, Any]:
    """Return what all rounds took, by server and column."""
    taken: dict[str, Any] = {name: {} for name in commands}
    taken["complete"] = {}
    for idx in range(-1, rounds):
        for name in list(commands)[:: -1 if idx % 2 else 1]:
            server = Started(name, commands[name])
            with server:
                found = server.times()
            for column, seconds in found.items() if idx >= 0 else ():
                taken[name].setdefault(column, []).append(seconds)
        seconds = complete_s(complete)
        if idx >= 0:
            taken["complete"].setdefault("to its end s", []).append(seconds)
            sys.stderr.write(f"round {idx + 1} of {rounds}\n")
    return taken


def report(taken: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each program; the first one is fullbeam's server."""
    mine = next(iter(taken.values()))[FIRST]
    rows = []
    for name, columns in taken.items():
        row = {"program": name} | {title: spread(values) for title, values in columns.items()}
        if FIRST in columns and columns[FIRST] is not mine:
            ratios = [a / b for a, b in zip(mine, columns[FIRST], strict=True)]
            row["fullbeam / it"] = spread(ratios)
        rows.append(row)
    return rows


def main(argv: list[str]) -> int:
    """Run `python -m benchmarks start`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks start", description=__doc__)
    parser.add_argument("model", type=Path, help="GGUF file")
    parser.add_argument("--llama-server", help="llama.cpp's server; default: fullbeam alone")
    parser.add_argument(
        "--llama-options", default=LLAMA_OPTIONS, help=f"instead of `{LLAMA_OPTIONS}`"
    )
    parser.add_argument("--rounds", type=int, default=7, help="after the warm-up; default: 7")
    parser.add_argument("--threads", type=int, default=_core.num_physical_cores())
    parser.add_argument("--json", type=Path, help="write the rows as JSON lines")
    args = parser.parse_args(argv)
    if min(args.rounds, args.threads) < 1 or not args.model.is_file():
        parser.error("the numbers must be at least 1, and MODEL a GGUF file")
    common = [str(args.model), "--threads", str(args.threads)]
    fullbeam = [sys.executable, "-m", "fullbeam"]
    commands = {"fullbeam": [*fullbeam, "serve", *common]}
    if args.llama_server:
        options = shlex.split(args.llama_options)
        commands["llama.cpp"] = [args.llama_server, "--model", *common, *options]
    one = [*fullbeam, "complete", *common[1:], "--max-tokens", "1", common[0], PROMPT]
    rows = report(measure(commands, one, args.rounds))
    head = harness.environment(args.threads)
    head |= {"model": args.model.name, "rounds": args.rounds}
    head |= {name: " ".join(Path(word).name for word in line) for name, line in commands.items()}
    for name, value in head.items():
        sys.stdout.write(f"{name}: {value}\n")
    sys.stdout.write("\n" + peers.table(rows))
    if args.json:
        harness.write(args.json, head, rows)
    return 0
