# SPDX-License-Identifier: Apache-2.0
"""fullbeam beside other runtimes: the same GGUF file's weights, prompts and threads, in one run.

Each runtime has a process of its own, which is stopped while another is measured; all take turns in
each round. Figures are medians of the rounds [lowest-highest], ratios are of the same round and
above 1 where fullbeam is faster. llama.cpp takes the file as it is; for the others its weights are
converted once (transformers: bfloat16; CTranslate2 and OpenVINO GenAI: int8) and kept.

`decode-N`, `shared-N`: greedy tokens/s of N rows once their prompts are read, which are N or one;
`with prompts`: the same from the start. `prompt-N`: tokens/s. `beam-N`, `groups-GxN`, `beams-8x8`:
seconds for 32 tokens after 200 tokens of code, for one request or 8 at once. `%read`, `%int8`: what
the weights' bytes and products come to, of the rates that memory and processor give in the same
run. `%same`: first tokens equal to fullbeam's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import typing
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from benchmarks import harness
from fullbeam import _core
from fullbeam.bench import Ceilings, Load, Task, spread
from fullbeam.models.catalog import cache_folder
from fullbeam.models.gguf import GgufFile
from fullbeam.models.tokenizer import Tokenizer

RUNTIMES = ("fullbeam", "llama.cpp", "ctranslate2", "openvino", "transformers")
CONVERTED = ("transformers", "ctranslate2", "openvino")  # formats of benchmarks/peer_models.py
WORKER = Path(__file__).with_name("peer_worker.py")
CONVERTER = Path(__file__).with_name("peer_models.py")
ROWS = {
    **{f"decode-{count}": Task(count, 64, 33) for count in (1, 2, 4, 8, 16)},
    **{f"shared-{count}": Task(1, 512, 33, num_choices=count) for count in (8, 16)},
    **{f"prompt-{count}": Task(1, count, 1) for count in (512, 2048)},
    **{f"beam-{count}": Task(1, 200, 32, num_beams=count) for count in (4, 8)},
    "groups-4x2": Task(1, 200, 32, num_beams=8, num_groups=4),
    "beams-8x8": Task(8, 200, 32, num_beams=8),
}
CODE = [Path(module.__file__).read_text() for module in (argparse, tarfile, typing)]
MIN_SAME = 0.75  # share of equal first tokens below which something else may have been measured


class Worker:
    """A runtime in its process, which only runs while it is asked something."""

    def __init__(self, name: str, python: str, model: Path, threads: int) -> None:
        command = [python, str(WORKER), name, str(model), str(threads)]
        pipe = subprocess.PIPE
        self.name = name
        # Ctrl-C reaches this process alone, which ends the others.
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, process_group=0
        )
        try:
            self.greeting = self._read()
        except BaseException:
            self.close()
            raise

    def ask(self, action: str, prompts: list[list[int]], task: Task) -> Any:
        assert self.process.stdin is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps([action, prompts, asdict(task)]) + "\n")
        self.process.stdin.flush()
        answer = self._read()
        self.process.send_signal(signal.SIGSTOP)
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"peers: {self.name} ended with status {self.process.wait()}")
        return json.loads(line)


class Rounds:
    """Takes the measurements, and notes who else used the processors meanwhile."""

    def __init__(self, workers: Sequence[Worker], code: list[int]) -> None:
        self.workers = workers
        self.code = code
        self.results: dict[tuple[str, str], list[dict[str, Any]]] = {}  # by row and runtime
        self.settings: dict[tuple[str, str], str] = {}
        self.errors: dict[tuple[str, str], str] = {}
        self.core_s = self.other_s = 0.0

    def take(self, row: str, idx: int, worker: Worker) -> None:
        """Measure one row in round `idx`; round 0 warms up."""
        task, key = ROWS[row], (row, worker.name)
        if task.num_beams > 1 and not worker.greeting["has_search"]:
            return
        if (task.num_groups > 1 and not worker.greeting["has_groups"]) or key in self.errors:
            return
        prompts = self.prompts(row, idx)
        if idx == 0:
            self.settings[key] = self._ask(key, worker, "prepare", prompts, task)
            task = replace(task, max_tokens=min(8, task.max_tokens))
        result = self._ask(key, worker, "run", prompts, task)
        if idx and result is not None:
            self.results.setdefault(key, []).append(result)

    def prompts(self, row: str, idx: int) -> list[list[int]]:
        """Return pieces of code that no other row or round begins with."""
        task = ROWS[row]
        rng = np.random.default_rng([idx, list(ROWS).index(row)])
        starts = rng.integers(0, len(self.code) - task.num_prompt, task.num_seqs).tolist()
        found = [self.code[start : start + task.num_prompt] for start in starts]
        first_id = self.workers[0].greeting["first_id"]
        return found if first_id is None else [[first_id, *ids[1:]] for ids in found]

    def _ask(self, key: tuple[str, str], worker: Worker, action: str, *words: Any) -> Any:
        begin, before = time.perf_counter(), (cpu_s(), cpu_s(worker.process.pid))
        answer = worker.ask(action, *words)
        used, own = cpu_s() - before[0], cpu_s(worker.process.pid) - before[1]
        self.core_s += (time.perf_counter() - begin) * (os.cpu_count() or 1)
        self.other_s += used - own
        if isinstance(answer, dict) and "error" in answer:
            self.errors[key] = answer["error"]
            sys.stderr.write(f"peers: {worker.name} fails at {key[0]}: {answer['error']}\n")
            return None
        return answer


def cpu_s(pid: int | None = None) -> float:
    """Return the processor time used so far by a process, or by everything."""
    text = Path(f"/proc/{pid}/stat" if pid else "/proc/stat").read_text()
    fields = text.rpartition(")")[2].split()[11:13] if pid else text.split()[1:9]
    idle = 0 if pid else int(fields[3]) + int(fields[4])
    return (sum(map(int, fields)) - idle) / os.sysconf("SC_CLK_TCK")


def model_for(name: str, args: argparse.Namespace) -> Path:
    """Return the file or folder that a runtime reads, converted now where it is not there."""
    if name not in CONVERTED:
        return Path(args.model)
    folder = Path(args.models or cache_folder() / "peers") / args.model.stem / name
    if folder.is_dir():
        return folder
    python, source = args.peers_python, args.model
    if name != "transformers":
        source = model_for("transformers", args)
    if name == "openvino":
        python = args.export_python or python
    sys.stderr.write(f"peers: converting {source} for {name}\n")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    command = [python, str(CONVERTER), name, str(source), str(partial)]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return partial.rename(folder)


def start(args: argparse.Namespace, names: Sequence[str], workers: list[Worker]) -> None:
    """Start the runtimes that are installed, saying which are left out and why."""
    for name in names:
        python = sys.executable if name == "fullbeam" else args.peers_python
        probe = subprocess.run([python, str(WORKER), name], capture_output=True, text=True)
        absent = json.loads(probe.stdout)["absent" if "absent" in probe.stdout else "versions"]
        if "absent" in probe.stdout:
            sys.stderr.write(f"peers: {python} has no {absent}: {name} is left out\n")
            continue
        try:
            model = model_for(name, args)
            workers.append(Worker(name, python, model, args.threads))
        except (subprocess.CalledProcessError, RuntimeError) as error:
            sys.stderr.write(f"peers: {name} is left out: {error}\n")
            continue
        workers[-1].process.send_signal(signal.SIGSTOP)
    if not workers or workers[0].name != "fullbeam":
        raise RuntimeError("peers: fullbeam itself does not start")


def load_of(path: Path) -> tuple[Load, list[int]]:
    """Return what a token costs by the file's own tensors, and the tokens of some code."""
    with GgufFile.open(path) as file:
        sizes = {name: len(tensor.data) for name, tensor in file.tensors.items()}
        products = {
            name: int(np.prod(tensor.shape))
            for name, tensor in file.tensors.items()
            if len(tensor.shape) == 2
        }
        tokenizer = Tokenizer.from_gguf(file)
        embedding = "token_embd.weight"
        head = "output.weight" if "output.weight" in sizes else embedding
        # Of a block of Q8_0, 34 bytes, 16 are lower halves.
        spared = sizes[head] // 34 * 16 if file.tensors[head].type == "Q8_0" else 0
    spare = sizes[embedding] if head != embedding else 0
    layers = sum(products.values()) - products[embedding] - (head != embedding) * products[head]
    load = Load(sum(sizes.values()) - spare, spared, layers, products[head])
    ids = [idx for text in CODE for idx in tokenizer.encode(text, add_special_tokens=False)]
    return load, ids


