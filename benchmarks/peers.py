# SPDX-License-Identifier: Apache-2.0
"""fullbeam beside other runtimes: the same GGUF file, token ids and threads, in one run.

Each runtime sleeps in a process of its own while another is measured; all take turns in each round.
Cells are medians of the rounds [lowest-highest] in tokens/s, or ratios of fullbeam to a peer in the
same round. `decoder` rows: forward passes and the greedy choice; the prompts of `decode-N` are read
before the clock starts. `engine` rows: fullbeam's scheduler with whole requests, prompts included,
beside the same forward passes of a peer. `%read`: weights read per second, of what memory gives.
`%same`: equal greedy choices after the same random ids.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from benchmarks import harness
from fullbeam import _core
from fullbeam.models.gguf import GgufFile

RUNTIMES = ("fullbeam", "llama.cpp")
ROWS = {f"decode-{count}": (count, 64, 32) for count in (1, 2, 4, 8, 16)}
ROWS["prompt-512"] = (1, 512, 0)  # sequences, tokens of each prompt, steps
PAUSE_S = 0.05  # longer than the threads of any runtime spin after their last work


class Worker:
    """A runtime in its process."""

    def __init__(self, name: str, python: str, path: Path, threads: int) -> None:
        script = Path(__file__).with_name("peer_worker.py")
        command = [python, str(script), name, str(path), str(threads)]
        pipe = subprocess.PIPE
        self.name = name
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self.greeting = self._read()

    def ask(self, action: str, task: tuple[Any, Any]) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([action, *task]) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"peers: {self.name} ended with status {self.process.wait()}")
        return json.loads(line)


class Rounds:
    """Takes the measurements, and notes who else used the processors meanwhile."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self.workers = workers
        self.rates: dict[tuple[str, str, str], list[float]] = {}  # tokens/s by row, level, runtime
        self.choices: dict[tuple[str, str], list[int]] = {}
        self.core_s = self.other_s = self.waiting_s = 0.0

    def take(self, row: str, idx: int, worker: Worker) -> None:
        """Measure one row in round `idx`, with ids that no earlier round has seen."""
        num_seqs, prompt_len, num_steps = ROWS[row]
        vocab_size = min(worker.greeting["vocab_size"] for worker in self.workers)
        low, high = min(1000, vocab_size // 2), min(vocab_size, 30000)
        rng = np.random.default_rng([idx, num_seqs, prompt_len])
        prompts = rng.integers(low, high, (num_seqs, prompt_len))
        first_id = self.workers[0].greeting["first_id"]
        prompts[:, 0] = prompts[:, 0] if first_id is None else first_id
        task = (prompts.tolist(), rng.integers(low, high, (num_steps, num_seqs)).tolist())
        if idx == 0:
            worker.greeting[row] = worker.ask("prepare", task)
        timing = self._ask(worker, "run", task)
        bare_s = timing["steps_s"] if num_steps else timing["prompt_s"]
        whole_s = timing["prompt_s"] + timing["steps_s"]
        if worker.greeting["has_engine"]:
            whole_s = self._ask(worker, "requests", task)
        if idx == 0:
            self.choices[row, worker.name] = timing["choices"]
            return
        bare, whole = (num_steps, num_steps + 1) if num_steps else (prompt_len, prompt_len)
        for level, rate in (("decoder", bare / bare_s), ("engine", whole / whole_s)):
            self.rates.setdefault((row, level, worker.name), []).append(num_seqs * rate)

    def _ask(self, worker: Worker, action: str, task: tuple[Any, Any]) -> Any:
        time.sleep(PAUSE_S)
        pids = [each.process.pid for each in self.workers]
        begin, before = time.perf_counter(), [cpu_s(), *map(cpu_s, pids)]
        answer = worker.ask(action, task)
        used = np.array([cpu_s(), *map(cpu_s, pids)]) - before
        self.core_s += (time.perf_counter() - begin) * (os.cpu_count() or 1)
        self.other_s += used[0] - used[1:].sum()
        self.waiting_s += used[1:].sum() - used[1 + self.workers.index(worker)]
        return answer


def cpu_s(pid: int | None = None) -> float:
    """Return the processor time used so far by a process, or by everything."""
    text = Path(f"/proc/{pid}/stat" if pid else "/proc/stat").read_text()
    fields = text.rpartition(")")[2].split()[11:13] if pid else text.split()[1:9]
    idle = 0 if pid else int(fields[3]) + int(fields[4])
    return (sum(map(int, fields)) - idle) / os.sysconf("SC_CLK_TCK")


def read_bytes_per_second(threads: int) -> float:
    """Return the best rate at which all threads together read 512 MB that no cache holds."""
    find = ctypes.CDLL(None).memchr
    find.argtypes, find.restype = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], ctypes.c_void_p
    arrays = [np.ones(2**29 // threads, np.uint8) for _ in range(threads)]
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(9):
            begin = time.perf_counter()
            list(pool.map(lambda a: find(a.ctypes.data, 0, a.nbytes), arrays))
            best = min(best, time.perf_counter() - begin)
    return sum(array.nbytes for array in arrays) / best


def step_bytes(path: Path) -> int:
    """Return the bytes of weights that a step reads: the embedding only if it is the head, too."""
    with GgufFile.open(path) as file:
        sizes = {name: len(tensor.data) for name, tensor in file.tensors.items()}
    return sum(sizes.values()) - ("output.weight" in sizes) * sizes["token_embd.weight"]


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": float(np.median(values)), "min": min(values), "max": max(values)}


def run(args: argparse.Namespace, head: dict[str, Any], rows: list[str]) -> list[dict[str, Any]]:
    """Measure rows and complete the head; return a dict for each row and level."""
    workers: list[Worker] = []
    try:
        for name in RUNTIMES:
            python = sys.executable if name == "fullbeam" else args.peers_python
            worker = Worker(name, python, args.model, args.threads)
            if "absent" in worker.greeting:
                worker.process.communicate()
                sys.stderr.write(f"peers: {python} has no {name}, which is left out\n")
            else:
                workers.append(worker)
        ceiling = read_bytes_per_second(args.threads)
        rounds = Rounds(workers)
        turns = [
            (row, idx, worker)
            for idx in range(args.rounds + 1)  # round 0 warms up
            for row in rows
            for worker in workers[:: 1 if idx % 2 else -1]
        ]
        for turn in track(turns, "Rounds", console=Console(stderr=True), transient=True):
            rounds.take(*turn)
        ceiling = max(ceiling, read_bytes_per_second(args.threads))
    finally:
        for worker in workers:
            worker.process.communicate()
    head["read_GB/s"] = ceiling / 1e9
    head["weights_GB"] = step_bytes(args.model) / 1e9
    head["%cpu_others"] = 100 * rounds.other_s / rounds.core_s
    head["%cpu_waiting_runtimes"] = 100 * rounds.waiting_s / rounds.core_s
    lines = []
    for row, level in ((row, level) for row in rows for level in ("decoder", "engine")):
        line: dict[str, Any] = {"row": row, "level": level}
        mine = rounds.rates[row, level, "fullbeam"]
        for worker in workers:
            name, rates = worker.name, rounds.rates[row, level, worker.name]
            line[name] = spread(rates)
            if level == "decoder" and ROWS[row][2]:
                rate = head["weights_GB"] * line[name]["median"] / ROWS[row][0]
                line[f"{name} GB/s"], line[f"{name} %read"] = rate, 100 * rate / head["read_GB/s"]
            if name != "fullbeam":
                line[f"ratio to {name}"] = spread([a / b for a, b in zip(mine, rates, strict=True)])
            if name != "fullbeam" and level == "decoder":
                line[f"{name} settings"] = worker.greeting[row]
                if ROWS[row][2]:
                    pair = rounds.choices[row, "fullbeam"], rounds.choices[row, name]
                    line[f"{name} %same"] = 100 * float(np.equal(*pair).mean())
        lines.append(line)
    for worker in workers:
        versions = " ".join(worker.greeting["versions"])
        head[worker.name] = f"{versions} {worker.greeting['settings']}"
    return lines


def startup(args: argparse.Namespace, head: dict[str, Any]) -> dict[str, Any]:
    """Measure the command line: process start to first text, to its end, and peak memory."""
    path, others = args.model, []
    command = [sys.executable, "-m", "fullbeam", "complete", str(path), "def fibonacci(n):"]
    command += ["--max-tokens", "1", "--threads", str(args.threads)]
    samples = []
    for _ in range(args.rounds + 1):
        begin, busy_s = time.perf_counter(), cpu_s()
        with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0) as process:
            assert process.stdout is not None
            process.stdout.read(1)
            first_s = time.perf_counter() - begin
            process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise RuntimeError(f"peers: the command ended with status {process.returncode}")
        memory = usage.ru_maxrss * 1024
        exit_s = time.perf_counter() - begin
        other_s = cpu_s() - busy_s - usage.ru_utime - usage.ru_stime
        others.append(100 * other_s / exit_s / (os.cpu_count() or 1))
        samples.append((first_s, exit_s, memory / 1e6, memory / path.stat().st_size))
    head["%cpu_others"] = float(np.mean(others))
    names = ("first text s", "exit s", "peak MB", "peak / file")
    columns = zip(*samples[1:], strict=True)  # the first run fills the file cache
    values = {name: spread(column) for name, column in zip(names, columns, strict=True)}
    return {"row": "startup", **values}


def table(lines: Sequence[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for line in lines for name in line))

    def text(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        low, mid, high = (f"{value[name]:.4g}" for name in ("min", "median", "max"))
        return f"{mid} [{low}-{high}]"

    cells = [{name: text(line.get(name, "")) for name in columns} for line in lines]
    return harness.table(cells, columns) + "\n"


def main(argv: list[str]) -> int:
    """Run `python -m benchmarks peers`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks peers", description=__doc__)
    parser.add_argument("model", type=Path, help="GGUF file")
    parser.add_argument("--peers-python", default=sys.executable, help="who has the other runtimes")
    parser.add_argument("--rounds", type=int, default=5, help="after the warm-up; default: 5")
    parser.add_argument("--threads", type=int, default=_core.num_physical_cores())
    parser.add_argument("--json", type=Path, help="write the rows as JSON lines")
    parser.add_argument("--only", default=",".join(ROWS), help="some of %(default)s")
    parser.add_argument("--startup", action="store_true", help="the command line's start instead")
    args = parser.parse_args(argv)
    rows = args.only.split(",")
    if not set(rows) <= set(ROWS):
        parser.error(f"--only must be some of {', '.join(ROWS)}, got {args.only}")
    if args.rounds < 1 or args.threads < 1 or not args.model.is_file():
        parser.error("--rounds and --threads must be at least 1, and MODEL a GGUF file")
    head = harness.environment(args.threads)
    head |= {"cores": _core.num_physical_cores(), "model": args.model.name, "rounds": args.rounds}
    lines = [startup(args, head)] if args.startup else run(args, head, rows)
    for name, value in head.items():
        text = f"{value:.4g}" if isinstance(value, float) else value
        sys.stdout.write(f"{name}: {text}\n")
    sys.stdout.write("\n" + table(lines))
    if head.get("%cpu_others", 0) > 3:
        sys.stdout.write("\nOther processes used the processors: these are no numbers to quote.\n")
    if args.json:
        harness.write(args.json, head, lines)
    return 0
