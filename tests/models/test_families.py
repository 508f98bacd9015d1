# SPDX-License-Identifier: Apache-2.0
"""Tiny random models as GGUF files against transformers; test_huggingface.py has every family."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fullbeam import reference
from fullbeam.engine.batch import Batch
from fullbeam.engine.engine import Engine
from fullbeam.models import OpenModel, open_model
from fullbeam.params import CompletionParams
from tiny_models import VOCAB_SIZE, FloatArray, Tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_torch_thread")

PAGE_SIZE = 8
ORIGINAL_CONTEXT = 64  # of the Llama 3 rope scaling


def llama3_factors(head_dim: int, base: float) -> tuple[float, ...]:
    """Llama 3.1's scaling as llama.cpp's converter writes it: factor 8, bands from 1 to 4."""
    factors = []
    for idx in range(0, head_dim, 2):
        turns = ORIGINAL_CONTEXT / (2 * math.pi * base ** (idx / head_dim))
        smooth = min(max((turns - 1.0) / (4.0 - 1.0), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / 8.0 + smooth))
    return tuple(factors)


CASES = {
    "llama": Tiny(),
    "llama-untied-mha": Tiny(is_tied=False, num_kv_heads=4),
    "llama-wide-heads": Tiny(head_dim=32, num_kv_heads=1),
    "llama3-rope": Tiny(
        head_dim=32, num_q_heads=2, rope_base=500.0, rope_factors=llama3_factors(32, 500.0)
    ),
    "llama-linear-rope": Tiny(linear_factor=4.0),
    "qwen2": Tiny(arch="qwen2", rope_base=1e6),
    "qwen2-untied": Tiny(arch="qwen2", is_tied=False),
    "qwen3": Tiny(arch="qwen3", head_dim=32, rope_base=1e6),
    "gemma3": Tiny(arch="gemma3", num_layers=7, num_kv_heads=1, rope_base=1e6, window=8),
    "gemma3-linear-rope": Tiny(
        arch="gemma3", num_layers=6, head_dim=32, rope_base=1e6, linear_factor=8.0, window=6
    ),
}
QUANTISED = Tiny(
    hidden_size=256, num_layers=2, head_dim=64, ffn_size=512, is_tied=False, linear_factor=2.0
)


def half_kv_attention(
    module: Any, query: Any, key: Any, value: Any, mask: Any, *, scaling: float, **_: Any
) -> tuple[Any, None]:
    """Attention as fullbeam's: keys and values are kept in float16."""
    groups = module.num_key_value_groups
    key, value = (x.half().to(query.dtype).repeat_interleave(groups, dim=1) for x in (key, value))
    weights = (query @ key.transpose(2, 3) * scaling + mask).softmax(dim=-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


def hf_config(tiny: Tiny) -> Any:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": tiny.rope_base}
    if tiny.linear_factor != 1.0:
        rope |= {"rope_type": "linear", "factor": tiny.linear_factor}
    if tiny.rope_factors:
        rope |= {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": ORIGINAL_CONTEXT,
        }
    fields = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": tiny.hidden_size,
        "num_hidden_layers": tiny.num_layers,
        "num_attention_heads": tiny.num_q_heads,
        "num_key_value_heads": tiny.num_kv_heads,
        "head_dim": tiny.head_dim,
        "intermediate_size": tiny.ffn_size,
        "max_position_embeddings": tiny.context_len,
        "tie_word_embeddings": tiny.is_tied,
        "rms_norm_eps": 1e-6,
        "rope_parameters": rope,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if tiny.is_gemma:
        local = {"rope_type": "default", "rope_theta": 10000.0}
        fields |= {
            "rope_parameters": {"full_attention": rope, "sliding_attention": local},
            "sliding_window": tiny.window,
            "query_pre_attn_scalar": tiny.head_dim,
        }
    kinds = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma3": "Gemma3Text"}
    return getattr(transformers, f"{kinds[tiny.arch]}Config")(**fields)


class Oracle:
    """transformers on the same weights, its keys and values rounded to float16 if wanted."""

    def __init__(
        self, tiny: Tiny, weights: dict[str, FloatArray], dtype: str, *, half_kv: bool = False
    ) -> None:
        transformers.AttentionInterface.register("half_kv", half_kv_attention)
        transformers.AttentionMaskInterface.register(
            "half_kv", transformers.masking_utils.eager_mask
        )
        config = hf_config(tiny)
        config._attn_implementation = "half_kv" if half_kv else "eager"
        self.model = transformers.AutoModelForCausalLM.from_config(config)
        state = {name: torch.from_numpy(values) for name, values in weights.items()}
        missing, unexpected = self.model.load_state_dict(state, strict=False)
        assert not unexpected
        assert set(missing) == ({"lm_head.weight"} if tiny.is_tied else set())
        self.model.tie_weights()
        self.model.to(getattr(torch, dtype)).eval()

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float64]:
        with torch.inference_mode():
            out = self.model(torch.tensor([list(ids)]), use_cache=False).logits[0]
        return np.asarray(out.double().numpy())

    def round_activations(self) -> None:
        """Let every product see its input in int8, as with quantised weights."""

        def rounded(_: Any, inputs: tuple[Any]) -> tuple[Any]:
            x = reference.round_activations(inputs[0].float().numpy())
            return (torch.from_numpy(x).to(inputs[0].dtype),)

        for module in self.model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(rounded)