def figures(task: Task, result: dict[str, Any]) -> dict[str, float]:
    """Return what a row is judged by, and the other things that its times say."""
    if task.num_beams > 1:
        return {"figure": result["total_s"]}
    if task.max_tokens == 1:
        return {"figure": task.num_seqs * task.num_prompt / result["first_s"]}
    return {
        "figure": result["tokens_between"] / (result["total_s"] - result["first_s"]),
        "with prompts": task.num_rows * task.max_tokens / result["total_s"],
    }


def lines_of(
    rounds: Rounds, rows: Sequence[str], load: Load, best: Ceilings
) -> list[dict[str, Any]]:
    """Return a line for each row and runtime."""
    lines: list[dict[str, Any]] = []
    for row in rows:
        task = ROWS[row]
        mine = rounds.results[row, "fullbeam"]
        for worker in rounds.workers:
            results = rounds.results.get((row, worker.name))
            if not results or len(results) < len(mine):
                continue
            columns = [figures(task, result) for result in results]
            figure = [column["figure"] for column in columns]
            unit = "s" if task.num_beams > 1 else "tok/s"
            line: dict[str, Any] = {"row": row, "runtime": worker.name, "unit": unit}
            line |= {"figure": spread(figure), "ratio": ""}
            if worker.name != "fullbeam":
                own = [figures(task, result)["figure"] for result in mine]
                pairs = zip(own, figure, strict=True)
                line["ratio"] = spread([b / a if unit == "s" else a / b for a, b in pairs])
            line |= shares(task, line["figure"]["median"], load, best, worker.name)
            if "with prompts" in columns[0]:
                line["with prompts"] = spread([column["with prompts"] for column in columns])
                own = [figures(task, result)["with prompts"] for result in mine]
                pairs = zip(own, (column["with prompts"] for column in columns), strict=True)
                line["ratio with prompts"] = spread([a / b for a, b in pairs])
            same = [
                ours[0] == theirs[0]
                for a, b in zip(mine, results, strict=True)
                for ours, theirs in zip(a["token_ids"], b["token_ids"], strict=True)
            ]
            line["%same"] = 100 * float(np.mean(same))
            line["settings"] = rounds.settings[row, worker.name]
            lines.append(line)
    return lines


