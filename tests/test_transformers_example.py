# SPDX-License-Identifier: Apache-2.0
"""examples/transformers_model.py on tiny random models: what it answers is transformers' own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

import hf_models

pytestmark = pytest.mark.usefixtures("one_torch_thread")

EXAMPLE = Path(__file__).parents[1] / "examples" / "transformers_model.py"
ENDS = list(range(50))  # so many that texts do end
PADDING = 299


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("transformers_model", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def llama() -> Any:
    return hf_models.make_model("llama")


def both(example: Any, model: Any, num_prompts: int = 3, **options: Any) -> tuple[Any, Any]:
    """transformers' answers and ours; prompts have 7, 11 and 11 tokens."""
    ids = torch.randint(0, 250, (num_prompts, 11), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options = {"pad_token_id": PADDING, "do_sample": False} | options
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    own = model.generate(ids, attention_mask=mask, **options)
    model.set_attn_implementation("fullbeam")
    return own, model.generate(
        ids, attention_mask=mask, custom_generate=example.generate, **options
    )


def assert_same(texts: tuple[Any, Any]) -> None:
    np.testing.assert_array_equal(texts[1].numpy(), texts[0].numpy())


# Windows, soft caps, norms of queries and keys, one KV head for several queries.
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3", "phi3", "starcoder2"])
def test_greedy_tokens_and_beams_are_transformers_own(example: Any, name: str) -> None:
    model = hf_models.make_model(name)
    assert_same(both(example, model, max_new_tokens=6))
    assert_same(both(example, model, max_new_tokens=6, num_beams=3, num_return_sequences=2))


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -1.0])
def test_beam_search_ends_and_ranks_as_transformers_does(
    example: Any, llama: Any, early_stopping: Any, length_penalty: float
) -> None:
    options = {"early_stopping": early_stopping, "length_penalty": length_penalty}
    options |= {"num_beams": 4, "num_return_sequences": 4, "eos_token_id": ENDS}
    texts = both(example, llama, max_new_tokens=16, **options)
    assert_same(texts)
    assert (texts[0] == PADDING).any(), "no text has ended"


def test_greedy_texts_end_as_transformers_own(example: Any, llama: Any) -> None:
    texts = both(example, llama, max_new_tokens=40, eos_token_id=ENDS)
    assert_same(texts)
    assert (texts[0][:, 11:] == PADDING).any(), "no text has ended"


def test_logits_are_close_to_transformers_own(example: Any, llama: Any) -> None:
    ids = torch.arange(7, 60)[None]
    llama.set_attn_implementation("sdpa")
    with torch.no_grad():
        expected = llama(ids).logits[0, -6:]
        llama.set_attn_implementation("fullbeam")
        batch = example.Batch(llama, [ids[0, :-5].tolist()], width=1, max_new=5)
        logits = [batch.prefill()]
        logits += [batch.decode(token[None].int(), torch.zeros(1).int()) for token in ids[0, -5:]]
    torch.testing.assert_close(torch.cat(logits), expected, rtol=1e-4, atol=1e-4)


def test_draws_follow_the_processed_distribution(example: Any, llama: Any) -> None:
    """Chi-square of 4000 draws over the tokens that temperature, top-k and top-p leave."""
    ids = torch.arange(20, 30)[None]
    options = {"temperature": 0.9, "top_k": 8, "top_p": 0.9}
    llama.set_attn_implementation("sdpa")
    torch.manual_seed(1)
    own = llama.generate(
        ids, do_sample=True, max_new_tokens=1, output_scores=True, return_dict_in_generate=True,
        pad_token_id=PADDING, **options,
    )  # fmt: skip
    expected = own.scores[0][0].softmax(-1).double().numpy() * 4000
    llama.set_attn_implementation("fullbeam")
    drawn = llama.generate(
        ids, do_sample=True, max_new_tokens=1, num_return_sequences=4000,
        custom_generate=example.generate, pad_token_id=PADDING, **options,
    )  # fmt: skip
    counts = np.bincount(drawn[:, -1].numpy(), minlength=len(expected))
    is_kept = expected > 0
    assert 2 < is_kept.sum() <= 8
    assert not counts[~is_kept].any()
    surprise = ((counts - expected)[is_kept] ** 2 / expected[is_kept]).sum()
    assert surprise < 25, f"chi-square with up to 7 degrees of freedom: {surprise}"


def test_draws_of_one_token_are_the_greedy_ones(example: Any, llama: Any) -> None:
    assert_same(both(example, llama, max_new_tokens=8, do_sample=True, top_k=1))


def test_a_seed_of_torch_repeats_the_draws(example: Any, llama: Any) -> None:
    texts = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        texts.append(both(example, llama, max_new_tokens=8, do_sample=True)[1])
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"repetition_penalty": 1.2}, "RepetitionPenaltyLogitsProcessor"),
        ({"min_p": 0.1, "do_sample": True}, "MinPLogitsWarper"),
        ({"num_beams": 2, "do_sample": True}, "do_sample with num_beams"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"max_time": 5.0}, "MaxTimeCriteria"),
    ],
)
def test_what_it_does_not_do_is_refused(
    example: Any, llama: Any, options: dict[str, Any], names: str
) -> None:
    llama.set_attn_implementation("fullbeam")
    with pytest.raises(ValueError, match=f"^generate: {names} must be left out$"):
        llama.generate(
            torch.arange(5)[None], max_new_tokens=2, custom_generate=example.generate, **options
        )


def test_attention_sinks_are_refused(example: Any) -> None:
    query = torch.zeros(1, 2, 3, 16)
    with pytest.raises(NotImplementedError, match="attention sinks"):
        example.attend(None, query, query, query, None, scaling=1.0, batch=None, s_aux=query)


@pytest.mark.parametrize("backend", ["emulated"], indirect=True)
def test_it_runs_on_the_cuda_kernels(example: Any, backend: str) -> None:
    model = hf_models.make_model("llama")
    assert_same(both(example, model, num_prompts=2, max_new_tokens=3, num_beams=3))
    assert_same(both(example, model, num_prompts=2, max_new_tokens=3))


def test_the_command_compares_a_folder(tmp_path: Path) -> None:
    folder = hf_models.save("llama", hf_models.make_model("llama"), tmp_path)
    command, env = (
        [sys.executable, str(EXAMPLE), str(folder)],
        os.environ | {"OMP_NUM_THREADS": "1"},
    )
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the same tokens") == 3, done.stdout
