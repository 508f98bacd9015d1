# SPDX-License-Identifier: Apache-2.0
"""How close the logits of a file are to those of float32 arithmetic on its dequantised weights.

`python -m benchmarks quality MODEL.gguf [--peers-python PATH] [--json FILE]`: transformers is the
reference, llama.cpp the yardstick. All three get the token ids of fullbeam's tokenizer. Both others
run in the interpreter `--peers-python` (this one unless given), which needs torch, transformers and
gguf; llama.cpp is left out where `llama-cpp-python` is not installed.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import harness
from benchmarks.quality_texts import TEXTS
from fullbeam import _core
from fullbeam.engine.batch import Batch
from fullbeam.engine.memory import PAGE_SIZE
from fullbeam.models import OpenModel, open_model

FloatArray = npt.NDArray[np.float32]

COLUMNS = [
    "runtime",
    "mean_kl",
    "median_kl",
    "p99_kl",
    "max_kl",
    "same_greedy",
    "clear",
    "same_where_clear",
]
ROWS_AT_ONCE = 32  # of the vocabulary's size in float64


class Peer:
    """Another runtime in its own process, see `quality_peer.py`; `versions` is None if absent."""

    def __init__(self, python: Path, runtime: str, model: Path, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._process = subprocess.Popen(
            [python, Path(__file__).with_name("quality_peer.py"), runtime, model],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        head = json.loads(self._out.readline() or b"{}")
        if not head:
            raise RuntimeError(f"{runtime} failed in {python}, see above")
        self.versions: dict[str, str] | None = head.get("versions")

    @property
    def _out(self) -> Any:
        return self._process.stdout

    def logits(self, ids: list[int]) -> FloatArray:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(ids).encode() + b"\n")
        values = np.empty((len(ids), self._vocab_size), np.float32)
        rest = values.data.cast("B")
        while rest and (count := self._out.readinto(rest)):
            rest = rest[count:]
        if rest:
            raise RuntimeError(f"{self._process.args!r} ended early, see above")
        return values

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._out.close()


def fullbeam_logits(model: OpenModel, max_tokens: int) -> Callable[[list[int]], FloatArray]:
    """All positions of a text in one step, as the engine would lay it out."""
    num_pages = -(-max_tokens // PAGE_SIZE)
    kv = model.decoder.allocate_kv(num_pages, PAGE_SIZE)

    def run(ids: list[int]) -> FloatArray:
        span = np.arange(len(ids))
        batch = Batch(
            token_ids=np.array(ids, np.int32),
            positions=span.astype(np.int32),
            slots=span,
            query_starts=np.array([0, len(ids)], np.int32),
            num_decode=0,
            page_table=np.arange(num_pages, dtype=np.int32)[None],
            seq_lens=np.array([len(ids)], np.int32),
            logit_rows=span.astype(np.int32),
        )
        return model.decoder.forward(batch, kv)

    return run


@dataclass
class Tally:
    """Positions of one runtime against the reference."""

    kl: list[float] = field(default_factory=list)
    is_same: list[bool] = field(default_factory=list)  # the greedy token

    def add(self, reference: FloatArray, other: FloatArray) -> None:
        for start in range(0, len(reference), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            p, q = _log_softmax(reference[rows]), _log_softmax(other[rows])
            self.kl += (np.exp(p) * (p - q)).sum(axis=1).tolist()
        self.is_same += (reference.argmax(axis=1) == other.argmax(axis=1)).tolist()

    def row(self, runtime: str, gaps: npt.NDArray[np.float64], noise: float) -> dict[str, Any]:
        is_clear = gaps >= noise
        same = np.array(self.is_same)
        return {
            "runtime": runtime,
            "mean_kl": float(np.mean(self.kl)),
            "median_kl": float(np.median(self.kl)),
            "p99_kl": float(np.percentile(self.kl, 99)),
            "max_kl": max(self.kl),
            "same_greedy": float(same.mean()),
            "clear": int(is_clear.sum()),
            "same_where_clear": int(same[is_clear].sum()),
        }


def _log_softmax(logits: FloatArray) -> npt.NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return wide


def _top2_gaps(logits: FloatArray) -> list[float]:
    top = np.partition(logits, -2, axis=1)[:, -2:]
    return [float(gap) for gap in top[:, 1] - top[:, 0]]


def measure(
    model: Path, python: Path, threads: int, say: Callable[[str], object]
) -> dict[str, Any]:
    """Compare on all texts; returns what the JSON file holds."""
    opened = open_model(model, threads=threads)
    texts = {name: opened.tokenizer.encode(text) for name, text in TEXTS.items()}
    ours = fullbeam_logits(opened, max(map(len, texts.values())))
    vocab_size = opened.decoder.config.vocab_size
    tallies = {"fullbeam": Tally()}
    gaps: list[float] = []
    with (
        Peer(python, "transformers", model, vocab_size) as reference,
        Peer(python, "llama.cpp", model, vocab_size) as yardstick,
    ):
        if reference.versions is None:
            raise RuntimeError(f"transformers and torch must be installed for {python}")
        if yardstick.versions is None:
            say(f"llama-cpp-python is not installed for {python}: its row is left out\n")
        else:
            tallies["llama.cpp"] = Tally()
        for name, ids in texts.items():
            expected = reference.logits(ids)
            gaps += _top2_gaps(expected)
            tallies["fullbeam"].add(expected, ours(ids))
            if yardstick.versions is not None:
                tallies["llama.cpp"].add(expected, yardstick.logits(ids))
            means = (f"{key} {np.mean(t.kl[-len(ids) :]):.2e}" for key, t in tallies.items())
            say(f"{name}: {len(ids)} tokens, mean KL {', '.join(means)}\n")
        versions = {**reference.versions, **(yardstick.versions or {})}
    # KL is half the variance of a runtime's logit errors, so a difference of two logits is off by
    # about 2 sqrt(KL): six times that is clear.
    noise = 12 * math.sqrt(min(float(np.mean(tally.kl)) for tally in tallies.values()))
    head = harness.environment(threads) | versions | {"model": model.name, "positions": len(gaps)}
    rows = [tally.row(name, np.array(gaps), noise) for name, tally in tallies.items()]
    return {"environment": head, "clear_above": noise, "rows": rows}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this suite."""
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument(
        "--peers-python",
        type=Path,
        default=Path(sys.executable),
        help="interpreter that has torch, transformers, gguf and, if wanted, llama-cpp-python",
    )
    parser.add_argument("--threads", type=int, default=_core.num_physical_cores())
    parser.add_argument("--json", type=Path, help="write the figures here")


def run(args: argparse.Namespace) -> int:
    """Print the table; returns 1 where fullbeam is further from the reference than llama.cpp."""
    result = measure(args.model, args.peers_python, args.threads, sys.stderr.write)
    rows = result["rows"]
    out = sys.stdout
    out.write(json.dumps(result["environment"]) + "\n" + harness.table(rows, COLUMNS) + "\n")
    out.write(
        f"clear: the reference's two largest logits are {result['clear_above']:.2f} or more apart\n"
    )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(len(rows) > 1 and rows[0]["mean_kl"] > rows[1]["mean_kl"])


def main(argv: list[str]) -> int:
    """Run this suite alone."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks quality", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args(argv))
