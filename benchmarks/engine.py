# SPDX-License-Identifier: Apache-2.0
"""The whole engine on a model of random weights: tokens per second by rows, beams, first token.

Speed does not hang on what the weights are. `%floor` is the time in which the memory could read the
weights once, over the time of a step; on a GPU `%busy` is the share of a step in which a kernel
runs, the rest being gaps that the host leaves.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks import harness
from fullbeam import CompletionParams, Engine, _core
from fullbeam.bench import Ceilings
from fullbeam.engine.device import Device, choose_device
from fullbeam.models.config import DecoderConfig, LayerWeights, Linear, Norm, Rope, Weights
from fullbeam.models.decoder import Decoder

COLUMNS = ["what", "median", "low", "high", "unit", "%floor", "%busy"]
PROMPT_TOKENS, NEW_TOKENS = 200, 32
SHAPES = {  # vocabulary, hidden, layers, query heads, KV heads, head size, MLP, tied embedding
    "8b": (128256, 4096, 32, 32, 8, 128, 14336, False),
    "0.5b": (151936, 896, 24, 14, 2, 64, 4864, True),
    "tiny": (320, 64, 2, 4, 2, 16, 96, True),
}


class Letters:
    """A tokenizer of as many tokens as wanted."""

    bos_id = None
    eos_ids: frozenset[int] = frozenset()
    infill = None
    backend = SimpleNamespace(id_to_token=lambda idx: None)

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True
    ) -> list[int]:
        return [*text.encode()]

    def token_bytes(self, token_id: int) -> bytes:
        return b"%d " % token_id

    def all_token_bytes(self) -> list[bytes]:
        return [*map(self.token_bytes, range(self.vocab_size))]


def random_decoder(shape: str, device: Device, context: int) -> Decoder:
    """A decoder of Llama's kind."""
    vocab, hidden, num_layers, num_q, num_kv, dim, ffn, is_tied = SHAPES[shape]

    def matrix(rows: int, cols: int) -> Any:
        if device.name == "cuda":
            import torch

            dtype = getattr(torch, device.dtype)
            where = device.zeros((0,), device.dtype).device
            return torch.randn((rows, cols), dtype=dtype, device=where).mul_(cols**-0.5)
        rng = np.random.default_rng(rows)
        values = rng.standard_normal((rows, cols), np.float32) * np.float32(cols**-0.5)
        return device.pack(
            [(values.reshape(-1).view(np.uint8), "F32", (rows, cols))], largest_only=False
        )

    def norm() -> Norm:
        return Norm(device.upload(np.ones(hidden, np.float32)))

    inv_freq = (10000.0 ** -np.arange(0, 1, 2 / dim)).astype(np.float32)
    config = DecoderConfig(
        vocab_size=vocab, context_len=context, hidden_size=hidden, num_layers=num_layers,
        num_q_heads=num_q, num_kv_heads=num_kv, head_dim=dim, ffn_size=ffn,
        ropes=(Rope(inv_freq),) * num_layers, windows=(0,) * num_layers,
        attention_scale=dim**-0.5, norm_eps=1e-6,
    )  # fmt: skip
    with device.active():
        layers = tuple(
            LayerWeights(
                attention_norm=norm(),
                qkv=Linear(matrix((num_q + 2 * num_kv) * dim, hidden)),
                attention_out=Linear(matrix(hidden, num_q * dim)),
                ffn_norm=norm(),
                up=Linear(matrix(2 * ffn, hidden)),
                down=Linear(matrix(hidden, ffn)),
            )
            for _ in range(num_layers)
        )
        embedding = matrix(vocab, hidden)
        head = embedding if is_tied else matrix(vocab, hidden)
        weights = Weights(embedding=embedding, layers=layers, output_norm=norm(), head=head)
        return Decoder(config, weights, device=device)


def read_bytes(shape: str, device: Device) -> int:
    """Bytes of weights that a step reads."""
    vocab, hidden, num_layers, num_q, num_kv, dim, ffn, _ = SHAPES[shape]
    layer = (2 * num_q + 2 * num_kv) * dim * hidden + 3 * ffn * hidden
    size = 4 if device.dtype == "float32" else 2
    return size * (num_layers * layer + vocab * hidden)


class Bench:
    """One engine, fresh prompts for every measurement."""

    def __init__(self, shape: str, device: Device, max_rows: int) -> None:
        context = 1024
        self.device = device
        self.decoder = random_decoder(shape, device, context)
        self.vocab_size = self.decoder.config.vocab_size
        self._rng = np.random.default_rng(0)
        self.engine = Engine(
            self.decoder,
            Letters(self.vocab_size),
            context=context,
            max_rows=max_rows,
            num_pages=max_rows * (PROMPT_TOKENS + 2 * NEW_TOKENS) // 16 + 64,
            token_budget=max(512, max_rows),
            draft_tokens=0,
        )

    def submit(self, max_tokens: int, **fields: Any) -> Any:
        ids = self._rng.integers(0, self.vocab_size, PROMPT_TOKENS).tolist()
        params = CompletionParams(max_tokens=max_tokens, ignore_eos=True, **fields)
        return self.engine.submit(ids, params, on_event=lambda event: None)

    def step_seconds(self, num_rows: int, **fields: Any) -> list[float]:
        """Of each step in which all rows decode: of so many requests, or of one with fields."""
        count = 1 if fields else num_rows
        fields = fields or {"temperature": 0.8, "top_p": 0.95}
        requests = [self.submit(NEW_TOKENS, **{"seed": i} | fields) for i in range(count)]
        times = []
        while not all(request.closed for request in requests):
            before = self.engine.stats().num_generated_tokens
            begin = time.perf_counter()
            self.engine.step()
            seconds = time.perf_counter() - begin
            if self.engine.stats().num_generated_tokens - before == num_rows:
                times.append(seconds)
        return times[2:-2]  # without those beside a prompt or with nothing started behind them

    def first_token_seconds(self) -> float:
        """From a prompt to its first token."""
        request = self.submit(1, temperature=0.0)
        begin = time.perf_counter()
        while not request.closed:
            self.engine.step()
        return time.perf_counter() - begin

    def beam_seconds(self, width: int) -> float:
        """Of a whole request."""
        request = self.submit(NEW_TOKENS, beam_size=width)
        begin = time.perf_counter()
        while not request.closed:
            self.engine.step()
        return time.perf_counter() - begin

    def busy_share(self, num_rows: int) -> float:
        """Of the time of steps in which kernels run: on a GPU."""
        from torch.profiler import ProfilerActivity, profile

        requests = [self.submit(NEW_TOKENS, temperature=0.8, seed=i) for i in range(num_rows)]
        while self.engine.stats().num_generated_tokens % NEW_TOKENS < 4:
            self.engine.step()
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            begin = time.perf_counter()
            for _ in range(16):
                self.engine.step()
            seconds = time.perf_counter() - begin
        while not all(request.closed for request in requests):
            self.engine.step()
        busy = sum(event.self_device_time_total for event in profiled.key_averages())
        return busy / 1e6 / seconds


