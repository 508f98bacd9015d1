# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from backends import CPU, CUDA, CUDA_OLD_AND_NEW, EMULATED
from fullbeam import ops, reference
from op_helpers import HALF_DTYPES, as_activation, guarded, num_threads, strided, wide
from sample_helpers import (
    ALL_EDITS,
    assert_follows,
    edits,
    of_one_row,
    packed,
    params,
    repeated,
)

pytestmark = pytest.mark.usefixtures("backend")

NAN, INF = float("nan"), float("inf")
# temperature, top_k, top_p, min_p
SETTINGS = [
    (1.0, 0, 1.0, 0.0),
    (0.7, 0, 1.0, 0.0),
    (1.0, 1, 1.0, 0.0),
    (1.0, 20, 1.0, 0.0),
    (1.3, 0, 0.9, 0.0),
    (1.0, 0, 0.05, 0.0),
    (1.0, 0, 1.0, 0.1),
    (0.8, 40, 0.95, 0.02),
    (5.0, 0, 0.999, 0.0),
    (5.0, 100, 0.99, 1e-6),
]


EDIT_KINDS = [kinds for count in range(4) for kinds in itertools.combinations(ALL_EDITS, count)]


def tokens(logits: Any, settings: dict[str, Any]) -> Any:
    return ops.sample(logits, **settings).token_ids


def expected_tokens(logits: Any, settings: dict[str, Any]) -> Any:
    return reference.sample(logits, **settings).token_ids


def is_emulated() -> bool:
    return hasattr(ops._core, "emulate_set_seed")


def fewer(count: int) -> int:
    """A tenth where every draw is emulated, some thousand times slower."""
    return count // 10 if is_emulated() else count


