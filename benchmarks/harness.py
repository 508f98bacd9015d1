# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: the machine they ran on, cold caches, and the one table."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fullbeam import _core, ops

COLUMNS = [
    "op",
    "shape",
    "dtype",
    "device",
    "median_us",
    "p10",
    "p90",
    "GB/s",
    "GOP/s",
    "%peak",
    "bound",
    "baseline",
    "ratio",
]


def last_level_cache_bytes() -> int:
    sizes = [path.read_text() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("*/size")]
    units = {"K": 2**10, "M": 2**20}
    return max((int(s[:-2]) * units[s[-2]] for s in sizes if s[-2:-1] in units), default=2**25)


class Cache:
    """Empties the caches before a measurement and wakes the thread team up again."""

    def __init__(self) -> None:
        self._memory = np.zeros(2 * last_level_cache_bytes(), np.uint8)
        self._x = np.ones((256, 512), np.float32)
        self._weight = np.ones(512, np.float32)

    def flush(self) -> None:
        self._memory += 1
        for _ in range(3):
            ops.rms_norm(self._x, self._weight, out=self._x)


def median_us(run: Callable[[], object], setup: Callable[[], None], *, limit_s: float) -> float:
    """Median of 20 runs, of fewer where they take longer than the limit."""
    times: list[float] = []
    run()
    while len(times) < 3 or (len(times) < 20 and sum(times) < limit_s):
        setup()
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return float(np.median(times) * 1e6)


def environment(threads: int) -> dict[str, Any]:
    """The first line of every results file."""
    cpuinfo = Path("/proc/cpuinfo")
    fields = [line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line]
    known = {key.strip(): value.strip() for key, value in fields}
    root = Path(__file__).parent
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True
    )
    return {
        "commit": commit.stdout.strip() or "unknown",
        "device": known.get("model name", platform.machine()),
        "isa": _core.cpu_isa(),
        "clock_mhz": known.get("cpu MHz", "unknown"),
        "driver": platform.release(),
        "compiler": _core.build_info()["compiler"],
        "threads": threads,
        "numpy": np.__version__,
    }


def table(rows: Iterable[dict[str, Any]], columns: Sequence[str] = COLUMNS) -> str:
    cells = [list(columns), *([_text(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[idx]) for line in cells) for idx in range(len(columns))]
    lines = ("  ".join(t.ljust(w) for t, w in zip(line, widths, strict=True)) for line in cells)
    return "\n".join(line.rstrip() for line in lines)


def write(path: Path, head: dict[str, Any], rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in [head, *rows]))


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