def transformers_beam_seconds(shape: str, rounds: int, width: int) -> list[float]:
    """Of a whole request by transformers' generate, on a model of the same sizes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    vocab, hidden, num_layers, num_q, num_kv, dim, ffn, is_tied = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, num_hidden_layers=num_layers,
        num_attention_heads=num_q, num_key_value_heads=num_kv, head_dim=dim, intermediate_size=ffn,
        tie_word_embeddings=is_tied, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).bfloat16().eval()
    times = []
    for idx in range(rounds + 1):
        ids = torch.randint(1, vocab, (1, PROMPT_TOKENS), device="cuda")
        torch.cuda.synchronize()
        begin = time.perf_counter()
        model.generate(
            ids, num_beams=width, do_sample=False, max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
        )  # fmt: skip
        torch.cuda.synchronize()
        if idx:
            times.append(time.perf_counter() - begin)
    return times


def measure(
    shape: str, device: Device, counts: list[int], rounds: int, bytes_per_s: float
) -> Iterator[dict[str, Any]]:
    """Rows of the table as they come; turns of what is compared alternate."""
    bench = Bench(shape, device, max(8, *counts))
    floor = read_bytes(shape, device) / bytes_per_s
    for count in counts:
        bench.step_seconds(count)
        times = [statistics.median(bench.step_seconds(count)) for _ in range(rounds)]
        row = summary(f"{count} rows", [count / t for t in times], "tokens/s")
        row["%floor"] = 100 * floor / statistics.median(times)
        if device.name == "cuda" and count in (1, 8):
            row["%busy"] = 100 * bench.busy_share(count)
        yield row
    bench.first_token_seconds()
    times = [bench.first_token_seconds() for _ in range(rounds)]
    yield summary(f"first token, {PROMPT_TOKENS}-token prompt", [1e3 * t for t in times], "ms")
    ratios = []
    for idx in range(rounds + 1):
        drawn = statistics.median(bench.step_seconds(8, n=8, seed=idx))
        beams = statistics.median(bench.step_seconds(8, beam_size=8))
        ratios.append(beams / drawn)
    yield summary("step of 8 beams / of 8 drawn rows", ratios[1:], "")
    times = [bench.beam_seconds(8) for _ in range(rounds)]
    yield summary(f"8 beams, {PROMPT_TOKENS} + {NEW_TOKENS} tokens", times, "s")
    if device.name == "cuda" and importlib.util.find_spec("transformers"):
        theirs = transformers_beam_seconds(shape, rounds, 8)
        yield summary("the same by transformers' generate", theirs, "s")
        ratio = statistics.median(theirs) / statistics.median(times)
        yield summary("transformers / fullbeam", [ratio], "")


def summary(what: str, values: list[float], unit: str) -> dict[str, Any]:
    row: dict[str, Any] = {"what": what, "median": statistics.median(values)}
    return row | {
        "low": min(values), "high": max(values), "unit": unit, "%floor": "", "%busy": "",
    }  # fmt: skip


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks engine", description=__doc__)
    parser.add_argument("--shape", choices=[*SHAPES], default="0.5b")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rows", default="1,8", help="counts of rows, with commas between")
    parser.add_argument("--threads", type=int, default=_core.num_physical_cores())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the rows as JSON lines")
    args = parser.parse_args(argv)
    try:
        device = choose_device(args.device, args.threads)
        counts = [int(count) for count in args.rows.split(",")]
    except ValueError as error:
        parser.error(str(error))
    if args.rounds < 1 or min(counts) < 1:
        parser.error("--rounds and --rows must be at least 1")
    head = harness.environment(args.threads) | {"shape": args.shape, "rounds": args.rounds}
    if args.device == "cuda":
        from benchmarks import ops_cuda

        bytes_per_s = ops_cuda.copy_bytes_per_second()
        head |= ops_cuda.environment() | {"copy_GB/s": bytes_per_s / 1e9}
    else:
        bytes_per_s = Ceilings.measure(args.threads).read_bytes
        head |= {"read_GB/s": bytes_per_s / 1e9}
    rows = []
    for row in measure(args.shape, device, counts, args.rounds, bytes_per_s):
        sys.stderr.write(f"{row['what']}: {row['median']:.4g} {row['unit']}\n")
        rows.append(row)
        if args.json:
            harness.write(args.json, head, rows)
    sys.stdout.write(json.dumps(head) + "\n" + harness.table(rows, COLUMNS) + "\n")
    return 0
