# SPDX-License-Identifier: Apache-2.0
"""One case per op and shape: what runs, what it is compared with, and the bytes that it must move.

The shapes are those of Gemma 3 270M: decode of 1 and of 8 sequences, a 512-token prompt.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from benchmarks.harness import Cache, median_us
from fullbeam import ops, reference

torch: Any = __import__("torch") if importlib.util.find_spec("torch") else None
HIDDEN, FEED_FORWARD, HEAD_DIM, NUM_HEADS, VOCAB = 640, 2048, 256, 4, 262144
rng = np.random.default_rng(0)


@dataclass(frozen=True)
class Case:
    run: Callable[[], Any]
    baseline: Callable[[], Any]
    num_bytes: int  # that must be read and written once
    num_ops: int = 0  # multiplications and additions
    dtype: str = "float32"
    check: bool = True  # the two agree to a few per cent (a quantised weight's error)
    baseline_name: str = "torch" if torch else "numpy"
    is_int8: bool = False  # the products among them are of int8


def normal(*shape: int) -> Any:
    return rng.standard_normal(shape, np.float32)


def tensor(array: Any) -> Any:
    return torch.from_numpy(array) if torch else array


def dequantise(rows: int, kind: str) -> Case:
    data = reference.quantize(normal(rows, 1024), kind)
    out = np.empty((rows, 1024), np.float32)
    return Case(
        lambda: ops.dequantise(data, kind, (rows, 1024), out=out),
        lambda: reference.dequantize(data, kind, (rows, 1024)),
        data.nbytes + out.nbytes,
        dtype=kind,
        baseline_name="numpy",
    )


def embedding(num_tokens: int) -> Case:
    data = reference.quantize(normal(4096, HIDDEN), "Q8_0")
    table = ops.pack_weight([(data, "Q8_0", (4096, HIDDEN))])
    dense = reference.dequantize(data, "Q8_0", (4096, HIDDEN))
    ids = rng.integers(0, 4096, num_tokens).astype(np.int32)
    num_bytes = int(num_tokens * HIDDEN * (34 / 32 + 4))
    return Case(lambda: ops.embedding(ids, table), lambda: dense[ids], num_bytes, dtype="Q8_0")


def rms_norm(num_tokens: int) -> Case:
    x, weight = normal(num_tokens, HIDDEN), normal(HIDDEN)
    tx, tw = tensor(x), tensor(weight)

    def baseline() -> Any:
        if torch:
            return torch.nn.functional.rms_norm(tx, (HIDDEN,), tw, 1e-6)
        return x / np.sqrt((x * x).mean(axis=1, keepdims=True) + np.float32(1e-6)) * weight

    return Case(lambda: ops.rms_norm(x, weight), baseline, 2 * x.nbytes, 4 * x.size)


def layer_norm(num_tokens: int) -> Case:
    x, weight, bias = normal(num_tokens, HIDDEN), normal(HIDDEN), normal(HIDDEN)
    tx, tw, tb = tensor(x), tensor(weight), tensor(bias)

    def baseline() -> Any:
        if torch:
            return torch.nn.functional.layer_norm(tx, (HIDDEN,), tw, tb, 1e-5)
        centred = x - x.mean(axis=1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5) * weight + bias

    return Case(lambda: ops.layer_norm(x, weight, bias), baseline, 2 * x.nbytes, 7 * x.size)


def linear(num_tokens: int, kind: str, largest_only: bool = False) -> Case:
    """With `largest_only` a head, beside its whole product; one row matches each token."""
    shape = (VOCAB, HIDDEN) if largest_only else (FEED_FORWARD, 1024)
    values, x = normal(*shape), normal(num_tokens, shape[1])
    data = reference.quantize(values, kind)
    parts = [(data, kind, shape)]
    weight = ops.pack_weight(parts, largest_only=largest_only)
    num_bytes = data.nbytes - weight.low_bytes + x.nbytes + num_tokens * shape[0] * 4
    flops = 2 * num_tokens * shape[0] * shape[1]
    if largest_only:
        x += values[rng.choice(VOCAB, num_tokens)] / 3
        whole = ops.pack_weight(parts)
        return Case(
            lambda: ops.linear(x, weight, largest_only=True),
            lambda: ops.linear(x, whole),
            num_bytes,
            flops,
            is_int8=True,
            dtype=kind,
            check=False,
            baseline_name="whole",
        )
    dense, tx = tensor(reference.dequantize(data, kind, shape).T.copy()), tensor(x)
    return Case(
        lambda: ops.linear(x, weight),
        lambda: tx @ dense,
        num_bytes,
        flops,
        is_int8=kind not in ("F32", "F16", "BF16"),
        dtype=kind,
    )


def rope(num_tokens: int) -> Case:
    x = normal(num_tokens, NUM_HEADS, HEAD_DIM)
    positions = np.arange(num_tokens, dtype=np.int32)
    inv_freq = (10000.0 ** (-np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))).astype(np.float32)
    ours, theirs = x.copy(), x.copy()

    def baseline() -> Any:
        angles = (positions[:, None] * inv_freq)[:, None]
        cos, sin = np.cos(angles), np.sin(angles)
        a, b = np.split(theirs, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)

    return Case(
        lambda: ops.rope(ours, positions, inv_freq), baseline, 2 * x.nbytes, 6 * x.size, check=False
    )


def kv_write(num_tokens: int) -> Case:
    k, v = normal(2, num_tokens, 1, HEAD_DIM)
    pages, slots = np.zeros((2, 64, 1, 16, HEAD_DIM), np.float16), np.arange(num_tokens)
    theirs = pages.copy()

    def baseline() -> None:
        for idx, values in enumerate((k, v)):
            theirs[idx][slots // 16, :, slots % 16] = values

    return Case(
        lambda: ops.kv_write(k, v, pages[0], pages[1], slots),
        baseline,
        3 * k.nbytes,
        dtype="float16",
    )


def attention(num_seqs: int, seq_len: int, num_queries: int) -> Case:
    page_size, num_pages = 16, seq_len // 16
    shape = (num_seqs * num_pages, 1, page_size, HEAD_DIM)
    pages = rng.standard_normal((2, *shape), np.float32).astype(np.float16)
    table = np.arange(num_seqs * num_pages, dtype=np.int32).reshape(num_seqs, num_pages)
    lens = np.full(num_seqs, seq_len, np.int32)
    q = normal(num_seqs * num_queries, NUM_HEADS, HEAD_DIM)
    k, v = (tensor(p.reshape(num_seqs, 1, seq_len, HEAD_DIM).astype(np.float32)) for p in pages)
    tq = tensor(q.reshape(num_seqs, num_queries, NUM_HEADS, HEAD_DIM).swapaxes(1, 2).copy())
    num_bytes = pages.nbytes + 2 * q.nbytes
    flops = 4 * q.size * (seq_len if num_queries == 1 else seq_len // 2)
    starts = np.arange(num_seqs + 1, dtype=np.int32) * num_queries

    def run() -> Any:
        if num_queries == 1:
            return ops.attention_decode(q, pages[0], pages[1], table, lens, scale=1 / 16)
        return ops.attention_prefill(q, pages[0], pages[1], table, lens, starts, scale=1 / 16)

    def baseline() -> Any:
        if torch is None:
            scores = tq @ k.swapaxes(2, 3) / 16
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            return (weights / weights.sum(axis=-1, keepdims=True) @ v).swapaxes(1, 2)
        attend = torch.nn.functional.scaled_dot_product_attention
        keys, values = (p.expand(-1, NUM_HEADS, -1, -1) for p in (k, v))
        return attend(tq, keys, values, is_causal=num_queries > 1, scale=1 / 16).transpose(1, 2)

    return Case(run, baseline, num_bytes, flops, "float16", check=torch is not None)


def attention_prefill(num_seqs: int, seq_len: int) -> Case:
    return attention(num_seqs, seq_len, seq_len)


def attention_decode(num_seqs: int, seq_len: int, num_beams: int = 1) -> Case:
    if num_beams == 1:
        return attention(num_seqs, seq_len, 1)
    # A search behind a prompt of seq_len tokens: 16 tokens of all beams, then 8 of each. Beside it
    # the same as plain sequences, each with its own copy of the prompt.
    page_size, shared, own = 16, 16, 8
    num_slots, plain_len = shared + num_beams * own, seq_len + shared + own
    slot_start = -(-seq_len // page_size) * page_size
    num_pages, num_plain = (-(-n // page_size) for n in (slot_start + num_slots, plain_len))
    keys, values = rng.standard_normal((2, slot_start + num_slots, HEAD_DIM), np.float32)
    paths = [
        [*range(shared), *range(shared + beam * own, shared + (beam + 1) * own)]
        for beam in range(num_beams)
    ]
    chains = [[*range(seq_len), *(slot_start + slot for slot in path)] for path in paths]

    def paged(rows: Any, pages: int) -> Any:
        out = np.zeros((pages * page_size, HEAD_DIM), np.float16)
        out[: len(rows)] = rows
        return out.reshape(pages, 1, page_size, HEAD_DIM)

    union = [paged(rows, num_pages) for rows in (keys, values)]
    plain = [
        np.concatenate([paged(rows[chain], num_plain) for chain in chains])
        for rows in (keys, values)
    ]
    tables = np.arange(num_beams * num_plain, dtype=np.int32).reshape(num_beams, num_plain)
    lens = np.full(num_beams, plain_len, np.int32)
    num_words = -(-num_slots // 32)
    bits = np.zeros((num_beams, 32 * num_words), bool)
    slot_positions = np.zeros((1, 32 * num_words), np.int32)
    for beam, path in enumerate(paths):
        bits[beam, path] = True
        slot_positions[0, path] = seq_len + np.arange(len(path))
    search = {
        "query_starts": np.array([0, num_beams], np.int32),
        "slot_starts": np.array([slot_start], np.int32),
        "num_slots": np.array([num_slots], np.int32),
        "visible": np.packbits(bits, axis=1, bitorder="little").view(np.uint32),
        "slot_positions": slot_positions,
        "positions": lens - 1,
    }
    table, prompt_lens = np.arange(num_pages, dtype=np.int32)[None], np.array([seq_len], np.int32)
    q = normal(num_beams, NUM_HEADS, HEAD_DIM)
    return Case(
        lambda: ops.attention_decode(q, *union, table, prompt_lens, scale=1 / 16, **search),
        lambda: ops.attention_decode(q, *plain, tables, lens, scale=1 / 16),
        4 * (seq_len + num_slots) * HEAD_DIM + 2 * q.nbytes,
        4 * q.size * plain_len,
        "float16",
        baseline_name=f"{num_beams} plain rows",
    )


def gated_activation(num_tokens: int) -> Case:
    x = normal(num_tokens, 2 * FEED_FORWARD)
    tx = tensor(x)

    def baseline() -> Any:
        if torch:
            gate, up = tx.chunk(2, dim=1)
            return torch.nn.functional.gelu(gate, approximate="tanh") * up
        gate, up = np.split(x, 2, axis=1)
        return 0.5 * gate * (1 + np.tanh(0.7978846 * (gate + 0.044715 * gate**3))) * up

    run = lambda: ops.gated_activation(x, activation="gelu_tanh")  # noqa: E731
    return Case(run, baseline, x.nbytes * 3 // 2, 10 * x.size)


def activation(num_tokens: int) -> Case:
    x = normal(num_tokens, FEED_FORWARD)
    tx = tensor(x)

    def baseline() -> Any:
        if torch:
            return torch.nn.functional.gelu(tx, approximate="tanh")
        return 0.5 * x * (1 + np.tanh(0.7978846 * (x + 0.044715 * x**3)))

    run = lambda: ops.activation(x, activation="gelu_tanh")  # noqa: E731
    return Case(run, baseline, 2 * x.nbytes, 10 * x.size)


def softcap(num_rows: int) -> Case:
    x = 30 * normal(num_rows, VOCAB)
    tx = tensor(x)
    baseline = lambda: 30 * (torch or np).tanh((x if torch is None else tx) / 30)  # noqa: E731
    return Case(lambda: ops.softcap(x, 30.0), baseline, 2 * x.nbytes, 10 * x.size)


def logprobs(num_rows: int, num_top: int) -> Case:
    logits, ids = 3 * normal(num_rows, VOCAB), np.zeros(num_rows, np.int32)
    wide = tensor(logits)

    def baseline() -> Any:
        if torch:
            values = wide.log_softmax(dim=1)
            return values[:, 0], values.topk(num_top, dim=1) if num_top else None
        top = logits.max(axis=1, keepdims=True)
        return logits[:, 0] - top[:, 0] - np.log(np.exp(logits - top).sum(axis=1)), None

    run = lambda: ops.logprobs(logits, ids, num_top=num_top)  # noqa: E731
    return Case(run, baseline, logits.nbytes)


def sample_options(num_rows: int, temperature: float, top_k: int, top_p: float) -> dict[str, Any]:
    return {
        "temperature": np.full(num_rows, temperature, np.float32),
        "top_k": np.full(num_rows, top_k, np.int32),
        "top_p": np.full(num_rows, top_p, np.float32),
        "min_p": np.zeros(num_rows, np.float32),
        "seeds": np.arange(num_rows, dtype=np.uint64),
        "counters": np.zeros((num_rows, 3), np.uint32),
    }


def sample(
    num_rows: int, temperature: float, top_k: int, top_p: float, history_len: int = 0
) -> Case:
    if history_len:
        return sample_with_all(num_rows, temperature, top_k, top_p, history_len)
    logits = 3 * normal(num_rows, VOCAB)
    logits[:, :20] += 15  # most of the mass on some tokens, as a model's is
    wide = tensor(logits)
    options = sample_options(num_rows, temperature, top_k, top_p)

    def baseline() -> Any:
        if temperature == 0:
            return wide.argmax(1)
        if torch is None:
            return (logits / temperature + rng.gumbel(size=logits.shape)).argmax(axis=1)
        values, ids = wide, None
        if top_k or top_p < 1:
            values, ids = wide.topk(top_k, dim=1) if top_k else wide.sort(dim=1, descending=True)
        probs = (values / temperature).softmax(dim=1)
        if top_p < 1:
            probs = probs * (probs.cumsum(dim=1) - probs < top_p)
        drawn = probs.multinomial(1)
        return drawn if ids is None else ids.gather(1, drawn)

    run = lambda: ops.sample(logits, **options).token_ids  # noqa: E731
    return Case(run, baseline, logits.nbytes, check=temperature == 0)


def sample_with_all(
    num_rows: int, temperature: float, top_k: int, top_p: float, history_len: int
) -> Case:
    """Bias, penalties, min_p and log-probabilities too, over half the vocabulary."""
    vocab_size, num_biases, num_top = VOCAB // 2, 10, 5
    logits = 3 * normal(num_rows, vocab_size)
    logits[:, :20] += 15
    ids = np.stack([rng.permutation(vocab_size)[:history_len] for _ in range(num_rows)])
    counts = rng.integers(0, 4, ids.shape)
    bias_ids, bias_values = ids[:, :num_biases], normal(num_rows, num_biases)
    penalties = {"repetition_penalty": 1.1, "frequency_penalty": 0.2, "presence_penalty": 0.1}
    min_p = 0.02
    options = sample_options(num_rows, temperature, top_k, top_p) | {
        "min_p": np.full(num_rows, min_p, np.float32),
        "bias_starts": np.arange(num_rows + 1, dtype=np.int32) * num_biases,
        "bias_ids": bias_ids.astype(np.int32).ravel(),
        "bias_values": bias_values.ravel(),
        "history_starts": np.arange(num_rows + 1, dtype=np.int32) * history_len,
        "history_ids": ids.astype(np.int32).ravel(),
        "history_counts": counts.astype(np.int32).ravel(),
        **{name: np.full(num_rows, value, np.float32) for name, value in penalties.items()},
        "num_top": np.full(num_rows, num_top, np.int32),
    }
    if torch:
        wide, seen, times, biased = (tensor(a) for a in (logits, ids, counts, bias_ids))

    def baseline() -> Any:
        if torch is None:
            found = reference.sample(logits, **options)
            return found.top_logprobs, found.logprobs, found.ranks, found.token_ids
        repetition, frequency, presence = penalties.values()
        edited = wide.scatter_add(1, biased, tensor(bias_values))
        values = edited.gather(1, seen)
        values = torch.where(values > 0, values / repetition, values * repetition)
        values = values - (times * frequency + (times > 0) * presence)
        values, order = (edited.scatter(1, seen, values) / temperature).sort(1, descending=True)
        values = values.masked_fill(values < values[:, :1] + float(np.log(min_p)), -np.inf)
        values[:, top_k:] = -np.inf
        probs = values.softmax(dim=1)
        probs = probs * (probs.cumsum(dim=1) - probs < top_p)
        token_ids = order.gather(1, probs.multinomial(1))
        logprobs = wide.log_softmax(dim=1)
        chosen = logprobs.gather(1, token_ids)
        ranks = (logprobs > chosen).sum(dim=1) + 1
        return logprobs.topk(num_top, dim=1).values, chosen, ranks, token_ids

    def run() -> Any:
        found = ops.sample(logits, **options)
        return found.top_logprobs, found.logprobs, found.ranks, found.token_ids

    return Case(run, baseline, logits.nbytes)


def beam_step(vocab_size: int, num_groups: int, beam_size: int) -> Case:
    num_beams = num_groups * beam_size
    logits = 3 * normal(num_beams, vocab_size)
    logits[:, 100:120] += 15
    sums = np.sort(rng.standard_normal(num_beams))[::-1]
    terminators = np.zeros((1, (vocab_size + 31) // 32), np.uint32)
    terminators[:, 1000:1100] = 2**32 - 1  # the tokens with a line break
    arguments = {
        "beam_rows": np.arange(num_beams, dtype=np.int32),
        "sums": np.stack([sums, sums], axis=1),
        "group_starts": np.arange(num_groups + 1, dtype=np.int32) * beam_size,
        "request_starts": np.array([0, num_groups], np.int32),
        "beam_sizes": np.full(num_groups, beam_size, np.int32),
        "diversity_strengths": np.full(1, 0.3, np.float32),
        "terminators": terminators,
        "terminator_idx": np.zeros(num_beams, np.int32),
    }
    wide, scores = tensor(logits), tensor(sums.astype(np.float32))

    def baseline() -> Any:
        if torch is None:
            return None
        values, ids = (wide.log_softmax(dim=1) + scores[:, None]).topk(2 * num_beams, dim=1)
        chosen, parents = ids.new_empty(0), []
        for begin in range(0, num_beams, beam_size):
            group_ids = ids[begin : begin + beam_size].reshape(-1)
            counts = (group_ids[:, None] == chosen).sum(dim=1)
            totals = values[begin : begin + beam_size].reshape(-1) - 0.3 * counts
            places = totals.topk(beam_size).indices
            parents.append(begin + places // (2 * num_beams))
            chosen = torch.cat([chosen, group_ids[places]])
        return (torch.stack(parents),)

    run = lambda: ops.beam_step(logits, **arguments)  # noqa: E731
    return Case(run, baseline, logits.nbytes)


CASES: dict[Callable[..., Case], list[dict[str, Any]]] = {
    dequantise: [{"rows": 4096, "kind": kind} for kind in ("Q8_0", "Q4_K", "Q6_K")],
    embedding: [{"num_tokens": 1}, {"num_tokens": 512}],
    rms_norm: [{"num_tokens": 1}, {"num_tokens": 512}],
    layer_norm: [{"num_tokens": 1}, {"num_tokens": 512}],
    linear: [
        *(
            {"num_tokens": n, "kind": kind}
            for kind in ("Q4_K", "Q6_K", "Q8_0")
            for n in (1, 8, 512)
        ),
        *({"num_tokens": 1, "kind": kind} for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q5_K")),
        *({"num_tokens": 1, "kind": kind} for kind in ("F32", "F16", "BF16")),
        *({"num_tokens": n, "kind": "Q8_0", "largest_only": True} for n in (1, 4)),
    ],
    rope: [{"num_tokens": 1}, {"num_tokens": 512}],
    kv_write: [{"num_tokens": 1}, {"num_tokens": 512}],
    attention_prefill: [{"num_seqs": 1, "seq_len": 512}],
    attention_decode: [
        *({"num_seqs": n, "seq_len": s} for n, s in ((1, 512), (8, 512), (1, 4096))),
        {"num_seqs": 1, "seq_len": 1000, "num_beams": 8},
    ],
    gated_activation: [{"num_tokens": 1}, {"num_tokens": 512}],
    activation: [{"num_tokens": 1}, {"num_tokens": 512}],
    softcap: [{"num_rows": 1}, {"num_rows": 8}],
    logprobs: [{"num_rows": 1, "num_top": 0}, {"num_rows": 8, "num_top": 5}],
    sample: [
        {"num_rows": rows, "temperature": t, "top_k": k, "top_p": p}
        for rows in (1, 8)
        for t, k, p in (
            (0.0, 0, 1.0),
            (1.0, 0, 1.0),
            (0.8, 0, 1.0),
            (0.8, 50, 1.0),
            (0.8, 0, 0.95),
            (0.8, 40, 0.95),
        )
    ]
    + [{"num_rows": 64, "temperature": 0.8, "top_k": 50, "top_p": 0.95, "history_len": 1000}],
    beam_step: [
        {"vocab_size": size, "num_groups": groups, "beam_size": 8 // groups}
        for size in (VOCAB, 151936)
        for groups in (1, 4)
    ],
}
IDS = [(build, axes) for build, several in CASES.items() for axes in several]


def shape_text(axes: dict[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in axes.items())


@pytest.fixture(scope="module")
def cache() -> Cache:
    return Cache()


@pytest.mark.parametrize(
    ("build", "axes"), IDS, ids=[f"{build.__name__}-{shape_text(axes)}" for build, axes in IDS]
)
def test_op(
    benchmark: Any, request: Any, cache: Cache, threads: int, build: Any, axes: dict[str, Any]
) -> None:
    if request.config.getoption("--op") not in (None, build.__name__):
        pytest.skip("another op")
    if torch:
        torch.set_num_threads(threads)
    case = build(**axes)
    if case.check:
        ours, theirs = case.run(), case.baseline()
        pairs = zip(ours, theirs, strict=False) if isinstance(ours, tuple) else [(ours, theirs)]
        for actual, expected in list(pairs)[:1] if theirs is not None else ():
            expected = np.asarray(expected).reshape(actual.shape)
            assert np.abs(actual - expected).max() <= 0.05 * np.abs(expected).max() + 1e-6
    baseline_us = median_us(case.baseline, cache.flush, limit_s=0.3)
    benchmark.pedantic(case.run, setup=cache.flush, rounds=20, warmup_rounds=2)
    benchmark.extra_info.update(
        op=build.__name__, shape=shape_text(axes), dtype=case.dtype, device="cpu",
        num_bytes=case.num_bytes, num_ops=case.num_ops, is_int8=case.is_int8,
        baseline_us=baseline_us,
        baseline="numpy" if build in (embedding, rope, kv_write) else case.baseline_name,
    )  # fmt: skip
