# SPDX-License-Identifier: Apache-2.0
"""Every family, saved by transformers and as a GGUF file: logits, greedy tokens and beams."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import hf_models
from beam_oracle import MIN_GAP, Gaps, random_prompts, torch
from fullbeam.engine.batch import Batch
from fullbeam.engine.engine import Engine
from fullbeam.model import Model
from fullbeam.models import OpenModel, open_model
from fullbeam.models.families import FAMILIES
from fullbeam.models.layouts import LAYOUTS
from hf_models import CASES

pytestmark = pytest.mark.usefixtures("one_torch_thread")

PAGE_SIZE = 8
PROMPT_LEN = 12
IDS = np.random.default_rng(5).integers(0, 256, 100).tolist()  # longer than windows and contexts


@dataclass(frozen=True)
class Saved:
    """A model of transformers and the files it was written to."""

    model: Any
    folder: Path
    gguf: Path
    expected: npt.NDArray[np.float64]  # logits of IDS
    own_error: float  # of transformers in float32

    def open(self, kind: str, context: int | None = None) -> OpenModel:
        path = {"folder": self.folder, "gguf": self.gguf}[kind]
        opened = open_model(path, threads=1, context=context)
        opened.decoder.device.kv_dtype = "float32"
        return opened


def logits_of(model: Any, dtype: str) -> npt.NDArray[np.float64]:
    """transformers' logits of IDS in another precision; leaves the model in float32."""
    with torch.inference_mode():
        out = model.to(getattr(torch, dtype))(torch.tensor([IDS]), use_cache=False).logits[0]
    model.float()
    return np.asarray(out.double().numpy())


def forward(opened: OpenModel, *cuts: int) -> npt.NDArray[np.float32]:
    """Logits of IDS, computed in parts."""
    num_pages = -(-len(IDS) // PAGE_SIZE)
    kv = opened.decoder.allocate_kv(num_pages, PAGE_SIZE)
    table = np.random.default_rng(7).permutation(num_pages).astype(np.int32)
    out = []
    for start, end in itertools.pairwise([0, *cuts, len(IDS)]):
        span = np.arange(start, end)
        batch = Batch(
            token_ids=np.array(IDS[start:end], np.int32),
            positions=span.astype(np.int32),
            slots=table[span // PAGE_SIZE].astype(np.int64) * PAGE_SIZE + span % PAGE_SIZE,
            query_starts=np.array([0, len(span)], np.int32),
            num_decode=int(len(span) == 1),
            page_table=table[None],
            seq_lens=np.array([end], np.int32),
            logit_rows=np.arange(len(span), dtype=np.int32),
        )
        out.append(opened.decoder.forward(batch, kv).copy())
    return np.concatenate(out)


def rms(x: npt.NDArray[Any]) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    @functools.cache
    def make(name: str) -> Saved:
        folder = tmp_path_factory.mktemp(name)
        model = hf_models.make_model(name)
        hf_models.save(name, model, folder)
        path = hf_models.write_gguf(name, model, folder.parent / f"{name}.gguf")
        naive = logits_of(model, "float32")
        expected = logits_of(model, "float64")
        return Saved(model, folder, path, expected, rms(naive - expected))

    return make


def test_every_family_has_a_case() -> None:
    assert {family.arch for family in CASES.values()} == set(FAMILIES)
    assert {hf_models.config_of(name).model_type for name in CASES} == set(LAYOUTS)
    assert {layout.arch for layout in LAYOUTS.values()} == set(FAMILIES)


@pytest.mark.parametrize("kind", ["folder", "gguf"])
@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(
    saved: Callable[[str], Saved], name: str, kind: str
) -> None:
    model = saved(name)
    opened = model.open(kind)
    whole = forward(opened)
    assert rms(whole - model.expected) <= 4 * model.own_error
    np.testing.assert_array_equal(forward(opened, 13, 14, 15, 70), whole)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_as_close_as_that_of_transformers(
    saved: Callable[[str], Saved], tmp_path: Path, name: str
) -> None:
    model = hf_models.make_model(name).bfloat16()
    folder = hf_models.save(name, model, tmp_path)
    naive = logits_of(model, "bfloat16")
    expected = logits_of(model, "float64")
    opened = open_model(folder, threads=1)
    assert opened.decoder.weights.layers[0].qkv.weight.types[0] == "BF16"
    assert rms(forward(opened) - expected) <= 2 * rms(naive - expected)


@pytest.mark.parametrize("kind", ["folder", "gguf"])
@pytest.mark.parametrize("name", CASES)
def test_greedy_and_beams_are_those_of_transformers(
    saved: Callable[[str], Saved], name: str, kind: str
) -> None:
    model = saved(name)
    opened = model.open(kind, context=64)
    engine = Engine(
        opened.decoder, opened.tokenizer, context=64, max_rows=16, page_size=8, num_pages=64
    )
    prompts = random_prompts(3, 3, PROMPT_LEN)
    options = {"do_sample": False, "max_new_tokens": 16, "pad_token_id": 0}
    ids = torch.tensor(prompts)
    mask = torch.ones_like(ids)
    greedy = model.model.generate(ids, attention_mask=mask, **options)[:, PROMPT_LEN:]
    gaps = Gaps(len(prompts), 4, [])
    beams = model.model.generate(
        ids,
        attention_mask=mask,
        num_beams=4,
        num_return_sequences=4,
        logits_processor=[gaps],
        **options,
    )[:, PROMPT_LEN:]
    with Model(engine, name=name) as ours:
        found = ours.complete(prompts, temperature=0.0, max_tokens=16, ignore_eos=True)
        assert [choice.token_ids for choice in found.choices] == greedy.tolist()
        found = ours.complete(prompts, beam_size=4, n=4, max_tokens=16, ignore_eos=True)
    num_compared = 0
    for idx, gap in enumerate(gaps.least):
        if gap >= MIN_GAP:
            part = slice(4 * idx, 4 * idx + 4)
            assert [choice.token_ids for choice in found.choices[part]] == beams[part].tolist()
            num_compared += 1
    assert num_compared >= 1


def test_split_gguf_is_one_model(saved: Callable[[str], Saved], tmp_path: Path) -> None:
    model = saved("qwen2")
    hf_models.write_gguf("qwen2", model.model, tmp_path / "tiny.gguf", max_tensors=10)
    paths = sorted(tmp_path.glob("*.gguf"))
    assert [path.name for path in paths][:1] == [f"tiny-00001-of-{len(paths):05}.gguf"]
    expected = forward(open_model(model.gguf, threads=1))
    for path in (paths[0], paths[-1]):
        np.testing.assert_array_equal(forward(open_model(path, threads=1)), expected)

    renamed = paths[0].rename(tmp_path / "part-one.gguf")
    with pytest.raises(ValueError, match=r"must be named \*-00001-of-0000\d\.gguf"):
        open_model(renamed)
    with pytest.raises(ValueError, match=r"part tiny-00001-of-0000\d\.gguf must be beside it"):
        open_model(paths[-1])
