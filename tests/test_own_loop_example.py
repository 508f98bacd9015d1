# SPDX-License-Identifier: Apache-2.0
"""examples/own_loop.py over the fake model, by a clock that every step moves on."""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fake_model
from fullbeam import CompletionParams
from fullbeam.engine.engine import Engine
from fullbeam.models.catalog import resolve

EXAMPLE = Path(__file__).parents[1] / "examples" / "own_loop.py"
PAGE_SIZE, MAX_ROWS, NUM_PAGES, MAX_HELD = 4, 4, 24, 3
STEP_S = 0.1


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("own_loop", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["own_loop"] = module  # its dataclass looks there
    spec.loader.exec_module(module)
    return module


class TimedEngine(Engine):
    """A step takes STEP_S; after each one the engine is looked at."""

    def __init__(self, **options: Any) -> None:
        options = {"num_pages": NUM_PAGES, "max_rows": MAX_ROWS} | options
        super().__init__(
            fake_model.FakeDecoder(256),
            fake_model.FakeTokenizer(),
            page_size=PAGE_SIZE,
            draft_tokens=0,
            **options,
        )
        self.now = 0.0
        self.seen: list[Any] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0, "the loop turns without having anything to do"
        self.now += seconds

    def step(self) -> bool:
        is_busy = super().step()
        self.now += STEP_S * is_busy
        self.check()
        self.seen.append(self.stats())
        return is_busy


def loop_over(example: Any, engine: TimedEngine, **options: Any) -> Any:
    options = {"page_size": PAGE_SIZE, "max_held": MAX_HELD} | options
    return example.Loop(engine, clock=engine.clock, sleep=engine.sleep, **options)


def job(example: Any, prompt: str, *, at: float = 0.0, patience: float = 1e9, **fields: Any) -> Any:
    params = CompletionParams(**{"max_tokens": 12, "seed": 1, "ignore_eos": True} | fields)
    return example.Job(prompt, params, arrives_at=at, deadline=at + patience)


def texts(done: Any) -> list[str]:
    """What the client has read, of each choice."""
    pieces = list(iter(done.events.get_nowait, None))
    return [
        "".join(piece.text for piece in pieces if piece.index == idx)
        for idx in range(done.params.n)
    ]


def solo(of: Any) -> list[str]:
    ids = fake_model.FakeTokenizer().encode(of.prompt)
    return [fake_model.answer(ids, of.params, choice=idx)["text"] for idx in range(of.params.n)]


def assert_empty(engine: TimedEngine) -> None:
    stats = engine.stats()
    assert (stats.num_waiting, stats.num_running, stats.num_rows) == (0, 0, 0)
    assert stats.num_used_pages == 0


@pytest.mark.parametrize("seed", range(8))
def test_every_job_gets_its_own_answer_within_bounds(example: Any, seed: int) -> None:
    rng = random.Random(seed)
    jobs = [
        job(
            example,
            "".join(rng.choices("abcd ", k=rng.randint(1, 30))),
            at=rng.uniform(0, 6),
            patience=rng.choice([0.5, 2.0, 100.0, 100.0]),
            max_tokens=rng.randint(1, 20),
            n=rng.randint(1, 3),
            seed=rng.randrange(2**63),
        )
        for _ in range(30)
    ]
    engine = TimedEngine()
    loop_over(example, engine).run(jobs)
    assert_empty(engine)
    states = [each.state for each in jobs]
    assert set(states) == {"done", "late", "refused"}, "the seed shows too little"
    for each in jobs:
        if each.state == "done":
            assert texts(each) == solo(each)
        elif each.state == "late":
            pairs = zip(texts(each), solo(each), strict=True)
            assert all(whole.startswith(part) for part, whole in pairs)
            assert each.ended_at <= each.deadline + STEP_S + 1e-9
        else:
            assert each.started_at is None
            assert texts(each) == [""] * each.params.n
    assert max(stats.num_rows for stats in engine.seen) <= MAX_ROWS
    assert not any(stats.num_waiting for stats in engine.seen), "the engine had to queue"
    assert engine.stats().num_preemptions == 0, "pages were promised twice"


def test_a_deadline_frees_rows_and_pages_for_the_next(example: Any) -> None:
    hog = job(example, "abc", patience=1.0, max_tokens=60, n=4)
    heir = job(example, "abd", at=0.1, max_tokens=4)
    engine = TimedEngine(num_pages=80)
    loop_over(example, engine).run([hog, heir])
    assert (hog.state, heir.state) == ("late", "done")
    assert engine.seen[0].num_rows == MAX_ROWS
    assert hog.ended_at <= heir.started_at <= hog.ended_at + STEP_S
    assert texts(heir) == solo(heir)
    assert_empty(engine)


def test_jobs_are_held_in_order_and_refused_beyond_max_held(example: Any) -> None:
    jobs = [job(example, "ab", at=idx / 1000, n=MAX_ROWS) for idx in range(MAX_HELD + 3)]
    engine = TimedEngine(num_pages=40)
    loop_over(example, engine).run(jobs)
    assert [each.state for each in jobs] == ["done"] * (MAX_HELD + 1) + ["refused"] * 2
    starts = [each.started_at for each in jobs[: MAX_HELD + 1]]
    assert starts == sorted(starts)
    assert all(later >= each.ended_at for later, each in zip(starts[1:], jobs, strict=False))


def test_what_is_held_leaves_at_its_deadline(example: Any) -> None:
    hog = job(example, "abc", max_tokens=30, n=4)
    held = job(example, "abd", at=0.05, patience=1.0)
    engine = TimedEngine(num_pages=80)
    loop_over(example, engine).run([hog, held])
    assert (hog.state, held.state, held.started_at) == ("done", "late", None)
    assert held.ended_at <= held.deadline + STEP_S


def test_after_stop_none_is_accepted_and_the_rest_ends_within_its_grace(example: Any) -> None:
    quick = job(example, "ab", max_tokens=12)
    long = job(example, "abc", max_tokens=200)
    later = job(example, "ab", at=100.0)
    engine = TimedEngine(num_pages=80)
    loop = loop_over(example, engine, grace_s=2.0)

    quick_put = quick.events.put
    quick.events = type(
        "Events", (), {"put": lambda self, event: (loop.stop(), quick_put(event))}
    )()
    loop.run([quick, long, later])
    assert [each.state for each in (quick, long, later)] == ["done", "late", "refused"]
    assert long.ended_at == pytest.approx(2.0, abs=3 * STEP_S)
    assert engine.now < 100
    assert_empty(engine)


def test_what_cannot_be_served_fails_alone(example: Any) -> None:
    wrong = job(example, "ab" * 100, max_tokens=100)
    right = job(example, "ab")
    engine = TimedEngine()
    loop_over(example, engine).run([wrong, right])
    assert (wrong.state, right.state) == ("failed", "done")


def test_an_engine_at_fault_leaves_no_client_waiting(example: Any) -> None:
    jobs = [job(example, "ab"), job(example, "abc")]
    engine = TimedEngine()
    engine._runner._decoder.fail_at = 3
    loop_over(example, engine).run(jobs)
    assert [each.state for each in jobs] == ["failed", "failed"]
    for each in jobs:
        texts(each)  # ends


def test_a_loop_that_fails_leaves_no_client_waiting(
    example: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [job(example, "ab", n=MAX_ROWS), job(example, "ab"), job(example, "ab", at=100.0)]
    engine = TimedEngine(num_pages=40)
    monkeypatch.setattr(engine, "step", lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        loop_over(example, engine).run(jobs)
    assert [each.state for each in jobs] == ["failed", "refused", "refused"]
    for each in jobs:
        texts(each)  # ends


def test_the_command_prints_a_table() -> None:
    try:
        resolve(None)
    except (ValueError, OSError) as error:
        pytest.skip(f"the default model can't be had: {error}")
    command = [sys.executable, str(EXAMPLE)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    head, *rows = done.stdout.splitlines()
    assert head.split()[:2] == ["arrived", "state"]
    assert len(rows) == 16
    assert {row.split()[1] for row in rows} <= {"done", "late", "refused"}
    assert rows[0].split()[1] == "done"