def shares(task: Task, figure: float, load: Load, best: Ceilings, name: str) -> dict[str, float]:
    """Return the percentages of the ceilings; a runtime with weights of its own has no %read."""
    products = load.layer_products * figure
    found = {}
    if task.num_beams > 1:  # the whole request, its prompt included
        rows = task.num_rows * (task.max_tokens - 1) + task.num_seqs * task.num_prompt
        products = rows * load.layer_products / figure
    elif task.max_tokens > 1:
        products += load.head_products * figure
        if name in ("fullbeam", "llama.cpp"):
            ours = name == "fullbeam"
            num_bytes = load.read_bytes(task.num_rows) if ours else load.step_bytes
            rate = figure / task.num_rows * num_bytes
            found["%read"] = 100 * rate / best.read_bytes
    if best.int8_ops:
        found["%int8"] = 100 * 2 * products / best.int8_ops
    return found


def run(args: argparse.Namespace, head: dict[str, Any], rows: list[str]) -> list[dict[str, Any]]:
    """Measure rows and complete the head; return a line for each row and runtime."""
    workers: list[Worker] = []
    load, code = load_of(args.model)
    try:
        names = [name for name in RUNTIMES if name == "fullbeam" or name in args.peers]
        start(args, names, workers)
        found: list[Ceilings] = []
        rounds = Rounds(workers, code)
        turns = list(itertools.product(rows, range(args.rounds + 1)))
        for row, idx in track(turns, "Rounds", console=Console(stderr=True), transient=True):
            found.append(Ceilings.measure(args.threads))
            for worker in workers[:: 1 if idx % 2 else -1]:
                rounds.take(row, idx, worker)
    finally:
        for worker in workers:
            worker.close()
    best = Ceilings.joined(found)
    head |= {"read_GB/s": best.read_bytes / 1e9, "int8_GOP/s": best.int8_ops / 1e9}
    head |= {
        "weights_GB": load.step_bytes / 1e9,
        "%cpu_others": 100 * rounds.other_s / rounds.core_s,
    }
    for worker in workers:
        versions = " ".join(worker.greeting["versions"])
        head[worker.name] = f"{versions} {worker.greeting['settings']}"
    return lines_of(rounds, rows, load, best)


