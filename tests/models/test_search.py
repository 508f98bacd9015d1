# SPDX-License-Identifier: Apache-2.0
"""Searches on tiny random models against transformers and against trying every text."""

from __future__ import annotations

import collections
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from beam_oracle import CASES, MIN_GAP, Gaps, random_prompts, tiny_oracle, token_logprobs, torch
from fullbeam.engine.engine import Engine
from fullbeam.model import Model
from fullbeam.models import open_model
from fullbeam.results import Choice

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SEED = 3
PROMPT_LEN = 12
MAX_TOKENS = 16
GOLDENS = Path(__file__).parent / "data" / "group_beam_goldens.json"

Found = tuple[list[int], float]  # token ids, and what they are ranked by


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Model]]:
    """A case's model in fullbeam, with weights drawn from the seed."""
    models: list[Model] = []

    @functools.cache
    def make(name: str, seed: int = SEED) -> Model:
        tiny = CASES[name]
        path = tmp_path_factory.mktemp("tiny") / f"{name}.gguf"
        opened = open_model(tiny.write(path, tiny.weights(seed)), threads=1)
        opened.decoder.device.kv_dtype = "float32"
        engine = Engine(
            opened.decoder, opened.tokenizer, context=64, max_rows=128, page_size=8, num_pages=512
        )
        models.append(Model(engine, name=name))
        return models[-1]

    yield make
    for model in models:
        model.close()


oracle_of = functools.cache(functools.partial(tiny_oracle, seed=SEED))


@functools.cache
def frequent_tokens(name: str) -> list[int]:
    """What beams choose where nothing ends them, the most frequent first."""
    out = generate(name, num_beams=4, num_return_sequences=4)
    return [token_id for token_id, _ in collections.Counter(out.flatten().tolist()).most_common()]


def generate(name: str, **options: Any) -> Any:
    """What transformers generates, without the prompts."""
    ids = torch.tensor(random_prompts(SEED, 4, PROMPT_LEN))
    mask = torch.ones_like(ids)
    options = {"do_sample": False, "max_new_tokens": MAX_TOKENS} | options
    out = oracle_of(name).generate(ids, attention_mask=mask, **options)
    if not isinstance(out, torch.Tensor):
        out.sequences = out.sequences[:, PROMPT_LEN:]
        return out
    return out[:, PROMPT_LEN:]


def up_to_end(token_ids: list[int], ends: Sequence[int]) -> list[int]:
    """Without the padding."""
    end = next((idx for idx, token_id in enumerate(token_ids) if token_id in ends), len(token_ids))
    return token_ids[: end + 1]


def assert_found(choices: Sequence[Choice], expected: Sequence[Found]) -> None:
    """The same texts with the same scores, best first; those as good as each other in any order."""
    actual = [(choice.token_ids, choice.score) for choice in choices]
    scores = [score for _, score in actual]
    assert scores == sorted(scores, reverse=True)
    assert [ids for ids, _ in sorted(actual)] == [ids for ids, _ in sorted(expected)]
    wanted = [score for _, score in sorted(expected)]
    assert [score for _, score in sorted(actual)] == pytest.approx(wanted, rel=2e-5, abs=2e-5)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize(("beam_size", "num_ends"), [(2, 12), (4, 1), (8, 4)])
@pytest.mark.parametrize("name", CASES)
def test_beam_search_is_as_in_transformers(
    model_of: Callable[..., Model], name: str, beam_size: int, num_ends: int, length_penalty: float
) -> None:
    ends = frequent_tokens(name)[:num_ends]
    prompts = random_prompts(SEED, 4, PROMPT_LEN)
    gaps = Gaps(len(prompts), beam_size, ends)
    out = generate(
        name,
        num_beams=beam_size,
        num_return_sequences=beam_size,
        length_penalty=length_penalty,
        early_stopping="never",
        eos_token_id=ends,
        pad_token_id=ends[0],
        output_scores=True,
        return_dict_in_generate=True,
        logits_processor=[gaps],
    )
    completion = model_of(name).complete(
        prompts,
        beam_size=beam_size,
        n=beam_size,
        length_penalty=length_penalty,
        max_tokens=MAX_TOKENS,
        stop_token_ids=ends,
        ignore_eos=True,
        logprobs=0,
    )
    texts = [up_to_end(ids, ends) for ids in out.sequences.tolist()]
    found = list(zip(texts, out.sequences_scores.tolist(), strict=True))
    num_compared = 0
    for idx, gap in enumerate(gaps.least):
        mine = slice(idx * beam_size, (idx + 1) * beam_size)
        if gap >= MIN_GAP:
            assert_found(completion.choices[mine], found[mine])
            num_compared += 1
    assert num_compared >= len(prompts) - 1

    for choice in completion.choices:
        assert choice.finish_reason == ("stop" if choice.token_ids[-1] in ends else "length")
        total = math.fsum(choice.logprobs.token_logprobs)
        assert choice.score == pytest.approx(total / len(choice.token_ids) ** length_penalty)


