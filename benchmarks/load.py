# SPDX-License-Identifier: Apache-2.0
"""What loading a model costs: seconds and peak memory of a process that does nothing else.

`load` is `fullbeam.load` after the package was imported; `peak` is the largest resident set of the
whole process, KV cache untouched, and `x files` that beside the size of the files read. One more
load at the start is not counted; it leaves the files in the page cache. With --quantize there is a
row for a load that quantises, with an empty cache folder, and one for those that find the result.
Cells are medians of the rounds [lowest-highest].
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import harness, peers
from fullbeam import _core
from fullbeam.bench import spread

CHILD = """
import json, re, sys, time
import fullbeam
model, threads, quantize = json.loads(sys.argv[1])
begin = time.perf_counter()
fullbeam.load(model, device="cpu", threads=threads, quantize=quantize)
seconds = time.perf_counter() - begin
peak_kib = int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
print(json.dumps([seconds, peak_kib / 1024]))
"""


def load(model: str, threads: int, quantize: str | None, cache: Path | None) -> tuple[float, float]:
    """Return the seconds and the peak MiB of one load in a process of its own."""
    environment = os.environ | ({"FULLBEAM_CACHE": str(cache)} if cache else {})
    command = [sys.executable, "-c", CHILD, json.dumps([model, threads, quantize])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"load: {done.stderr.strip().splitlines()[-1]}")
    seconds, peak = json.loads(done.stdout)
    return seconds, peak


def files_mib(model: Path) -> float:
    """Return the size of a model's weight files."""
    files = [model] if model.is_file() else list(model.glob("*.safetensors"))
    return sum(path.stat().st_size for path in files) / 2**20


def measure(model: Path, threads: int, quantize: str | None, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each way to load."""
    name, size = str(model), files_mib(model)
    load(name, threads, None, None)
    found: dict[str, list[tuple[float, float]]] = {}
    for idx in range(rounds):
        found.setdefault("as stored", []).append(load(name, threads, None, None))
        if quantize:
            with tempfile.TemporaryDirectory() as folder:
                for way in (f"{quantize}, first", f"{quantize}, later"):
                    taken = load(name, threads, quantize, Path(folder))
                    found.setdefault(way, []).append(taken)
        sys.stderr.write(f"round {idx + 1} of {rounds}\n")
    return [
        {
            "way": way,
            "files MiB": size,
            "load s": spread([seconds for seconds, _ in values]),
            "peak MiB": spread([peak for _, peak in values]),
            "x files": spread([peak / size for _, peak in values]),
        }
        for way, values in found.items()
    ]


def main(argv: list[str]) -> int:
    """Run `python -m benchmarks load`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks load", description=__doc__)
    parser.add_argument("model", type=Path, help="GGUF file or folder")
    parser.add_argument("--quantize", choices=["q8", "q4"], help="for folders")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--threads", type=int, default=_core.num_physical_cores())
    parser.add_argument("--json", type=Path, help="write the rows as JSON lines")
    args = parser.parse_args(argv)
    if min(args.rounds, args.threads) < 1 or not args.model.exists():
        parser.error("the numbers must be at least 1, and MODEL must exist")
    try:
        rows = measure(args.model, args.threads, args.quantize, args.rounds)
    except ValueError as error:
        parser.error(str(error))
    head = harness.environment(args.threads) | {"model": args.model.name, "rounds": args.rounds}
    for name, value in head.items():
        sys.stdout.write(f"{name}: {value}\n")
    sys.stdout.write("\n" + peers.table(rows))
    if args.json:
        harness.write(args.json, head, rows)
    return 0