def draws(
    row: Any, num_draws: int = 2000, *, edit: dict[str, Any] | None = None, **settings: Any
) -> Any:
    """Many draws from one row; the row stride is 0. `edit`: that row's edits."""
    num_draws = fewer(num_draws)
    logits = np.broadcast_to(np.array(row, np.float32), (num_draws, len(row)))
    return tokens(logits, params(num_draws, **settings) | repeated(edit or {}, num_draws))


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), SETTINGS)
@pytest.mark.parametrize("vocab_size", [1, 2, 127, 128, 129, 1000, 2049, 5003])
def test_sample_draws_what_the_reference_draws(
    rng: Any, vocab_size: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = strided((rng.standard_normal((40, vocab_size)) * 3).astype(np.float32))
    settings = params(40, temperature, top_k, top_p, min_p, seed=123456789012345)
    with guarded((40,), "int32") as out:
        ops.sample(logits, **settings, out=ops.Sample(out))
        np.testing.assert_array_equal(out, reference.sample(logits, **settings).token_ids)


@pytest.mark.parametrize("sigma", [0.01, 1.0, 3.0, 8.0])
@pytest.mark.parametrize(
    "setting",
    [(0, 0.05, 0.0), (0, 0.9, 0.0), (0, 0.999, 0.0), (30000, 1.0, 0.0), (40000, 0.5, 1e-6)],
)
def test_sample_finds_a_large_kept_set(
    rng: Any, sigma: float, setting: tuple[int, float, float]
) -> None:
    logits = (rng.standard_normal((4, 50257)) * sigma).astype(np.float32)
    logits[2] = np.round(logits[2] * 2)  # many ties
    logits[3, ::12] += 4 * sigma  # tokens 12 apart are no sample of the row
    settings = params(4, 1.0, *setting, seed=3)
    np.testing.assert_array_equal(tokens(logits, settings), expected_tokens(logits, settings))


@pytest.mark.parametrize(("top_k", "top_p"), [(20000, 1.0), (0, 0.4)])
def test_sample_cuts_a_large_set_of_equal_tokens_by_id(top_k: int, top_p: float) -> None:
    size = fewer(50000)
    drawn = draws(np.zeros(size), 2 * 400, top_k=fewer(top_k), top_p=top_p)
    assert 0.38 * size < drawn.max() < 0.4 * size


def combinations() -> list[Any]:
    """All of temperature, top_k, top_p, min_p and edits; on CUDA the two ends of them."""
    every = list(itertools.product([1.0, 0.7], [0, 20], [1.0, 0.9], [0.0, 0.05], [(), ALL_EDITS]))
    return [
        *(pytest.param(isa, *case) for isa in CPU for case in every),
        *(pytest.param(name, *case) for name in CUDA for case in (every[0], every[-1])),
    ]


@pytest.mark.parametrize(
    ("backend", "temperature", "top_k", "top_p", "min_p", "kinds"),
    combinations(),
    indirect=["backend"],
)
def test_sample_follows_the_exact_distribution(
    rng: Any, temperature: float, top_k: int, top_p: float, min_p: float, kinds: tuple[str, ...]
) -> None:
    row = (rng.standard_normal(60) * 1.5).astype(np.float32)
    truncation = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    edit = of_one_row(edits(rng, 3, 60, kinds) | {"allowed_idx": np.zeros(3, np.int32)}, 1)
    if not kinds:
        del edit["allowed_idx"]
    edited = reference.edited_logits(row[None], 0, **edit)
    drawn = draws(row, 20000, seed=11, edit=edit, **truncation)
    assert_follows(drawn, reference.sample_probs(edited, **truncation))


@pytest.mark.parametrize("vocab_size", [1, 2, 127, 128, 129, 300])
def test_sample_at_temperature_0_is_the_first_best_token(rng: Any, vocab_size: int) -> None:
    logits = rng.integers(-3, 3, (30, vocab_size)).astype(np.float32)
    out = tokens(logits, params(30, 0.0, top_k=5, top_p=0.5, min_p=0.5))
    np.testing.assert_array_equal(out, logits.argmax(axis=1))


@pytest.mark.parametrize("setting", [{"top_k": 1}, {"top_p": 0.0}, {"temperature": 0.0}])
def test_sample_of_one_token_takes_the_lowest_id_among_equals(setting: dict[str, Any]) -> None:
    assert set(draws([-1.0, 2.0, 2.0, 2.0], **setting)) == {1}
    assert set(draws([-0.0, 0.0, -0.0], **setting)) == {0}


def test_sample_breaks_ties_by_lower_id_at_both_edges() -> None:
    row = [0.0, 1.0, 1.0, 1.0, 1.0, -1.0]
    assert set(draws(row, top_k=3)) == {1, 2, 3}
    assert set(draws([1.0] * 8, top_p=0.5)) == {0, 1, 2, 3}
    assert set(draws([1.0] * 8, min_p=1.0)) == set(range(8))
    assert set(draws([1.0] * 300, top_k=2)) == {0, 1}


def test_sample_renormalises_top_p_over_what_top_k_left() -> None:
    row = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    assert set(draws(row, top_p=0.55)) == {0, 1}
    assert set(draws(row, top_k=2, top_p=0.55)) == {0}


def test_sample_applies_min_p_after_temperature_and_before_top_p() -> None:
    row = np.log(np.array([0.5, 0.2, 0.2, 0.1], np.float32))
    assert set(draws(row, min_p=0.3)) == {0, 1, 2}
    assert set(draws(row, temperature=0.5, min_p=0.3)) == {0}
    assert set(draws(row, top_p=0.75)) == {0, 1, 2}
    assert set(draws(row, min_p=0.3, top_p=0.75)) == {0, 1}


@pytest.mark.parametrize("vocab_size", [5, 128, 300, 4000])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"), [(0.0, 0, 1.0, 0.0), *SETTINGS]
)
def test_sample_marks_rows_without_a_distribution(
    rng: Any, vocab_size: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = rng.standard_normal((6, vocab_size)).astype(np.float32)
    logits[0] = -INF
    logits[1, 0], logits[2, -1], logits[3, vocab_size // 2] = NAN, NAN, NAN
    logits[3, 1] = INF
    settings = params(6, temperature, top_k, top_p, min_p)
    out = tokens(logits, settings)
    np.testing.assert_array_equal(out, expected_tokens(logits, settings))
    assert out.tolist()[:4] == [-1] * 4
    assert (out[4:] >= 0).all()


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), SETTINGS)
def test_sample_never_draws_a_masked_token(
    rng: Any, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    num_rows = fewer(200)
    logits = np.full((num_rows, 3000), -INF, np.float32)
    allowed = rng.permutation(3000)[:7]
    logits[:, allowed] = rng.standard_normal((num_rows, 7))
    out = tokens(logits, params(num_rows, temperature, top_k, top_p, min_p))
    assert set(out.tolist()) <= set(allowed.tolist())


def test_sample_shares_the_mass_among_infinite_logits() -> None:
    row = [0.0, INF, -INF, INF, 50.0]
    assert set(draws(row)) == {1, 3}
    assert set(draws(row, top_k=3, top_p=0.9)) == {1, 3}
    assert set(draws(row, temperature=0.0)) == {1}


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-30, 1e-3])
@pytest.mark.parametrize("setting", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.01}])
def test_sample_of_tiny_temperature_is_the_best_token(
    temperature: float, setting: dict[str, Any]
) -> None:
    assert set(draws([1.0, 3.0, 2.0, -INF], temperature=temperature, **setting)) == {1}


