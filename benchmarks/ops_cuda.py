# SPDX-License-Identifier: Apache-2.0
"""The ops on a GPU beside what torch offers: `python -m benchmarks ops --device cuda`.

A case makes as many input sets as fill the L2 cache several times over; one CUDA graph runs the op
on each of them, another the anchor, and the two take turns. Times are a graph's over its calls.
Anchors that can't be captured are timed without a graph, and marked so.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from fullbeam import ops

DEVICE = "cuda"
Call = Callable[[], Any]
NUM_ROUNDS = 20
COLUMNS = [
    "op", "shape", "dtype", "device", "median_us", "p10", "p90", "GB/s", "%copy", "GFLOP/s",
    "baseline", "ratio",
]  # fmt: skip
VOCAB = 131072


@dataclass(frozen=True)
class Case:
    """`make` gives a new input set's op and anchors, by name."""

    op: str
    shape: str
    dtype: str
    num_bytes: int
    make: Callable[[], tuple[Call, dict[str, Call]]]
    num_flops: int = 0
    check: Callable[[Any, Any], bool] = field(default=lambda ours, theirs: True)


def normal(*shape: int, dtype: str = "bfloat16") -> Any:
    return torch.randn(shape, device=DEVICE, dtype=torch.float32).to(getattr(torch, dtype))


def ints(values: Any, dtype: Any = torch.int32) -> Any:
    return torch.as_tensor(values, dtype=dtype, device=DEVICE)


def close(ours: Any, theirs: Any) -> bool:
    scale = theirs.float().abs().max().item()
    return (ours.float() - theirs.float()).abs().max().item() <= 0.03 * scale + 1e-6


def rms_norm(num_tokens: int, size: int) -> Case:
    def make() -> tuple[Call, dict[str, Call]]:
        x, weight = normal(num_tokens, size), normal(size, dtype="float32")
        out, half = torch.empty_like(x), weight.bfloat16()
        theirs = lambda: torch.nn.functional.rms_norm(x, (size,), half, 1e-6)  # noqa: E731
        return lambda: ops.rms_norm(x, weight, out=out), {"torch": theirs}

    return Case("rms_norm", f"{num_tokens}x{size}", "bf16", 4 * num_tokens * size, make, 0, close)


def gated_activation(num_tokens: int, size: int) -> Case:
    def make() -> tuple[Call, dict[str, Call]]:
        x, out = normal(num_tokens, 2 * size), normal(num_tokens, size)
        gate, up = x.chunk(2, dim=1)
        theirs = lambda: torch.nn.functional.silu(gate) * up  # noqa: E731
        return lambda: ops.gated_activation(x, out=out), {"torch": theirs}

    shape = f"{num_tokens}x{size}"
    return Case("gated_activation", shape, "bf16", 6 * num_tokens * size, make, 0, close)


def rope(num_tokens: int, num_heads: int, head_dim: int) -> Case:
    def make() -> tuple[Call, dict[str, Call]]:
        x = normal(num_tokens, num_heads, head_dim)
        positions, half = ints(range(num_tokens)), head_dim // 2
        inv_freq = 10000.0 ** (-torch.arange(half, device=DEVICE, dtype=torch.float32) / half)

        def theirs() -> Any:
            angles = (positions[:, None] * inv_freq)[:, None]
            cos, sin = angles.cos(), angles.sin()
            a, b = x.float().chunk(2, dim=-1)
            return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)

        return lambda: ops.rope(x, positions, inv_freq), {"torch": theirs}

    num_bytes = 4 * num_tokens * num_heads * head_dim
    return Case("rope", f"{num_tokens}x{num_heads}x{head_dim}", "bf16", num_bytes, make)


def embedding(num_tokens: int, size: int) -> Case:
    def make() -> tuple[Call, dict[str, Call]]:
        table, ids = normal(32768, size), torch.randint(32768, (num_tokens,), device=DEVICE)
        out, narrow = normal(num_tokens, size), ids.int()
        theirs = lambda: torch.nn.functional.embedding(ids, table)  # noqa: E731
        return lambda: ops.embedding(narrow, table, out=out), {"torch": theirs}

    return Case("embedding", f"{num_tokens}x{size}", "bf16", 4 * num_tokens * size, make, 0, close)