@pytest.mark.parametrize("name", CASES)
def test_greedy_is_as_in_transformers(model_of: Callable[..., Model], name: str) -> None:
    prompts = random_prompts(SEED, 4, PROMPT_LEN)
    ends = frequent_tokens(name)[:4]
    out = generate(name, eos_token_id=ends, pad_token_id=ends[0])
    wanted = [up_to_end(ids, ends) for ids in out.tolist()]
    assert len({len(ids) for ids in wanted}) > 1
    completion = model_of(name).complete(
        prompts, temperature=0.0, max_tokens=MAX_TOKENS, stop_token_ids=ends, ignore_eos=True
    )
    assert [choice.token_ids for choice in completion.choices] == wanted

    endless = model_of(name).complete(prompts, beam_size=1, max_tokens=MAX_TOKENS, ignore_eos=True)
    assert [choice.token_ids for choice in endless.choices] == generate(name).tolist()


RANKINGS: dict[str, tuple[dict[str, float], Callable[[float, int], float]]] = {
    "sum": ({"length_penalty": 0.0}, lambda total, _: total),
    "mean": ({}, lambda total, count: total / count),
    "longer": ({"length_penalty": 2.0}, lambda total, count: total / count**2),
    "shorter": ({"length_penalty": -1.0}, lambda total, count: total * count),
    "line": (
        {"len_norm_base": 0.3, "len_norm_pow": 2.0},
        lambda total, count: math.exp(total / ((0.3 + count) / 1.3) ** 2.0),
    ),
    "gentle": (
        {"len_norm_base": 2.0, "len_norm_pow": 0.7},
        lambda total, count: math.exp(total / ((2.0 + count) / 3.0) ** 0.7),
    ),
}


END, LETTERS = 65, (66, 67, 298)


@functools.cache
def every_text(name: str) -> list[Found]:
    """The 121 texts of up to four tokens that end early or not, and their log-probabilities."""
    (prompt,) = random_prompts(SEED, 1, PROMPT_LEN)
    found: list[Found] = []
    for length in range(1, 5):
        texts = [[*text, END] for text in itertools.product(LETTERS, repeat=length - 1)]
        if length == 4:
            texts += [list(text) for text in itertools.product(LETTERS, repeat=length)]
        logprobs = token_logprobs(oracle_of(name), [prompt + text for text in texts])
        totals = logprobs[:, PROMPT_LEN - 1 :].sum(dim=1).tolist()
        found += zip(texts, totals, strict=True)
    return found


@pytest.mark.parametrize("n", [1, 10, 121])
@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_wide_beam_search_finds_the_best_of_all_texts(
    model_of: Callable[..., Model], name: str, ranking: str, n: int
) -> None:
    options, rank = RANKINGS[ranking]
    found = [(text, rank(logprob, len(text))) for text, logprob in every_text(name)]
    found.sort(key=lambda item: -item[1])
    completion = model_of(name).complete(
        random_prompts(SEED, 1, PROMPT_LEN),
        beam_size=128,
        n=n,
        max_tokens=4,
        allowed_token_ids=[END, *LETTERS],
        stop_token_ids=[END],
        ignore_eos=True,
        **options,
    )
    assert_found(completion.choices, found[:n])


def golden_id(golden: dict[str, Any]) -> str:
    return "{case}-{diversity_groups}x{beam_size}-{diversity_strength}".format(**golden)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("golden", json.loads(GOLDENS.read_text()), ids=golden_id)
def test_diverse_beam_search_is_as_in_transformers(
    model_of: Callable[..., Model], golden: dict[str, Any], length_penalty: float
) -> None:
    """All groups' hypotheses are those of transformers' group beam search.

    Compared are the texts, and their log-probabilities without penalties: transformers returns the
    best by the penalised score and at most as many of each group as it has beams, fullbeam the best
    by log-probability of all. So the goldens hold every hypothesis that ended or lived to the end.
    The penalties show in which these are.
    """
    num_beams = golden["beam_size"] * golden["diversity_groups"]
    found = [
        (ids, logprob / len(ids) ** length_penalty)
        for group in golden["groups"]
        for ids, _, logprob in group
    ]
    found.sort(key=lambda item: -item[1])
    options = ("beam_size", "diversity_groups", "diversity_strength", "max_tokens")
    completion = model_of(golden["case"], golden["seed"]).complete(
        golden["prompt"],
        n=num_beams,
        length_penalty=length_penalty,
        stop_token_ids=golden["ends"],
        ignore_eos=True,
        **{name: golden[name] for name in options},
    )
    assert_found(completion.choices, found[:num_beams])