def test_sample_of_huge_temperature_is_uniform() -> None:
    drawn = draws([1.0, 300.0, -1e30, -INF], 6000, temperature=3e38)
    shares = np.bincount(drawn, minlength=4) / len(drawn)
    assert shares[3] == 0
    assert (abs(shares[:3] - 1 / 3) < 5 / len(drawn) ** 0.5).all()


def test_sample_of_a_row_depends_on_nothing_but_the_row(rng: Any) -> None:
    logits = (rng.standard_normal((12, 3001)) * 3).astype(np.float32)
    settings = params(12)
    for idx, setting in enumerate([(0.0, 0, 1.0, 0.0), *SETTINGS]):
        for name, value in zip(["temperature", "top_k", "top_p", "min_p"], setting, strict=True):
            settings[name][idx] = value
    settings |= edits(rng, 12, 3001)
    together = tokens(logits, settings)
    for row in range(12):
        assert tokens(logits[row : row + 1], of_one_row(settings, row)) == together[row]
    for count in (1, 3):
        with num_threads(count):
            np.testing.assert_array_equal(tokens(logits, settings), together)


def test_sample_draws_anew_for_every_part_of_the_key() -> None:
    row, num_draws = np.zeros((1, 4096), np.float32), 5
    drawn = []
    for part in range(4):
        for value in range(1, num_draws):
            settings = params(1)
            if part < 3:
                settings["counters"][0, part] = value
            else:
                settings["seeds"][0] = value << 40
            drawn.append(int(tokens(row, settings)[0]))
            np.testing.assert_array_equal(tokens(row, settings), drawn[-1])
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("kinds", EDIT_KINDS)
@pytest.mark.parametrize("vocab_size", [1, 31, 128, 1003])
def test_sample_with_edits_is_as_the_reference(
    rng: Any, vocab_size: int, kinds: tuple[str, ...]
) -> None:
    num_rows = 2 * len(SETTINGS)
    logits = strided((rng.standard_normal((num_rows, vocab_size)) * 3).astype(np.float32))
    logits.flags.writeable = False
    settings = params(num_rows, seed=77) | edits(rng, num_rows, vocab_size, kinds)
    for row, setting in enumerate([(0.0, 0, 1.0, 0.0), *SETTINGS, *SETTINGS[1:]]):
        for name, value in zip(["temperature", "top_k", "top_p", "min_p"], setting, strict=True):
            settings[name][row] = value
    settings["num_top"] = rng.integers(-1, min(vocab_size, 6) + 1, num_rows).astype(np.int32)
    found, wanted = ops.sample(logits, **settings), reference.sample(logits, **settings)
    for name in ("token_ids", "ranks", "top_ids"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
    for name in ("logprobs", "top_logprobs", "log_sums"):
        np.testing.assert_allclose(
            getattr(found, name), getattr(wanted, name), rtol=2e-6, atol=2e-6
        )


def edited_by_op(row: Any, edit: dict[str, Any]) -> Any:
    """Each edited logit: the processed log-sum-exp of a row where nothing else is allowed."""
    size = len(row)
    settings = params(size) | repeated(edit, size)
    settings["allowed"], settings["allowed_idx"] = packed(np.eye(size) > 0), np.arange(size)
    settings["allowed_idx"] = settings["allowed_idx"].astype(np.int32)
    settings["num_top"] = np.zeros(size, np.int32)
    logits = np.broadcast_to(np.array(row, np.float32), (size, size))
    return ops.sample(logits, **settings).log_sums[:, 1]


def history(ids: list[int], counts: list[int], *penalties: float) -> dict[str, Any]:
    names = ("repetition_penalty", "frequency_penalty", "presence_penalty")
    return {
        "history_starts": np.int32([0, len(ids)]),
        "history_ids": np.int32(ids),
        "history_counts": np.int32(counts),
        **{name: np.float32([value]) for name, value in zip(names, penalties, strict=True)},
    }


def test_sample_penalises_as_the_worked_examples() -> None:
    row = [2, 1, 0.5, 0, -1]
    found = edited_by_op(row, history([0, 1, 2, 3, 4], [2, 1, 0, 0, 0], 1, 0.5, 0.25))
    np.testing.assert_array_equal(found, [0.75, 0.25, 0.5, 0, -1])
    found = edited_by_op(row, history([0, 4], [0, 0], 1.2, 0, 0))
    np.testing.assert_allclose(found, [1.666667, 1, 0.5, 0, -1.2], atol=1e-6)


def test_sample_counts_the_last_token_of_a_history_once_more() -> None:
    row, penalties = [2, 1, 0.5, 0, -1], (2, 0.5, 0.25)
    ids, counts = [0, 4, 2], [2, 0, 1]
    for last, with_last in [
        (0, ([0, 4, 2], [3, 0, 1])),
        (4, ([0, 4, 2], [2, 1, 1])),
        (1, ([0, 4, 2, 1], [2, 0, 1, 1])),
        (-1, (ids, counts)),
    ]:
        given = history(ids, counts, *penalties) | {"history_last": np.int32([last])}
        np.testing.assert_array_equal(
            edited_by_op(row, given), edited_by_op(row, history(*with_last, *penalties))
        )
    first = history([], [], *penalties) | {"history_last": np.int32([1])}
    np.testing.assert_array_equal(edited_by_op(row, first), [2, -0.25, 0.5, 0, -1])


def test_sample_adds_the_bias_before_the_penalties() -> None:
    bias = {
        "bias_starts": np.int32([0, 3]),
        "bias_ids": np.int32([0, 1, 0]),
        "bias_values": np.float32([-2, -np.inf, -1]),
    }
    found = edited_by_op([2, 1, 3], bias | history([0, 1, 2], [1, 1, 0], 2, 0.5, 0.25))
    np.testing.assert_array_equal(found, [-2.75, NAN, 1.5])


def test_sample_bans_infinite_logits_too() -> None:
    bias = {
        "bias_starts": np.int32([0, 1]),
        "bias_ids": np.int32([1]),
        "bias_values": np.float32([-np.inf]),
    }
    assert set(draws([0.0, INF, 1.0], edit=bias)) == {0, 2}


def test_sample_of_a_row_with_nothing_allowed_is_no_token(rng: Any) -> None:
    logits = rng.standard_normal((3, 70)).astype(np.float32)
    logits[1, 7] = -INF
    masks = np.zeros((2, 70), bool)
    masks[1, 7] = True
    settings = params(3) | {"allowed": packed(masks), "allowed_idx": np.int32([0, 1, 1])}
    found = ops.sample(logits, **settings, num_top=np.int32([1, 0, 1]))
    assert found.token_ids.tolist() == [-1, -1, 7]
    assert np.isnan(found.logprobs[:2]).all()
    assert found.ranks.tolist()[:2] == [0, 0]
    assert found.top_ids[:, 0].tolist() == [logits[0].argmax(), -1, logits[2].argmax()]
    assert np.isnan(found.log_sums[:2, 1]).all()
    assert np.isfinite(found.log_sums[:, 0]).all()


@pytest.mark.parametrize("vocab_size", [8, 129, 4000])
@pytest.mark.parametrize("kinds", [(), ALL_EDITS])
def test_sample_gives_the_bits_of_logprobs(
    rng: Any, vocab_size: int, kinds: tuple[str, ...]
) -> None:
    logits = (rng.standard_normal((24, vocab_size)) * 4).astype(np.float32)
    logits[3], logits[4, 1], logits[5, [2, 3]] = -INF, NAN, INF
    settings = params(24, 1.5, 50, 0.99) | edits(rng, 24, vocab_size, kinds)
    settings["temperature"][:8] = 0
    num_top = np.array([*range(-1, 7)] * 3, np.int32)
    found = ops.sample(logits, **settings, num_top=num_top)
    np.testing.assert_array_equal(found.token_ids, tokens(logits, settings))
    for row, count in enumerate(num_top.tolist()):
        if count < 0:
            assert np.isnan([found.logprobs[row], *found.log_sums[row]]).all()
            assert found.ranks[row] == 0
        else:
            wanted = ops.logprobs(
                logits[row : row + 1], found.token_ids[row : row + 1], num_top=count
            )
            tops = found.top_ids[row : row + 1, :count], found.top_logprobs[row : row + 1, :count]
            actual = (found.logprobs[row : row + 1], found.ranks[row : row + 1], *tops)
            for ours, theirs in zip(actual, wanted, strict=True):
                np.testing.assert_array_equal(ours, theirs)
        assert (found.top_ids[row, max(count, 0) :] == -1).all()
        assert np.isnan(found.top_logprobs[row, max(count, 0) :]).all()


def test_sample_sums_up_the_row_as_it_is_and_processed(rng: Any) -> None:
    logits = (rng.standard_normal((5, 700)) * 3).astype(np.float32)
    logits[4, 5] = INF
    settings = params(5) | {"num_top": np.zeros(5, np.int32)}
    settings["temperature"][:] = [0, 1, 0.5, 4, 1]
    sums = ops.sample(logits, **settings).log_sums
    wide = logits.astype(np.float64)
    np.testing.assert_allclose(sums[:4, 0], np.log(np.exp(wide[:4]).sum(axis=1)), rtol=1e-6)
    scaled = wide[:4] / np.array([[1], [1], [0.5], [4]])
    np.testing.assert_allclose(sums[:4, 1], np.log(np.exp(scaled).sum(axis=1)), rtol=1e-6)
    np.testing.assert_array_equal(sums[:2, 0], sums[:2, 1])
    np.testing.assert_array_equal(sums[4], [INF, INF])


FINITE = st.floats(-4, 4, width=32)


@st.composite
def small_rows(draw: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Logits of a few tokens, some of them equal; their edits; the truncation."""
    size = draw(st.integers(1, 12))
    values = FINITE | st.sampled_from([0.0, 1.0])
    row = np.float32(draw(st.lists(values, min_size=size, max_size=size)))
    token_ids = st.integers(0, size - 1)
    mask = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    biases = draw(st.lists(st.tuples(token_ids, FINITE | st.just(-INF)), max_size=4))
    seen = draw(st.lists(token_ids, unique=True))
    counts = [draw(st.integers(0, 2)) for _ in seen]
    last = draw(st.integers(-1, size - 1))
    penalties = draw(st.floats(0.5, 2, width=32)), draw(FINITE), draw(FINITE)
    edit = {
        "allowed": packed(np.array([mask])),
        "allowed_idx": np.int32([draw(st.sampled_from([-1, 0]))]),
        "bias_starts": np.int32([0, len(biases)]),
        "bias_ids": np.array([token_id for token_id, _ in biases], np.int32),
        "bias_values": np.array([value for _, value in biases], np.float32),
        **history(seen, counts, *penalties),
        "history_last": np.int32([last]),
    }
    truncation = {
        "temperature": draw(st.sampled_from([0.0, 0.7, 1.0, 3.0])),
        "top_k": draw(st.integers(0, size)),
        "top_p": draw(st.sampled_from([0.0, 0.3, 0.7, 0.95, 1.0])),
        "min_p": draw(st.sampled_from([0.0, 0.01, 0.3, 1.0])),
    }
    return row, edit, {name: float(np.float32(value)) for name, value in truncation.items()}


PROPERTY = hypothesis_settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@given(case=small_rows())
@PROPERTY
def test_sample_edits_in_float32(case: tuple[Any, dict[str, Any], dict[str, Any]]) -> None:
    row, edit, _ = case
    edit = {name: edit[name] for name in edit if not name.startswith("allowed")}
    edited = reference.edited_logits(row[None], 0, **edit)
    np.testing.assert_array_equal(
        edited_by_op(row, edit), np.where(edited == -np.inf, np.nan, edited)
    )


@given(case=small_rows())
@PROPERTY
def test_sample_keeps_the_tokens_that_float64_keeps(
    case: tuple[Any, dict[str, Any], dict[str, Any]],
) -> None:
    row, edit, truncation = case
    truncation["top_k"] = int(truncation["top_k"])
    probs = reference.sample_probs(reference.edited_logits(row[None], 0, **edit), **truncation)
    drawn = set(draws(row, 1000 if is_emulated() else 3000, edit=edit, **truncation).tolist())
    if not probs.any():
        assert drawn == {-1}
        return
    assert {*np.flatnonzero(probs > (0.2 if is_emulated() else 0.01)).tolist()} <= drawn
    assert drawn <= {*np.flatnonzero(probs).tolist()}


def test_sample_of_a_recorded_program_is_safe_with_any_data(rng: Any) -> None:
    num_rows, vocab_size = 8, 300
    logits = rng.standard_normal((num_rows, vocab_size)).astype(np.float32)
    settings = params(num_rows) | edits(rng, num_rows, vocab_size)
    settings["num_top"] = np.full(num_rows, 3, np.int32)
    with (
        guarded((num_rows,), "int32") as token_ids,
        guarded((num_rows,)) as logprobs,
        guarded((num_rows,), "int32") as ranks,
        guarded((num_rows, 5), "int32") as top_ids,
        guarded((num_rows, 5)) as top_logprobs,
        guarded((num_rows, 2), "float64") as log_sums,
    ):
        out = ops.Sample(token_ids, logprobs, ranks, top_ids, top_logprobs, log_sums)
        ops._core.start_recording()
        ops.sample(logits, **settings, out=out)
        program = ops._core.stop_recording()
        program.run()
        np.testing.assert_array_equal(token_ids, tokens(logits, _without(settings, "num_top")))
        for _ in range(30):
            for values in settings.values():
                values.view(np.uint8)[...] = rng.integers(0, 256, values.view(np.uint8).shape)
                if rng.random() < 0.3:
                    values[...] = rng.choice(np.array([0, 1, 2**20], values.dtype), values.shape)
            program.run()
            assert ((token_ids >= -1) & (token_ids < vocab_size)).all()


def _without(settings: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: values for key, values in settings.items() if key != name}


def test_philox_gives_its_published_answers() -> None:
    low = 2**32 - 1
    assert reference.philox(0, (0, 0, 0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert reference.philox(2**64 - 1, (low, low, low, low)) == (
        0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD,
    )  # fmt: skip
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert reference.philox(0x299F31D0A4093822, pi) == (
        0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1,
    )  # fmt: skip


def full_edits() -> dict[str, Any]:
    """Every argument, for 3 rows of 8 tokens."""
    entries = {
        "starts": np.int32([0, 1, 2, 4]),
        "ids": np.int32([0, 1, 2, 3]),
    }
    ones = np.ones(3, np.float32)
    return {
        "allowed": np.full((1, 1), 255, np.uint32),
        "allowed_idx": np.int32([-1, 0, 0]),
        **{f"bias_{name}": values.copy() for name, values in entries.items()},
        "bias_values": np.ones(4, np.float32),
        **{f"history_{name}": values.copy() for name, values in entries.items()},
        "history_counts": np.int32([0, 1, 2, 3]),
        "history_last": np.int32([-1, 7, 2]),
        "repetition_penalty": ones.copy(),
        "frequency_penalty": ones.copy(),
        "presence_penalty": ones.copy(),
        "num_top": np.int32([-1, 1, 0]),
    }


@pytest.mark.parametrize("backend", CPU, indirect=True)
@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("temperature", -1, "temperature must be finite and at least 0, got -1"),
        ("temperature", NAN, "temperature must be finite and at least 0, got nan"),
        ("temperature", INF, "temperature must be finite and at least 0, got inf"),
        ("top_p", 1.5, r"top_p must be in \[0, 1\], got 1.5"),
        ("top_p", NAN, r"top_p must be in \[0, 1\], got nan"),
        ("min_p", -0.25, r"min_p must be in \[0, 1\], got -0.25"),
        ("allowed_idx", 1, r"allowed_idx must be in -1\.\.0, got 1"),
        ("allowed_idx", -2, r"allowed_idx must be in -1\.\.0, got -2"),
        ("bias_starts", 0, "bias_starts must be ascending from 0 to num_biases=4, got 0 after 1"),
        ("bias_ids", 8, r"bias_ids must be in 0\.\.7, got 8"),
        ("bias_values", INF, "bias_values must be finite or -infinity, got inf"),
        ("bias_values", NAN, "bias_values must be finite or -infinity, got nan"),
        (
            "history_starts",
            5,
            "history_starts must be ascending from 0 to num_histories=4, got 4 after 5",
        ),
        ("history_ids", -1, r"history_ids must be in 0\.\.7, got -1"),
        ("history_counts", -1, r"history_counts must be in 0\.\.2147483647, got -1"),
        ("history_last", -2, r"history_last must be in -1\.\.7, got -2"),
        ("history_last", 8, r"history_last must be in -1\.\.7, got 8"),
        ("repetition_penalty", 0, "repetition_penalty must be finite and above 0, got 0"),
        ("frequency_penalty", NAN, "frequency_penalty must be finite, got nan"),
        ("presence_penalty", -INF, "presence_penalty must be finite, got -inf"),
        ("num_top", -2, r"num_top must be in -1\.\.1, got -2"),
    ],
)
def test_sample_refuses_values_out_of_range(name: str, value: float, text: str) -> None:
    settings = params(3) | full_edits()
    settings[name][2] = value
    with pytest.raises(ValueError, match=f"^sample: {text}$"):
        ops.sample(np.zeros((3, 8), np.float32), **settings)


def test_sample_refuses_what_does_not_fit() -> None:
    logits, settings = np.zeros((3, 8), np.float32), params(3)
    with pytest.raises(ValueError, match=r"^sample: top_k must be \[num_rows=3\], got \[2\]$"):
        ops.sample(logits, **{**settings, "top_k": np.zeros(2, np.int32)})
    with pytest.raises(
        ValueError, match=r"^sample: counters must be \[num_rows=3, 3\], got \[3, 2\]"
    ):
        ops.sample(logits, **{**settings, "counters": np.zeros((3, 2), np.uint32)})
    with pytest.raises(TypeError, match=r"^sample: seeds must be uint64, got int64$"):
        ops.sample(logits, **{**settings, "seeds": np.zeros(3, np.int64)})
    full = settings | full_edits()
    with pytest.raises(
        ValueError, match=r"^sample: allowed must be \[num_masks, 1\], got \[1, 2\]$"
    ):
        ops.sample(logits, **{**full, "allowed": np.zeros((1, 2), np.uint32)})
    with pytest.raises(ValueError, match=r"^sample: bias_starts must be \[4\], got \[3\]$"):
        ops.sample(logits, **{**full, "bias_starts": np.zeros(3, np.int32)})
    with pytest.raises(ValueError, match=r"^sample: num_top must be at most vocab_size=8, got 9$"):
        ops.sample(logits, **{**full, "num_top": np.int32([9, 0, 0])})


@pytest.mark.parametrize("backend", CPU, indirect=True)
def test_sample_refuses_what_the_cpu_can_see() -> None:
    logits, settings = np.zeros((3, 8), np.float32), params(3)
    with pytest.raises(TypeError, match=r"^sample: logits must be float32, got float16$"):
        ops.sample(logits.astype(np.float16), **settings)
    full = settings | full_edits()
    with pytest.raises(ValueError, match=r"^sample: bias_starts must be .*=4, got 1 at its start$"):
        ops.sample(logits, **{**full, "bias_starts": np.int32([1, 1, 2, 4])})
    with pytest.raises(ValueError, match=r"^sample: bias_starts must be .*=4, got 3 at its end$"):
        ops.sample(logits, **{**full, "bias_starts": np.int32([0, 1, 2, 3])})


@pytest.mark.parametrize(
    ("missing", "present"),
    [
        ("allowed", "allowed_idx"),
        ("allowed_idx", "allowed"),
        ("bias_starts", "bias_ids"),
        ("bias_ids", "bias_starts"),
        ("bias_values", "bias_starts"),
        ("history_starts", "history_ids"),
        ("history_ids", "history_starts"),
        ("history_counts", "history_starts"),
    ],
)
def test_sample_refuses_half_an_edit(missing: str, present: str) -> None:
    settings = _without(params(3) | full_edits(), missing)
    with pytest.raises(
        ValueError, match=f"^sample: {missing} must be given with {present}, got none$"
    ):
        ops.sample(np.zeros((3, 8), np.float32), **settings)


@pytest.mark.parametrize(
    "name", ["history_last", "repetition_penalty", "frequency_penalty", "presence_penalty"]
)
def test_sample_refuses_penalties_without_a_history(name: str) -> None:
    settings = params(3) | {name: full_edits()[name]}
    with pytest.raises(
        ValueError, match=f"^sample: history_starts must be given with {name}, got none$"
    ):
        ops.sample(np.zeros((3, 8), np.float32), **settings)


def test_sample_refuses_outputs_that_do_not_fit() -> None:
    logits, settings = np.zeros((3, 8), np.float32), params(3)
    token_ids = np.zeros(3, np.int32)
    with pytest.raises(
        ValueError, match=r"^sample: out.logprobs must be given with num_top, got none$"
    ):
        ops.sample(logits, **settings, num_top=np.zeros(3, np.int32), out=ops.Sample(token_ids))
    with pytest.raises(
        ValueError, match=r"^sample: num_top must be given with out.ranks, got none$"
    ):
        ops.sample(logits, **settings, out=ops.Sample(token_ids, ranks=np.zeros(3, np.int32)))


def test_sample_takes_no_rows() -> None:
    assert tokens(np.zeros((0, 8), np.float32), params(0)).shape == (0,)
    np.testing.assert_array_equal(tokens(np.zeros((2, 0), np.float32), params(2)), -1)


def mixed_settings(rng: Any, num_rows: int, vocab_size: int) -> dict[str, Any]:
    """Every kind of truncation, edits for most rows, and log-probabilities."""
    settings = params(num_rows, seed=5) | edits(rng, num_rows, vocab_size)
    every = itertools.cycle([(0.0, 0, 1.0, 0.0), *SETTINGS, (2.0, 1500, 0.98, 0.0)])
    for row, setting in zip(range(num_rows), every, strict=False):
        for name, value in zip(["temperature", "top_k", "top_p", "min_p"], setting, strict=True):
            settings[name][row] = value
    return settings | {"num_top": (np.arange(num_rows) % 5 - 1).astype(np.int32)}


@pytest.mark.parametrize("backend", CUDA_OLD_AND_NEW, indirect=True)
@pytest.mark.parametrize("vocab_size", [1025, 16385])
def test_sample_of_several_parts_of_a_row_is_as_the_reference(rng: Any, vocab_size: int) -> None:
    logits = strided((rng.standard_normal((14, vocab_size)) * 3).astype(np.float32))
    logits[12:] = np.round(logits[12:])
    settings = mixed_settings(rng, 14, vocab_size)
    found, wanted = ops.sample(logits, **settings), reference.sample(logits, **settings)
    for name in ("token_ids", "ranks", "top_ids"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
    for name in ("logprobs", "top_logprobs", "log_sums"):
        np.testing.assert_allclose(
            getattr(found, name), getattr(wanted, name), rtol=2e-6, atol=2e-6
        )


@pytest.mark.parametrize("backend", ["emulated"], indirect=True)
def test_sample_gives_the_same_bits_in_clusters_and_without(rng: Any) -> None:
    logits = (rng.standard_normal((26, 9001)) * 2).astype(np.float32)
    logits[20], logits[21, 5], logits[22, [3, 8000]] = -INF, NAN, INF
    settings = mixed_settings(rng, 26, 9001)
    clusters = ops.sample(logits, **settings)
    for without in ("emulated_slice", "emulated_sm80", "emulated_sm120"):
        ops._core.emulate_set_device(*EMULATED[without])
        for ours, theirs in zip(clusters, ops.sample(logits, **settings), strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("backend", CUDA_OLD_AND_NEW, indirect=True)
def test_sample_gives_the_same_bits_wherever_a_row_lies(rng: Any) -> None:
    memory = rng.standard_normal(4 * 2052 + 8).astype(np.float32)
    logits = memory[: 4 * 2052].reshape(4, 2052)
    settings = mixed_settings(rng, 4, 2052)
    for shift in (1, 2):
        moved = memory.copy()[shift : shift + 4 * 2052].reshape(4, 2052)
        moved[...] = logits
        again = ops.sample(moved, **settings)
        for ours, theirs in zip(ops.sample(logits, **settings), again, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("backend", CUDA_OLD_AND_NEW, indirect=True)
@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("vocab_size", [61, 2056, 2057])
def test_sample_of_half_floats_is_that_of_the_same_floats(
    rng: Any, vocab_size: int, dtype: str
) -> None:
    logits = as_activation(rng.standard_normal((13, vocab_size)) * 3, dtype)
    settings = mixed_settings(rng, 13, vocab_size)
    floats = ops.sample(wide(logits).astype(np.float32), **settings)
    for ours, theirs in zip(ops.sample(logits, **settings), floats, strict=True):
        np.testing.assert_array_equal(np.asarray(ours), theirs)


@pytest.mark.parametrize("backend", CUDA_OLD_AND_NEW, indirect=True)
def test_sample_on_cuda_adds_up_many_biases_of_one_token_in_order() -> None:
    values = np.float32([1e8, 1.0, -1e8, 0.5] * 150)
    bias = {
        "bias_starts": np.int32([0, 600]),
        "bias_ids": np.tile(np.int32([1, 1, 1, 2]), 150),
        "bias_values": values,
    }
    found = edited_by_op([0.0, 3.0, 1.0], bias)
    wanted = reference.edited_logits(np.float32([[0.0, 3.0, 1.0]]), 0, **bias)
    np.testing.assert_array_equal(found, wanted)
