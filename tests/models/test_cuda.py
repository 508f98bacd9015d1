# SPDX-License-Identifier: Apache-2.0
"""The engine on CUDA answers as on the CPU: with emulated kernels, and on a GPU where there is one.

Weights, activations, keys and values are float32 here, so that only the order of sums differs:
tokens are the same, log-probabilities up to rounding.
"""

from __future__ import annotations

import dataclasses
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import backends
from fullbeam import _core, ops
from fullbeam.engine.engine import Engine
from fullbeam.engine.text import Piece
from fullbeam.models import OpenModel, open_model
from fullbeam.params import CompletionParams
from request_mix import (
    CONTEXT,
    PAGE_SIZE,
    TINY,
    Request,
    complete,
    make_engine,
    repeating_requests,
    requests,
)

torch = pytest.importorskip("torch")


def on_cuda(path: Path, backend: str, dtype: str = "float32") -> OpenModel:
    from fullbeam.engine.cuda import CudaDevice

    where = "cuda" if backend == "cuda" else "cpu"
    return open_model(path, device=CudaDevice(where, dtype=dtype, kv_dtype=dtype))


def assert_same(answers: list[list[Piece]], expected: list[list[Piece]]) -> None:
    for choices, wanted in zip(answers, expected, strict=True):
        assert [c.token_ids for c in choices] == [w.token_ids for w in wanted]
        for choice, want in zip(choices, wanted, strict=True):
            assert choice.finish_reason == want.finish_reason
            assert choice.logprobs is not None
            assert want.logprobs is not None
            got, right = choice.logprobs.token_logprobs, want.logprobs.token_logprobs
            assert got == [None if r is None else pytest.approx(r, abs=1e-4) for r in right]


