# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks SUITE`: tables for people, and the same rows as JSON lines."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import harness
from fullbeam import _core
from fullbeam.bench import Ceilings

# Suites with arguments of their own, each a module of this package, imported where it is called.
SUITES = {
    "peers": "fullbeam beside other runtimes on the same model",
    "server": "`fullbeam serve` beside llama.cpp's server",
    "start": "from the start of `fullbeam serve` to its first token",
    "load": "seconds and memory that loading a model takes",
    "quality": "distance from float32 logits, fullbeam's and llama.cpp's",
    "search": "what beam search costs beside drawing as many rows",
    "drafts": "tokens per second with and without drafts",
    "engine": "the whole engine on random weights: rows, beams, first token; on a GPU too",
    "steps": "where a step's time goes, op by op",
    "infill": "lines restored with and without the text after them",
    "soak": "clients that come and go: does anything stay behind?",
}


def ops_rows(pytest_json: dict[str, Any], ceilings: Ceilings) -> list[dict[str, Any]]:
    """Return the table; %peak is of the rate that is nearer to its ceiling, which is named."""
    rows = []
    for bench in pytest_json["benchmarks"]:
        info, times = bench["extra_info"], np.array(bench["stats"]["data"]) * 1e6
        median = float(np.median(times))
        rates = {"GB/s": info["num_bytes"] / median / 1e3, "GOP/s": info["num_ops"] / median / 1e3}
        shares = {"GB/s": 1e9 * rates["GB/s"] / ceilings.read_bytes}
        if info["is_int8"] and ceilings.int8_ops:
            shares["GOP/s"] = 1e9 * rates["GOP/s"] / ceilings.int8_ops
        bound = max(shares, key=lambda name: shares[name])
        rows.append(
            {
                "op": info["op"],
                "shape": info["shape"],
                "dtype": info["dtype"],
                "device": info["device"],
                "median_us": median,
                "p10": float(np.percentile(times, 10)),
                "p90": float(np.percentile(times, 90)),
                **rates,
                "%peak": 100 * shares[bound],
                "bound": bound,
                "baseline": f"{info['baseline']} {info['baseline_us']:.4g}",
                "ratio": info["baseline_us"] / median,
            }
        )
    return rows


def run_ops_on_cuda(args: argparse.Namespace) -> int:
    if not _core.num_cuda_devices():
        sys.stderr.write(f"benchmarks: no CUDA device: {_core.why_no_cuda_device()}\n")
        return 2
    from benchmarks import ops_cuda

    peak = ops_cuda.copy_bytes_per_second()
    head = harness.environment(args.threads) | ops_cuda.environment() | {"copy_GB/s": peak / 1e9}
    cases = [case for case in ops_cuda.cases() if args.op in (None, case.op)]
    num_failed = ops_cuda.report(cases, head, peak, ops_cuda.Graphs(), args.out)
    return 1 if num_failed else 0


def run_ops(args: argparse.Namespace) -> int:
    if args.device == "cuda":
        return run_ops_on_cuda(args)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ["--benchmark-only", f"--benchmark-json={report}", "-q", "-o", "filterwarnings="]
        options += [f"--threads={args.threads}", *([f"--op={args.op}"] if args.op else [])]
        with contextlib.redirect_stdout(sys.stderr):  # progress; the table alone goes to stdout
            status = pytest.main([str(Path(__file__).parent / "ops.py"), *options])
        if status != 0:
            sys.stderr.write(f"benchmarks: pytest ended with status {status}\n")
            return int(status)
        data = json.loads(report.read_text())
    ceilings = Ceilings.measure(args.threads)
    head = harness.environment(args.threads) | {
        "read_GB/s": ceilings.read_bytes / 1e9,
        "int8_GOP/s": ceilings.int8_ops / 1e9,
    }
    rows = ops_rows(data, ceilings)
    sys.stdout.write(json.dumps(head) + "\n" + harness.table(rows) + "\n")
    if args.out:
        harness.write(args.out, head, rows)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    suites = parser.add_subparsers(dest="suite", required=True)
    suite = suites.add_parser("ops", help="every op against NumPy or torch")
    suite.add_argument("--op", help="only this op")
    suite.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    suite.add_argument("--threads", type=int, default=_core.num_physical_cores())
    suite.add_argument("--out", type=Path, help="write the rows as JSON lines")
    suite.set_defaults(run=run_ops)
    for name, text in SUITES.items():
        suites.add_parser(name, help=text)
        if sys.argv[1:2] == [name]:
            return int(importlib.import_module(f"benchmarks.{name}").main(sys.argv[2:]))
    args = parser.parse_args()
    return int(args.run(args))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