def dequantise(kind: str, rows: int, cols: int) -> Case:
    from fullbeam import reference

    host = reference.quantize(np.random.default_rng(0).standard_normal((64, cols)), kind)
    data = np.tile(host.ravel(), rows // 64)

    def make() -> tuple[Call, dict[str, Call]]:
        device, out = torch.from_numpy(data).to(DEVICE), normal(rows, cols)
        return lambda: ops.dequantise(device, kind, (rows, cols), out=out), {}

    return Case("dequantise", f"{rows}x{cols}", kind, data.nbytes + 2 * rows * cols, make)


HEADS, KV_HEADS, ATTENTION_DIM = 32, 8, 128


def paged(lens: list[int], page_size: int) -> Any:
    """Keys and values in shuffled pages, their page table, and each as one tensor
    [num_seqs, KV_HEADS, longest, ATTENTION_DIM].
    """
    per_seq = [-(-length // page_size) for length in lens]
    order = torch.randperm(sum(per_seq), device=DEVICE)
    table = torch.full((len(lens), max(per_seq)), -1, device=DEVICE)
    for seq, mine in enumerate(order.split(per_seq)):
        table[seq, : len(mine)] = mine
    pages = [normal(len(order), KV_HEADS, page_size, ATTENTION_DIM) for _ in range(2)]
    dense = [
        some[table.clamp(min=0)].transpose(1, 2).flatten(2, 3)[:, :, : max(lens)] for some in pages
    ]
    return *pages, table.int(), *dense


def sdpa(backend: str, q: Any, keys: Any, values: Any, is_causal: bool) -> Call:
    def call() -> Any:
        with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, backend)):
            found = torch.nn.functional.scaled_dot_product_attention(
                q, keys, values, is_causal=is_causal, scale=ATTENTION_DIM**-0.5, enable_gqa=True
            )
        return found.transpose(1, 2).flatten(0, 1)

    return call


def flashinfer_decode(
    q: Any, k_pages: Any, v_pages: Any, table: Any, lens: list[int]
) -> dict[str, Call]:
    """Where its wheel is there; the plan, made on the host, is not counted."""
    if importlib.util.find_spec("flashinfer") is None:
        return {}
    page_size = k_pages.shape[2]
    per_seq = [-(-length // page_size) for length in lens]
    starts = ints(np.cumsum([0, *per_seq]))
    indices = torch.cat([row[:count] for row, count in zip(table, per_seq, strict=True)])
    last = ints([(length - 1) % page_size + 1 for length in lens])
    wrapper = importlib.import_module("flashinfer").BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(2**27, dtype=torch.uint8, device=DEVICE), "HND", use_tensor_cores=True
    )
    wrapper.plan(
        starts, indices, last, HEADS, KV_HEADS, ATTENTION_DIM, page_size,
        q_data_type=q.dtype, kv_data_type=k_pages.dtype,
    )  # fmt: skip
    return {"flashinfer": lambda: wrapper.run(q, (k_pages, v_pages))}


def attention_decode(name: str, lens: list[int], page_size: int = 64) -> Case:
    is_even = len(set(lens)) == 1

    def make() -> tuple[Call, dict[str, Call]]:
        k_pages, v_pages, table, keys, values = paged(lens, page_size)
        q, seq_lens = normal(len(lens), HEADS, ATTENTION_DIM), ints(lens)
        out, heads = torch.empty_like(q), q[:, :, None]
        anchors = flashinfer_decode(q, k_pages, v_pages, table, lens)
        if is_even:
            anchors["sdpa flash"] = sdpa("FLASH_ATTENTION", heads, keys, values, False)
            anchors["sdpa cudnn"] = sdpa("CUDNN_ATTENTION", heads, keys, values, False)
        scale = ATTENTION_DIM**-0.5
        run = lambda: ops.attention_decode(  # noqa: E731
            q, k_pages, v_pages, table, seq_lens, scale=scale, out=out
        )
        return run, anchors

    num_bytes = 4 * sum(lens) * KV_HEADS * ATTENTION_DIM
    flops = 4 * sum(lens) * HEADS * ATTENTION_DIM
    shape = f"{name} pages of {page_size}"
    return Case("attention_decode", shape, "bf16", num_bytes, make, flops, close)


def attention_decode_search(prompt_len: int, num_beams: int, page_size: int = 64) -> Case:
    """A search's beams behind one prompt; beside it each as a sequence of its own."""
    shared, own = 32, 32  # generated tokens, a slot each
    num_slots, chain_len = shared + num_beams * own, prompt_len + shared + own

    def make() -> tuple[Call, dict[str, Call]]:
        k_pages, v_pages, table, keys, values = paged([prompt_len + num_slots], page_size)
        q = normal(num_beams, HEADS, ATTENTION_DIM)
        paths = [
            [*range(shared), *range(shared + beam * own, shared + (beam + 1) * own)]
            for beam in range(num_beams)
        ]
        chains = ints([[*range(prompt_len), *(prompt_len + s for s in path)] for path in paths])
        plain = []
        plain_table = torch.arange(num_beams * -(-chain_len // page_size), device=DEVICE)
        for dense in (keys, values):
            runs = dense[0][:, chains.long()].transpose(
                0, 1
            )  # [num_beams, KV_HEADS, chain_len, ..]
            runs = torch.nn.functional.pad(runs, (0, 0, 0, -chain_len % page_size))
            plain.append(
                runs.unflatten(2, (-1, page_size)).transpose(1, 2).flatten(0, 1).contiguous()
            )
        num_words = -(-num_slots // 32)
        bits = np.zeros((num_beams, 32 * num_words), bool)
        slot_positions = np.zeros((1, 32 * num_words), np.int32)
        for beam, path in enumerate(paths):
            bits[beam, path] = True
            slot_positions[0, path] = prompt_len + np.arange(len(path))
        visible = np.packbits(bits, axis=1, bitorder="little").view(np.int32)
        slots = {
            "query_starts": ints([0, num_beams]),
            "slot_starts": ints([prompt_len]),
            "num_slots": ints([num_slots]),
            "visible": ints(visible).view(torch.uint32),
            "slot_positions": ints(slot_positions),
            "positions": ints([chain_len - 1] * num_beams),
        }
        prompt_lens, chain_lens = ints([prompt_len]), ints([chain_len] * num_beams)
        plain_table = plain_table.reshape(num_beams, -1).int()
        scale = ATTENTION_DIM**-0.5
        return (
            lambda: ops.attention_decode(
                q, k_pages, v_pages, table, prompt_lens, scale=scale, **slots
            )
        ), {
            "plain rows": lambda: ops.attention_decode(
                q, plain[0], plain[1], plain_table, chain_lens, scale=scale
            ),
            **flashinfer_decode(q, plain[0], plain[1], plain_table, [chain_len] * num_beams),
        }

    num_bytes = 4 * (prompt_len + num_slots) * KV_HEADS * ATTENTION_DIM
    flops = 4 * num_beams * chain_len * HEADS * ATTENTION_DIM
    shape = f"{num_beams} beams behind {prompt_len}"
    return Case("attention_decode", shape, "bf16", num_bytes, make, flops, close)


def attention_prefill(num_seqs: int, seq_len: int, page_size: int = 64) -> Case:
    def make() -> tuple[Call, dict[str, Call]]:
        k_pages, v_pages, table, keys, values = paged([seq_len] * num_seqs, page_size)
        q = normal(num_seqs * seq_len, HEADS, ATTENTION_DIM)
        out, lens = torch.empty_like(q), ints([seq_len] * num_seqs)
        starts = ints([idx * seq_len for idx in range(num_seqs + 1)])
        heads = q.unflatten(0, (num_seqs, seq_len)).transpose(1, 2)
        scale = ATTENTION_DIM**-0.5
        run = lambda: ops.attention_prefill(  # noqa: E731
            q, k_pages, v_pages, table, lens, starts, scale=scale, out=out
        )
        return run, {
            "sdpa flash": sdpa("FLASH_ATTENTION", heads, keys, values, True),
            "sdpa cudnn": sdpa("CUDNN_ATTENTION", heads, keys, values, True),
        }

    num_bytes = 4 * num_seqs * seq_len * (KV_HEADS + HEADS) * ATTENTION_DIM
    flops = 2 * num_seqs * seq_len**2 * HEADS * ATTENTION_DIM
    shape = f"{num_seqs}x{seq_len}"
    return Case("attention_prefill", shape, "bf16", num_bytes, make, flops, close)


def logprobs(num_rows: int) -> Case:
    def make() -> tuple[Call, dict[str, Call]]:
        logits, ids = 3 * normal(num_rows, VOCAB, dtype="float32"), ints([0] * num_rows)
        theirs = lambda: logits.log_softmax(dim=1).topk(5, dim=1)  # noqa: E731
        return lambda: ops.logprobs(logits, ids, num_top=5), {"torch": theirs}

    return Case("logprobs", f"{num_rows}x{VOCAB} top 5", "f32", 4 * num_rows * VOCAB, make)


def sample(num_rows: int, temperature: float, top_k: int, top_p: float) -> Case:
    def make() -> tuple[Call, dict[str, Call]]:
        logits = 3 * normal(num_rows, VOCAB, dtype="float32")
        options = {
            "temperature": torch.full((num_rows,), temperature, device=DEVICE),
            "top_k": ints([top_k] * num_rows),
            "top_p": torch.full((num_rows,), top_p, device=DEVICE),
            "min_p": torch.zeros(num_rows, device=DEVICE),
            "seeds": ints(range(num_rows), torch.int64).view(torch.uint64),
            "counters": ints(np.zeros((num_rows, 3))).view(torch.uint32),
        }

        def by_sort() -> Any:
            values, ids = (logits / temperature).sort(dim=1, descending=True)
            if top_k:
                values[:, top_k:] = float("-inf")
            probs = values.softmax(dim=1)
            probs = probs * (probs.cumsum(dim=1) - probs < top_p)
            return ids.gather(1, probs.multinomial(1))

        def by_top_k() -> Any:
            values, ids = (logits / temperature).topk(top_k, dim=1)
            probs = values.softmax(dim=1)
            probs = probs * (probs.cumsum(dim=1) - probs < top_p)
            return ids.gather(1, probs.multinomial(1))

        if temperature == 0:
            return lambda: ops.sample(logits, **options), {"argmax": lambda: logits.argmax(1)}
        anchors = {"sort": by_sort} | ({"topk": by_top_k} if top_k else {})
        return lambda: ops.sample(logits, **options), anchors

    shape = f"{num_rows}x{VOCAB} t={temperature:g} k={top_k} p={top_p:g}"
    return Case("sample", shape, "f32", 4 * num_rows * VOCAB, make)


def beam_step(num_requests: int, beam_size: int) -> Case:
    num_beams = num_requests * beam_size

    def make() -> tuple[Call, dict[str, Call]]:
        logits = 3 * normal(num_beams, VOCAB, dtype="float32")
        sums = torch.randn((num_beams, 2), device=DEVICE, dtype=torch.float64)
        arguments = {
            "beam_rows": ints(range(num_beams)),
            "sums": sums,
            "group_starts": ints([idx * beam_size for idx in range(num_requests + 1)]),
            "request_starts": ints(range(num_requests + 1)),
            "beam_sizes": ints([beam_size] * num_requests),
            "diversity_strengths": torch.zeros(num_requests, device=DEVICE),
        }

        def theirs() -> Any:  # as transformers' generate does it
            scores = logits.log_softmax(dim=1) + sums[:, :1].float()
            values, places = scores.reshape(num_requests, -1).topk(2 * beam_size, dim=1)
            return values, places // VOCAB, places % VOCAB

        return lambda: ops.beam_step(logits, **arguments), {"torch": theirs}

    shape = f"{num_requests} of {beam_size} beams x{VOCAB}"
    return Case("beam_step", shape, "f32", 4 * num_beams * VOCAB, make)


def cases() -> list[Case]:
    return [  # those first that are asked for most, since time may run out
        *(
            attention_decode(f"{n}x{length}", [length] * n)
            for n, length in ((1, 1024), (1, 8192), (8, 4096), (64, 4096))
        ),
        attention_decode("8x4096", [4096] * 8, 16),
        attention_decode("64 of 128..32768", [int(128 * 2 ** (i / 63 * 8)) for i in range(64)]),
        *(attention_decode_search(*shape) for shape in ((2048, 8), (4096, 8), (4096, 32))),
        *(attention_prefill(*shape) for shape in ((1, 1024), (1, 4096), (4, 4096))),
        *(logprobs(n) for n in (1, 64)),
        *(
            sample(n, *knobs)
            for n in (1, 8, 64, 256)
            for knobs in ((0.0, 0, 1.0), (0.8, 0, 1.0), (0.8, 50, 0.9), (0.8, 0, 0.9))
        ),
        *(beam_step(*shape) for shape in ((1, 4), (8, 8))),
        *(rms_norm(n, 4096) for n in (1, 8, 4096)),
        *(gated_activation(n, 14336) for n in (1, 8, 2048)),
        *(rope(n, 40, 128) for n in (1, 8, 4096)),
        *(embedding(n, 4096) for n in (8, 4096)),
        *(dequantise(kind, 4096, 4096) for kind in ("Q8_0", "Q4_K", "Q6_K")),
    ]


class Graphs:
    """Runs calls as one CUDA graph, and times it."""

    def together(self, calls: list[Call]) -> Call:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for call in calls[:2]:
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay

    def time_us(self, run: Call) -> float:
        return time_us(run)

    def num_sets(self, num_bytes: int) -> int:
        """Enough for three times the L2 cache."""
        l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        return max(4, min(32, -(-3 * l2_bytes // num_bytes)))


def time_us(run: Call) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3


def copy_bytes_per_second() -> float:
    source = torch.empty(2**31, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / min(time_us(lambda: target.copy_(source)) for _ in range(8)) * 1e6


def measure(case: Case, peak: float, clock: Any) -> dict[str, Any]:
    """A row of the table; anchors that this torch or device doesn't run are left out of it."""
    num_sets = clock.num_sets(case.num_bytes)
    sets = [case.make() for _ in range(num_sets)]
    found = sets[0][0]()
    left_out = {}
    for name, anchor in sets[0][1].items():
        try:
            theirs = anchor()
        except (NotImplementedError, RuntimeError) as error:
            left_out[name] = first_line(error)
            continue
        if not case.check(found, theirs):
            raise AssertionError(f"ours and {name} differ")
    runs = {"ours": clock.together([ours for ours, _ in sets])}
    for name in sets[0][1].keys() - left_out.keys():
        calls = [anchors[name] for _, anchors in sets]
        try:
            runs[name] = clock.together(calls)
        except RuntimeError:
            runs[name + " (eager)"] = lambda calls=calls: [call() for call in calls]
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(NUM_ROUNDS):
        for name, run in runs.items():
            times[name].append(clock.time_us(run) / num_sets)
    median = statistics.median(times["ours"])
    best = min(
        (n for n in runs if n != "ours"), key=lambda n: statistics.median(times[n]), default=""
    )
    return {
        "op": case.op,
        "shape": case.shape,
        "dtype": case.dtype,
        "device": "cuda",
        "median_us": median,
        "p10": float(np.percentile(times["ours"], 10)),
        "p90": float(np.percentile(times["ours"], 90)),
        "GB/s": case.num_bytes / median / 1e3,
        "%copy": 100 * case.num_bytes / median * 1e6 / peak,
        "baseline": f"{best} {statistics.median(times[best]):.4g}" if best else "-",
        "ratio": statistics.median(times[best]) / median if best else float("nan"),
        "GFLOP/s": case.num_flops / median / 1e3,
        "medians_us": {name: statistics.median(taken) for name, taken in times.items()},
        "left_out": left_out,
    }


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def report(
    cases: list[Case], head: dict[str, Any], peak: float, clock: Any, out: Path | None
) -> int:
    """Measures the cases and returns how many failed. The file has each row as soon as it is
    there; the table comes at the end, however that comes about.
    """
    rows: list[dict[str, Any]] = []
    num_failed = 0
    with open(out or os.devnull, "w", encoding="utf-8") as file:
        file.write(json.dumps(head) + "\n")
        try:
            for case in cases:
                name = f"{case.op} {case.shape}"
                try:
                    row = measure(case, peak, clock)
                except Exception as error:
                    num_failed += 1
                    row = {"op": case.op, "shape": case.shape, "error": first_line(error)}
                    sys.stderr.write(f"benchmarks: {name} failed: {row['error']}\n")
                else:
                    rows.append(row)
                    sys.stderr.write(f"{name}: {row['median_us']:.4g} us, {row['ratio']:.3g}x\n")
                file.write(json.dumps(row) + "\n")
                file.flush()
        finally:
            sys.stdout.write(json.dumps(head) + "\n" + harness.table(rows, COLUMNS) + "\n")
            sys.stdout.flush()
    return num_failed


def environment() -> dict[str, Any]:
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
    asked = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {"gpu": asked.stdout.strip(), "torch": torch.__version__, "cuda": torch.version.cuda}
