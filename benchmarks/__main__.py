# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks SUITE`: tables for people, and the same rows as JSON lines."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import (
    drafts,
    harness,
    infill,
    load,
    peers,
    quality,
    search,
    server,
    soak,
    start,
    steps,
)
from fullbeam import _core
from fullbeam.bench import Ceilings


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
    rows = list(ops_cuda.rows(args.op, peak))
    sys.stdout.write(json.dumps(head) + "\n" + harness.table(rows, ops_cuda.COLUMNS) + "\n")
    if args.out:
        harness.write(args.out, head, rows)
    return 0


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
    suites.add_parser("peers", help="fullbeam beside other runtimes on the same model")
    suites.add_parser("server", help="`fullbeam serve` beside llama.cpp's server")
    suites.add_parser("start", help="from the start of `fullbeam serve` to its first token")
    suites.add_parser("load", help="seconds and memory that loading a model takes")
    suites.add_parser("quality", help="distance from float32 logits, fullbeam's and llama.cpp's")
    suites.add_parser("search", help="what beam search costs beside drawing as many rows")
    suites.add_parser("drafts", help="tokens per second with and without drafts")
    suites.add_parser("steps", help="where a step's time goes, op by op")
    suites.add_parser("infill", help="lines restored with and without the text after them")
    suites.add_parser("soak", help="clients that come and go: does anything stay behind?")
    modules = {
        "peers": peers,
        "server": server,
        "start": start,
        "load": load,
        "quality": quality,
        "search": search,
        "drafts": drafts,
        "steps": steps,
        "infill": infill,
        "soak": soak,
    }
    for name, module in modules.items():
        if sys.argv[1:2] == [name]:
            return int(module.main(sys.argv[2:]))
    args = parser.parse_args()
    return int(args.run(args))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
