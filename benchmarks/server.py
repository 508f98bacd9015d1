# SPDX-License-Identifier: Apache-2.0
"""`fullbeam serve` beside llama.cpp's llama-server: the same GGUF file, prompts and clients.

Both servers run; each sleeps while the other answers, and they take turns in each round. Clients
ask for one completion after the other, over new connections, and no prompt is asked twice of the
same server. Rates are medians of the rounds [lowest-highest], latencies are of all requests, and
ratios above 1 mean that fullbeam is better. `%same`: equal greedy texts.
"""

from __future__ import annotations

import argparse
import http.client
import json
import shlex
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import typing
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from benchmarks import harness, peers
from fullbeam import _core
from fullbeam.bench import spread
from fullbeam.models.gguf import GgufFile
from fullbeam.models.tokenizer import Tokenizer

PROMPT_TOKENS = 200
MAX_TOKENS = 32
CODE = [Path(module.__file__).read_text() for module in (argparse, tarfile, typing)]
LLAMA_OPTIONS = "--parallel {clients} --ctx-size {context} --flash-attn off --no-webui"
WARM_UP = 4  # requests at once
LIMIT_S = 120.0  # for a server to get ready, and for an answer


class Server:
    """A server in a process of its own, ready once entered."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
        self.name = name
        self.command = list(command)
        self.rates: list[float] = []  # requests/s of each round
        self.latencies: list[list[float]] = []  # seconds, of each round
        self.texts: list[str] = []

    def __enter__(self) -> Server:
        self._log = tempfile.TemporaryFile()
        command = [*self.command, "--port", str(self.port)]
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log)
        self.pid = self._process.pid
        try:
            self._wait_ready()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        self._process.kill()
        self._log.close()

    def _wait_ready(self) -> None:
        until = time.monotonic() + LIMIT_S
        while time.monotonic() < until and self._process.poll() is None:
            with suppress(OSError):  # not listening yet
                if self._send("GET", "/health")[0] == 200:
                    return
            time.sleep(0.1)
        self._log.seek(0)
        log = self._log.read()[-2000:].decode(errors="replace")
        raise RuntimeError(f"server: {self.name} does not get ready:\n{log}")

    def _send(self, method: str, path: str, body: str | None = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT_S)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def complete(self, prompt: str) -> tuple[float, str]:
        """Return the seconds that a completion took, and its text."""
        fields = {"prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True}
        begin = time.perf_counter()
        status, answer = self._send("POST", "/v1/completions", json.dumps(fields))
        elapsed = time.perf_counter() - begin
        if status != 200 or answer["usage"]["completion_tokens"] != MAX_TOKENS:
            raise RuntimeError(f"server: {self.name} answers {status} {answer}")
        return elapsed, answer["choices"][0]["text"]

    def take(self, prompts: Sequence[str], clients: int) -> None:
        """Measure a round."""
        begin = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            try:
                answers = list(pool.map(self.complete, prompts))
            except BaseException:
                self._process.kill()  # or the pool would wait for the answers under way
                raise
        self.rates.append(len(prompts) / (time.perf_counter() - begin))
        self.latencies.append([elapsed for elapsed, _ in answers])
        self.texts += [text for _, text in answers]


def cut_prompts(model: Path, count: int) -> list[str]:
    """Return consecutive pieces of code of about PROMPT_TOKENS tokens."""
    with GgufFile.open(model) as file:
        tokenizer = Tokenizer.from_gguf(file)
    ids = [
        token_id for text in CODE for token_id in tokenizer.encode(text, add_special_tokens=False)
    ]
    starts = range(0, len(ids) - PROMPT_TOKENS + 1, PROMPT_TOKENS)[:count]
    if len(starts) < count:
        raise ValueError(f"server: there is code for {len(starts)} prompts only, not {count}")
    return [tokenizer.decode(ids[start : start + PROMPT_TOKENS]) for start in starts]


def measure(servers: Sequence[Server], prompts: Sequence[str], args: argparse.Namespace) -> float:
    """Take all rounds; return the percentage of processor time that others used meanwhile."""
    for server in servers:
        server.take(prompts[:WARM_UP], WARM_UP)
        server.rates, server.latencies, server.texts = [], [], []
    core_s = other_s = 0.0
    for idx in range(args.rounds):
        first = WARM_UP + idx * args.requests
        for server in servers[:: -1 if idx % 2 else 1]:
            begin = time.perf_counter()
            before = [peers.cpu_s(), peers.cpu_s(server.pid), time.process_time()]
            server.take(prompts[first : first + args.requests], args.clients)
            after = [peers.cpu_s(), peers.cpu_s(server.pid), time.process_time()]
            used = np.subtract(after, before)
            core_s += (time.perf_counter() - begin) * _core.num_physical_cores()
            other_s += used[0] - used[1:].sum()
        sys.stderr.write(f"round {idx + 1} of {args.rounds}\n")
    return 100 * other_s / core_s


def report(servers: Sequence[Server]) -> list[dict[str, Any]]:
    """Return a row for each server; the first one is fullbeam."""
    rows = []
    mine = servers[0]
    mine_p50, mine_p99 = np.percentile(mine.latencies, [50, 99])
    for server in servers:
        p50, p99 = np.percentile(server.latencies, [50, 99])
        row = {
            "server": server.name,
            "requests/s": spread(server.rates),
            "p50 s": float(p50),
            "p99 s": float(p99),
        }
        if server is not mine:
            ratios = [a / b for a, b in zip(mine.rates, server.rates, strict=True)]
            same = [a == b for a, b in zip(mine.texts, server.texts, strict=True)]
            row |= {
                "ratio requests/s": spread(ratios),
                "ratio p50": float(p50 / mine_p50),
                "ratio p99": float(p99 / mine_p99),
                "%same": 100 * float(np.mean(same)),
            }
        rows.append(row)
    return rows


def main(argv: list[str]) -> int:
    """Run `python -m benchmarks server`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks server", description=__doc__)
    parser.add_argument("model", type=Path, help="GGUF file")
    parser.add_argument("--llama-server", required=True, help="llama.cpp's server")
    parser.add_argument(
        "--llama-options",
        action="append",
        help=f"instead of `{LLAMA_OPTIONS}`; given several times: all of them, side by side",
    )
    parser.add_argument("--rounds", type=int, default=3, help="after the warm-up; default: 3")
    parser.add_argument("--requests", type=int, default=32, help="of a round; default: 32")
    parser.add_argument("--clients", type=int, default=16, help="at once; default: 16")
    parser.add_argument("--threads", type=int, default=_core.num_physical_cores())
    parser.add_argument("--json", type=Path, help="write the rows as JSON lines")
    args = parser.parse_args(argv)
    if min(args.rounds, args.requests, args.clients, args.threads) < 1 or not args.model.is_file():
        parser.error("the numbers must be at least 1, and MODEL a GGUF file")
    prompts = cut_prompts(args.model, WARM_UP + args.rounds * args.requests)
    common = [str(args.model), "--threads", str(args.threads)]
    servers = [Server("fullbeam", [sys.executable, "-m", "fullbeam", "serve", *common])]
    context = 2 * (PROMPT_TOKENS + MAX_TOKENS) * args.clients
    for idx, options in enumerate(args.llama_options or [LLAMA_OPTIONS]):
        name = f"llama.cpp {idx + 1}" if idx else "llama.cpp"
        words = shlex.split(options.format(clients=args.clients, context=context))
        servers.append(Server(name, [args.llama_server, "--model", *common, *words]))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the servers, too
    with ExitStack() as stack:
        for server in servers:
            stack.enter_context(server)
        other = measure(servers, prompts, args)
    head = harness.environment(args.threads)
    head |= {"cores": _core.num_physical_cores(), "model": args.model.name, "rounds": args.rounds}
    head |= {"clients": args.clients, "requests": args.requests, "prompt_tokens": PROMPT_TOKENS}
    head |= {"max_tokens": MAX_TOKENS, "%cpu_others": other}
    for server in servers:
        head[server.name] = " ".join(Path(word).name for word in server.command)
    rows = report(servers)
    for name, value in head.items():
        text = f"{value:.4g}" if isinstance(value, float) else value
        sys.stdout.write(f"{name}: {text}\n")
    sys.stdout.write("\n" + peers.table(rows))
    if other > 3:
        sys.stdout.write("\nOther processes used the processors: these are no numbers to quote.\n")
    if args.json:
        harness.write(args.json, head, rows)
    return 0
