# SPDX-License-Identifier: Apache-2.0
"""Clients that come and go leave nothing behind; `python -m benchmarks soak` does it for longer."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter

import httpx

from benchmarks.soak import soak
from fullbeam.async_stream import AsyncCompletionStream
from fullbeam.engine.pages import PageTable
from fullbeam.engine.sequence import Request, Row, Sequence
from fullbeam.server.record import Record
from server_harness import Running, running, wait_until

KINDS = (Request, Sequence, Row, PageTable, Record, AsyncCompletionStream, asyncio.Task)


def alive(server: Running) -> Counter[str]:
    """What there is after a request: the engine keeps the rows of its last step."""
    httpx.post(f"{server.url}/v1/completions", json={"max_tokens": 3})
    server.check_idle()
    gc.collect()
    return Counter(
        type(item).__name__ for item in gc.get_objects() if issubclass(type(item), KINDS)
    )


def test_clients_that_leave_leave_nothing_behind() -> None:
    with running(step_s=0.001) as server:
        before = alive(server)
        report = asyncio.run(soak(server.url, "fake", seconds=5, num_clients=32, seed=1))
        wait_until(lambda: not alive(server) - before)
    assert report.num_complete > 30
    assert report.num_abandoned > 30
    assert set(report.statuses) <= {"200", "204"}
    assert not any(report.left.values())
