# SPDX-License-Identifier: Apache-2.0
"""Many clients that come, read a while and go: does anything stay behind in the server?

Clients ask over all surfaces, most of them for streams, and close their connections at random
points. Afterwards every page has to be free or cached, nothing may run or wait, and the second half
of the time must not have cost memory that the first half did not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks import harness
from fullbeam import _core

CONTEXT = 256
"""As little as the requests need: all of the KV cache is in memory after a few seconds."""

BUSY = ("requests_in_progress", "queue_length", "sequences_running", "rows", "pages_used")
WORDS = ["abc", "dd", "a", "cd", "bc", "e", "ab", "d", "c", "a", "abc", "bc", "dd"]


@dataclass
class Report:
    """What a run did, and what it left."""

    seconds: float = 0.0
    num_complete: int = 0
    num_abandoned: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    left: dict[str, float] = field(default_factory=dict)  # of BUSY, at the end
    resident_mib: list[float] = field(default_factory=list)  # at the start, halfway, at the end


def metrics(url: str) -> dict[str, float]:
    """Return the metrics without labels."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        lines = re.findall(r"^(\w+) (\S+)$", answer.read().decode(), re.MULTILINE)
    return {name: float(value) for name, value in lines}


def request(rng: random.Random, model: str) -> tuple[str, dict[str, Any]]:
    """Return a path and a body for it."""
    text = " ".join(rng.choices(WORDS, k=rng.randint(1, 60)))
    num_tokens = rng.randint(1, 64)
    kind = rng.random()
    if kind < 0.15:
        body = {"code": text, "filename": f"{rng.randint(0, 7)}.py", "beam_size": rng.randint(1, 4)}
        return "/v1/complete/gpt", body | {"num_iterations": min(num_tokens, 10)}
    body = {"prompt": text, "max_tokens": num_tokens, "stream": rng.random() < 0.8, "model": model}
    if kind < 0.3:
        return "/api/v1/compatibility/openai/v1/completions", body
    return "/v1/completions", body | {"n": rng.choice([1, 1, 1, 2, 4]), "ignore_eos": True}


async def client(url: str, model: str, rng: random.Random, until: float, report: Report) -> None:
    """Send requests one after the other; leave the first half of them before their end."""
    address = urlsplit(url)
    while time.monotonic() < until:
        path, body = request(rng, model)
        data = json.dumps(body).encode()
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        head = f"POST {path} HTTP/1.1\r\nHost: {address.netloc}\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        patience = rng.choice([None, rng.uniform(0, 0.05), rng.uniform(0, 1.0)])
        try:
            async with asyncio.timeout(patience):
                answer = await reader.read(16)
                while await reader.read(4096):
                    pass
            status = answer[9:12].decode()
            report.statuses[status] = report.statuses.get(status, 0) + 1
            report.num_complete += 1
        except TimeoutError:
            report.num_abandoned += 1
        finally:
            writer.close()


async def soak(url: str, model: str, *, seconds: float, num_clients: int, seed: int) -> Report:
    """Run the clients; wait until the server is idle, or 20 s."""
    report = Report()
    begin = time.monotonic()
    rngs = [random.Random(f"{seed} {idx}") for idx in range(num_clients)]

    def resident() -> float:
        return metrics(url).get("process_resident_memory_bytes", 0) / 2**20

    report.resident_mib.append(await asyncio.to_thread(resident))
    for half in (1, 2):
        until = begin + seconds * half / 2
        await asyncio.gather(*(client(url, model, rng, until, report) for rng in rngs))
        report.resident_mib.append(await asyncio.to_thread(resident))
    report.seconds = time.monotonic() - begin
    for _ in range(200):
        values = await asyncio.to_thread(metrics, url)
        report.left = {name: values[f"fullbeam_{name}"] for name in BUSY}
        if not any(report.left.values()):
            break
        await asyncio.sleep(0.1)
    return report


def main(words: list[str]) -> int:
    """Serve a model in a process of its own, and soak it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks soak", description=__doc__)
    parser.add_argument("model", help="what `fullbeam serve` takes")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the result to this file")
    args = parser.parse_args(words)
    command = [sys.executable, "-m", "fullbeam", "serve", args.model, "--port", "0"]
    command += ["--context", str(CONTEXT)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        url = server.stderr.readline().split()[-1]
        loop = asyncio.new_event_loop()
        log = loop.run_in_executor(None, _count_lines, server.stderr)
        _wait_ready(url)
        with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as answer:
            name = json.load(answer)["data"][0]["id"]
        report = loop.run_until_complete(
            soak(url, name, seconds=args.seconds, num_clients=args.clients, seed=args.seed)
        )
        server.terminate()
        num_lines = loop.run_until_complete(log)
    finally:
        server.terminate()
        server.wait(30)
    row = vars(report) | {"clients": args.clients, "seed": args.seed, "log_lines": num_lines}
    sys.stdout.write(json.dumps(row, indent=2) + "\n")
    if args.json:
        harness.write(
            args.json,
            harness.environment(_core.num_physical_cores()) | {"model": args.model},
            [row],
        )
    _, half, end = report.resident_mib
    is_clean = not any(report.left.values()) and end < 1.05 * half + 4
    is_clean &= not any(status.startswith("5") for status in report.statuses)
    return 0 if is_clean else 1


def _count_lines(stream: Any) -> int:
    """Count lines of requests; pass on what else the server has to say."""
    count = 0
    for line in stream:
        if line.startswith("{"):
            count += 1
        else:
            sys.stderr.write(line)
    return count


def _wait_ready(url: str) -> None:
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=10):
                return
        except urllib.error.HTTPError:  # any other failure: the server has ended
            time.sleep(0.1)
    raise TimeoutError("the server does not get ready")