@pytest.fixture(autouse=True)
def direct(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the engine's arrays are there already."""
    if "backend" in request.fixturenames and request.getfixturevalue("backend") == "cuda":
        monkeypatch.setattr(ops, "_core", _core)


@pytest.fixture
def family() -> str:
    return "llama"


@pytest.fixture
def path(family: str, tmp_path: Path) -> Path:
    tiny, _ = TINY[family]
    return tiny.write(tmp_path / f"{family}.gguf", tiny.weights(seed=8), "F32")


FREE = [0, 1, 2, 3, 4, 5, 6, 7, 10]  # of the requests: with no mask that changes with the text


def on_cpu(path: Path, batch: list[Request], **options: Any) -> list[list[Piece]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "_core", _core)  # whatever the test's backend is
        model = open_model(path, threads=1)
        model.decoder.device.kv_dtype = "float32"
        return complete(make_engine(model, **options), batch)


@pytest.mark.parametrize("backend", backends.CUDA, indirect=True)
@pytest.mark.parametrize("family", TINY)
def test_answers_are_those_of_the_cpu(path: Path, backend: str) -> None:
    batch = requests()
    assert_same(complete(make_engine(on_cuda(path, backend)), batch), on_cpu(path, batch))


@pytest.mark.parametrize("backend", backends.CUDA, indirect=True)
def test_preemption_and_small_chunks_change_nothing(path: Path, backend: str) -> None:
    batch = requests()
    few = {"num_pages": CONTEXT // PAGE_SIZE, "token_budget": 32}
    engine = make_engine(on_cuda(path, backend), **few)
    assert_same(complete(engine, batch), on_cpu(path, batch))
    assert engine.stats().num_preemptions > 0


@pytest.mark.parametrize("backend", backends.CUDA, indirect=True)
def test_a_prefix_hit_changes_nothing(path: Path, backend: str) -> None:
    (long, greedy), (_, sampled) = requests()[3], requests()[4]
    search = requests()[8][1]
    longer = [*long, *requests()[1][0]]
    engine = make_engine(on_cuda(path, backend))
    complete(engine, [(long, greedy)])
    batch = [(long, greedy), (long, sampled), (longer, search), (longer, sampled)]
    answers = complete(engine, batch)
    assert engine.stats().num_reused_tokens >= 4 * (len(long) // PAGE_SIZE - 1) * PAGE_SIZE
    assert_same(answers, on_cpu(path, batch))


@pytest.mark.parametrize("backend", backends.CUDA, indirect=True)
def test_drafts_change_nothing(path: Path, backend: str) -> None:
    batch = repeating_requests()
    engine = make_engine(on_cuda(path, backend), draft_tokens=15)
    assert_same(complete(engine, batch), on_cpu(path, batch))
    assert engine.stats().num_accepted_tokens > 10


def note_launches(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each launch to come, whether it goes on from a step under way."""
    launches: list[bool] = []
    launch = engine._launch
    monkeypatch.setattr(
        engine, "_launch", lambda *args: launches.append(len(args) > 1) or launch(*args)
    )
    return launches


@pytest.mark.parametrize("backend", backends.CUDA, indirect=True)
def test_penalties_count_the_token_under_way(
    path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = dict.fromkeys(range(40, 48), 30.0)  # which come again and again
    fields = {"max_tokens": 14, "logprobs": 4, "ignore_eos": True, "logit_bias": few, "seed": 7}
    batch = [
        ([5], CompletionParams(**fields, temperature=0.0, frequency_penalty=2.0)),
        ([6], CompletionParams(**fields, presence_penalty=1.5, n=2)),
        ([7], CompletionParams(**fields | {"max_tokens": 9}, repetition_penalty=1.2)),
        ([8], CompletionParams(**fields)),
    ]
    engine = make_engine(on_cuda(path, backend))
    launches = note_launches(engine, monkeypatch)
    assert_same(complete(engine, batch), on_cpu(path, batch))
    assert launches == [False, False, *[True] * 12]


@pytest.mark.parametrize("backend", backends.CUDA, indirect=True)
@pytest.mark.parametrize("num_pages", [None, CONTEXT // PAGE_SIZE + 4])
def test_steps_started_ahead_change_nothing(
    path: Path, backend: str, num_pages: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = [requests()[idx] for idx in FREE]
    # Some end by a token or a text that only shows once the next step is under way.
    for idx, answer in enumerate(on_cpu(path, batch)):
        ids = answer[0].token_ids
        fields = {"stop_token_ids": [ids[8]]} if idx % 2 else {"max_tokens": 12 + idx}
        prompt, params = batch[idx]
        batch[idx] = prompt, dataclasses.replace(params, **fields)
    engine = make_engine(on_cuda(path, backend), num_pages=num_pages)
    launches = note_launches(engine, monkeypatch)
    assert_same(complete(engine, batch), on_cpu(path, batch))
    assert sum(launches) > len(launches) / 4
    assert engine.stats().num_used_pages == 0


@pytest.mark.parametrize("backend", backends.CUDA, indirect=True)
@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_float32(path: Path, backend: str, dtype: str) -> None:
    """As it runs on a GPU, with tensor cores: what the model says of a prompt, in two chunks."""
    prompt = requests()[5][0]
    batch = [(prompt, CompletionParams(max_tokens=1, echo=True, logprobs=1, temperature=0.0))]
    engine = make_engine(on_cuda(path, backend, dtype), token_budget=40)
    ((choice,),), ((want,),) = complete(engine, batch), on_cpu(path, batch)
    assert choice.logprobs is not None
    assert want.logprobs is not None
    got, right = (np.array(piece.logprobs.token_logprobs[1:]) for piece in (choice, want))
    assert np.abs(got - right).mean() < (0.1 if dtype == "bfloat16" else 0.02)


@pytest.mark.parametrize("backend", backends.CUDA, indirect=True)
def test_only_choices_from_the_models_own_rows_are_kept(backend: str) -> None:
    """A gathered copy of rows lives for one call: what is kept of it would fill the memory."""
    from fullbeam.engine.cuda import CudaDevice

    device = CudaDevice("cuda" if backend == "cuda" else "cpu", dtype="float32")
    options = {"token_ids": np.array([3, 5], np.int32)}
    with device.active():
        rows = device.zeros((4, 40), "float32")
        for level in range(3):
            rows[:] = torch.arange(40) * (level + 1.0)
            for logits, num_kept in ((rows[[1, 0]], min(level, 1)), (rows[:2], 1)):
                found = device.select(ops.logprobs, logits, options, num_top=1).read()
                logprobs = torch.log_softmax(logits.cpu(), 1)[[0, 1], [3, 5]]
                assert found[0] == pytest.approx(logprobs.numpy(), rel=1e-5)
                assert len(device._selections) == num_kept


@pytest.mark.parametrize("backend", backends.CUDA, indirect=True)
def test_programs_and_choices_come_and_go(backend: str) -> None:
    """Their memory goes with them, at once, and the next ones get some."""
    from fullbeam.engine.cuda import CudaDevice

    device = CudaDevice("cuda" if backend == "cuda" else "cpu", dtype="float32")
    options = {"token_ids": np.array([3], np.int32)}
    with device.active():
        counts, logits = device.zeros((4,), "int32"), device.zeros((2, 40), "float32")
        for _ in range(2):
            program = device.program(lambda: counts.add_(1))
            for _ in range(3):
                program.run()
                device.select(ops.logprobs, logits[:1], options, num_top=1).read()
            _, selection = device._selections.popitem()
            gone = weakref.ref(selection)
            del program, selection
            assert gone() is None
        assert counts.tolist() == [6] * 4


def test_a_full_gpu_says_what_to_lower() -> None:
    from fullbeam.engine.cuda import CudaDevice

    with (
        pytest.raises(ValueError, match=r"full: \d+ MiB are free: lower context or max_rows"),
        CudaDevice("cpu").active(),
    ):
        raise torch.OutOfMemoryError
