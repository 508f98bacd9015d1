# SPDX-License-Identifier: Apache-2.0
"""How much KV memory there is room for."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fullbeam.checks import shown

PAGE_SIZE = 16
DEFAULT_CONTEXT = 4096
DEFAULT_MAX_ROWS = 16


@dataclass(frozen=True, slots=True)
class KvPlan:
    """Size of an engine's KV cache."""

    context: int
    max_rows: int
    num_pages: int


def plan_kv(
    *,
    bytes_per_token: int,
    model_context: int,
    context: int | None,
    max_rows: int | None,
    available_bytes: int,
    kv_share: float,
) -> KvPlan:
    """Choose context, rows and pages; of the available bytes a share is for keys and values.

    Raises
    ------
    ValueError
        When `context` or `max_rows` is out of range or there is no memory for it.
    """
    rows = DEFAULT_MAX_ROWS if max_rows is None else check_positive("max_rows", max_rows)
    room = int(available_bytes * kv_share) // (bytes_per_token * PAGE_SIZE)  # in pages
    where = f"(KV takes {bytes_per_token} bytes a token, {available_bytes >> 20} MiB are available)"
    if context is None:
        wanted = min(model_context, DEFAULT_CONTEXT)
        if room * PAGE_SIZE < min(wanted, 256):
            raise ValueError(f"load: context must have room for {min(wanted, 256)} tokens {where}")
        tokens = min(wanted, room * PAGE_SIZE)
    else:
        tokens = check_positive("context", context)
        if tokens > model_context:
            raise ValueError(f"load: context must be at most {model_context}, got {shown(context)}")
        if -(-tokens // PAGE_SIZE) > room:
            bound = f"at most {room * PAGE_SIZE} here {where}"
            raise ValueError(f"load: context must be {bound}, got {shown(context)}")
    if rows > room:
        raise ValueError(f"load: max_rows must be at most {room} here {where}, got {shown(rows)}")
    return KvPlan(tokens, rows, min(rows * -(-tokens // PAGE_SIZE), room))


def available_bytes() -> int:
    """Return the memory that this process may still take."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    info = _read("/proc/meminfo")
    for line in info.splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit, used = _read("/sys/fs/cgroup/memory.max"), _read("/sys/fs/cgroup/memory.current")
    if limit.isdigit() and used.isdigit():
        stat = dict(line.split() for line in _read("/sys/fs/cgroup/memory.stat").splitlines())
        reclaimable = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
        free = min(free, int(limit) - int(used) + reclaimable)
    return max(free, 0)


def return_free_memory() -> None:
    """Give back what building freed: glibc keeps 30 MB of it for Gemma's 262144 tokens."""
    with suppress(OSError, TypeError, AttributeError):  # other C libraries have no such function
        ctypes.CDLL(None).malloc_trim(0)


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def check_positive(name: str, value: int) -> int:
    """Return an argument of `load` that must be an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"load: {name} must be an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"load: {name} must be at least 1, got {shown(value)}")
    return value