def warnings(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Return what makes lines doubtful."""
    return [
        f"{line['row']}: {line['runtime']} has {line['%same']:.0f} % of fullbeam's first tokens, "
        "and may do something else"
        for line in lines
        if line.get("%same", 100) < 100 * MIN_SAME
    ]


def draw(path: Path, head: dict[str, Any], lines: Sequence[dict[str, Any]]) -> None:
    """Draw the ratios; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = list(dict.fromkeys(line["row"] for line in lines))
    names = [name for name in RUNTIMES[1:] if any(line["runtime"] == name for line in lines)]
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.5 * len(rows)), layout="constrained")
    for place, name in enumerate(names):
        own = [line for line in lines if line["runtime"] == name]
        at = [rows.index(line["row"]) + 0.8 * (place + 0.5) / len(names) - 0.4 for line in own]
        low, mid, high = (
            np.array([line["ratio"][key] for line in own]) for key in ("min", "median", "max")
        )
        axes.barh(at, mid, 0.75 / len(names), xerr=(mid - low, high - mid), label=name)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as the other runtime")
    axes.set_title(f"fullbeam {head['commit']}, {head['model']}, {head['isa']}", fontsize=10)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def table(lines: Sequence[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for line in lines for name in line))
    last = [name for name in ("settings",) if name in columns]
    columns = [name for name in columns if name not in last] + last

    def text(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        low, mid, high = (f"{value[name]:.4g}" for name in ("min", "median", "max"))
        return f"{mid} [{low}-{high}]"

    cells = [{name: text(line.get(name, "")) for name in columns} for line in lines]
    return harness.table(cells, columns) + "\n"


def main(argv: list[str]) -> int:
    """Run `python -m benchmarks peers`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="GGUF file")
    parser.add_argument("--peers-python", default=sys.executable, help="who has the other runtimes")
    parser.add_argument(
        "--export-python", help="who has optimum-intel, for OpenVINO's model; else --peers-python"
    )
    parser.add_argument("--models", type=Path, help="folder of converted models, else in the cache")
    parser.add_argument("--rounds", type=int, default=5, help="after the warm-up; default: 5")
    parser.add_argument("--threads", type=int, default=_core.num_physical_cores())
    parser.add_argument("--json", type=Path, help="write the rows as JSON lines")
    parser.add_argument("--png", type=Path, help="draw the ratios (needs matplotlib)")
    parser.add_argument("--only", default=",".join(ROWS), help="some of %(default)s")
    parser.add_argument("--peers", default=",".join(RUNTIMES[1:]), help="some of %(default)s")
    args = parser.parse_args(argv)
    rows = args.only.split(",")
    args.peers = args.peers.split(",")
    if not set(rows) <= set(ROWS):
        parser.error(f"--only must be some of {', '.join(ROWS)}, got {args.only}")
    if not set(args.peers) <= set(RUNTIMES):
        parser.error(f"--peers must be some of {', '.join(RUNTIMES)}, got {','.join(args.peers)}")
    if args.rounds < 1 or args.threads < 1 or not args.model.is_file():
        parser.error("--rounds and --threads must be at least 1, and MODEL a GGUF file")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the workers, too
    head = harness.environment(args.threads)
    head |= {"cores": _core.num_physical_cores(), "model": args.model.name, "rounds": args.rounds}
    lines = run(args, head, rows)
    for name, value in head.items():
        text = f"{value:.4g}" if isinstance(value, float) else value
        sys.stdout.write(f"{name}: {text}\n")
    sys.stdout.write("\n" + table(lines))
    for warning in warnings(lines):
        sys.stdout.write(f"\n{warning}\n")
    if head.get("%cpu_others", 0) > 3:
        sys.stdout.write("\nOther processes used the processors: these are no numbers to quote.\n")
    if args.json:
        harness.write(args.json, head, lines)
    if args.png:
        draw(args.png, head, lines)
    return 0