class Sequences:
    """Sequences in a KV cache whose pages lie in no order, stepped by hand."""

    def __init__(self, model: OpenModel, num_seqs: int, max_len: int) -> None:
        self.model = model
        max_pages = -(-max_len // PAGE_SIZE)
        order = np.random.default_rng(7).permutation(num_seqs * max_pages)
        self.tables = order.astype(np.int32).reshape(num_seqs, max_pages)
        self.kv = model.decoder.allocate_kv(num_seqs * max_pages, PAGE_SIZE)
        self.ids: list[list[int]] = [[] for _ in range(num_seqs)]

    def step(self, *parts: tuple[int, Sequence[int]]) -> list[FloatArray]:
        """Add ids to sequences in one forward pass; returns the logits of all of them."""
        parts = tuple(sorted(parts, key=lambda part: len(part[1]) > 1))
        tables = self.tables[[seq for seq, _ in parts]]
        spans = []
        for seq, ids in parts:
            start = len(self.ids[seq])
            spans.append(np.arange(start, start + len(ids)))
            self.ids[seq] += ids
        slots = [
            table[span // PAGE_SIZE].astype(np.int64) * PAGE_SIZE + span % PAGE_SIZE
            for table, span in zip(tables, spans, strict=True)
        ]
        starts = np.cumsum([0, *map(len, spans)])
        logits = self.model.decoder.forward(
            Batch(
                token_ids=np.array([i for _, ids in parts for i in ids], np.int32),
                positions=np.concatenate(spans).astype(np.int32),
                slots=np.concatenate(slots),
                query_starts=starts.astype(np.int32),
                num_decode=sum(len(ids) == 1 for _, ids in parts),
                page_table=tables,
                seq_lens=np.array([span[-1] + 1 for span in spans], np.int32),
                logit_rows=np.arange(starts[-1], dtype=np.int32),
            ),
            self.kv,
        )
        return np.split(logits.copy(), starts[1:-1])


@dataclasses.dataclass(frozen=True)
class Pair:
    """A model in fullbeam and in transformers, and a text that is longer than every window."""

    model: OpenModel
    oracle: Oracle  # float64
    ids: list[int]
    expected: npt.NDArray[np.float64]  # [len(ids), VOCAB_SIZE]
    own_error: (
        float  # of transformers with fullbeam's precision: float32, keys and values in float16
    )

    def check(self, logits: FloatArray, first: int = 0) -> None:
        """Logits of consecutive positions, from `first` on."""
        expected = self.expected[first : first + len(logits)]
        assert logits.shape == expected.shape
        assert rms(logits - expected) <= 2 * self.own_error
        assert np.abs(logits - expected).max() <= 20 * self.own_error


def rms(x: npt.NDArray[Any]) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def mean_kl(expected: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    p, q = (torch.from_numpy(x).double().log_softmax(dim=-1) for x in (expected, other))
    return float((p.exp() * (p - q)).sum(dim=-1).mean())


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    made: dict[str, Pair] = {}

    def make(name: str) -> Pair:
        if name not in made:
            tiny = CASES[name]
            weights = tiny.weights(seed=3)
            path = tiny.write(tmp_path_factory.mktemp("tiny") / f"{name}.gguf", weights)
            ids = np.random.default_rng(5).integers(0, 256, 45).tolist()
            oracle = Oracle(tiny, weights, "float64")
            expected = oracle.logits(ids)
            naive = Oracle(tiny, weights, "float32", half_kv=True).logits(ids)
            model = open_model(path, threads=1)
            made[name] = Pair(model, oracle, ids, expected, rms(naive - expected))
        return made[name]

    return make


@pytest.mark.parametrize("num_tokens", [299, 301])
def test_vocabulary_of_another_size_is_refused(tmp_path: Path, num_tokens: int) -> None:
    tiny = Tiny(num_layers=1, num_tokens=num_tokens)
    path = tiny.write(tmp_path / "tiny.gguf", tiny.weights(seed=1))
    with pytest.raises(ValueError, match=f"must have 300 tokens, .*got {num_tokens}"):
        open_model(path)


@pytest.mark.parametrize("length", [1, 2, 7, 45])
@pytest.mark.parametrize("name", CASES)
def test_logits_of_a_prompt(pair_of: Callable[[str], Pair], name: str, length: int) -> None:
    pair = pair_of(name)
    (logits,) = Sequences(pair.model, 1, 48).step((0, pair.ids[:length]))
    pair.check(logits)


@pytest.mark.parametrize("name", CASES)
def test_logits_of_chunks_and_single_tokens(pair_of: Callable[[str], Pair], name: str) -> None:
    pair = pair_of(name)
    (whole,) = Sequences(pair.model, 1, 48).step((0, pair.ids))
    sequences = Sequences(pair.model, 1, 48)
    cuts = [0, 13, 14, 15, 16, 31, 45]
    parts = [pair.ids[start:end] for start, end in itertools.pairwise(cuts)]
    chunked = np.concatenate([sequences.step((0, part))[0] for part in parts])
    pair.check(chunked)
    np.testing.assert_array_equal(chunked, whole)


@pytest.mark.parametrize("name", CASES)
def test_logits_of_a_ragged_batch(pair_of: Callable[[str], Pair], name: str) -> None:
    pair = pair_of(name)
    sequences = Sequences(pair.model, 3, 48)
    sequences.step((1, pair.ids[:20]), (2, pair.ids[:3]))
    single, middle, start = sequences.step(
        (1, pair.ids[20:21]), (2, pair.ids[3:33]), (0, pair.ids[:11])
    )
    pair.check(single, 20)
    pair.check(middle, 3)
    pair.check(start)


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens(pair_of: Callable[[str], Pair], name: str) -> None:
    pair = pair_of(name)
    prompt = pair.ids[:10]
    ids = list(prompt)
    for _ in range(24):
        ids.append(int(pair.oracle.logits(ids)[-1].argmax()))
    engine = Engine(pair.model.decoder, pair.model.tokenizer, context=64, num_pages=8, page_size=8)
    params = CompletionParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    (piece,) = engine.generate(prompt, params)
    assert [*prompt, *piece.token_ids] == ids


@pytest.mark.parametrize("kind", reference.WEIGHT_TYPES)
def test_weight_types(tmp_path: Path, kind: str) -> None:
    tiny = QUANTISED
    weights = tiny.weights(seed=4)
    path = tiny.write(tmp_path / f"{kind}.gguf", weights, kind)
    for name, values in weights.items():
        if values.ndim == 2:
            raw = reference.quantize(values, kind)
            weights[name] = reference.dequantize(raw, kind, values.shape)
    ids = np.random.default_rng(6).integers(0, 256, 32).tolist()
    expected = Oracle(tiny, weights, "float64").logits(ids)
    naive = Oracle(tiny, weights, "float32", half_kv=True)
    if kind not in ("F32", "F16", "BF16"):
        naive.round_activations()
    model = open_model(path, threads=1)
    (logits,) = Sequences(model, 1, 32).step((0, ids))
    assert mean_kl(expected, logits) <= 2 * mean_kl(expected, naive.logits(ids))

    sequences = Sequences(model, 1, 32)
    parts = [ids[:13], ids[13:14], ids[14:15], ids[15:]]
    chunked = np.concatenate([sequences.step((0, part))[0] for part in parts])
    np.testing.assert_array_equal(chunked, logits)
