# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fullbeam import ops, reference
from op_helpers import guarded, num_threads, strided

pytestmark = pytest.mark.usefixtures("isa")

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


def params(
    num_rows: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
) -> dict[str, Any]:
    counters = np.zeros((num_rows, 3), np.uint32)
    counters[:, 2] = np.arange(num_rows)
    return {
        "temperature": np.full(num_rows, temperature, np.float32),
        "top_k": np.full(num_rows, top_k, np.int32),
        "top_p": np.full(num_rows, top_p, np.float32),
        "min_p": np.full(num_rows, min_p, np.float32),
        "seeds": np.full(num_rows, seed, np.uint64),
        "counters": counters,
    }


def draws(row: Any, num_draws: int = 2000, **settings: Any) -> Any:
    """Many draws from one row; the row stride is 0."""
    logits = np.broadcast_to(np.array(row, np.float32), (num_draws, len(row)))
    return ops.sample(logits, **params(num_draws, **settings))


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), SETTINGS)
@pytest.mark.parametrize("vocab_size", [1, 2, 127, 128, 129, 1000, 2049, 5003])
def test_sample_draws_what_the_reference_draws(
    rng: Any, vocab_size: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = strided((rng.standard_normal((40, vocab_size)) * 3).astype(np.float32))
    settings = params(40, temperature, top_k, top_p, min_p, seed=123456789012345)
    with guarded((40,), "int32") as out:
        ops.sample(logits, **settings, out=out)
        np.testing.assert_array_equal(out, reference.sample(logits, **settings))


@pytest.mark.parametrize("sigma", [0.01, 1.0, 3.0, 8.0])
@pytest.mark.parametrize("setting", [(0, 0.9, 0.0), (0, 0.999, 0.0), (30000, 1.0, 0.0)])
def test_sample_finds_a_large_kept_set(
    rng: Any, sigma: float, setting: tuple[int, float, float]
) -> None:
    logits = (rng.standard_normal((4, 50257)) * sigma).astype(np.float32)
    settings = params(4, 1.0, *setting, seed=3)
    np.testing.assert_array_equal(
        ops.sample(logits, **settings), reference.sample(logits, **settings)
    )


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), SETTINGS)
def test_sample_follows_the_exact_distribution(
    rng: Any, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    row = (rng.standard_normal(50) * 1.5).astype(np.float32)
    settings: dict[str, Any] = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
    }  # fmt: skip
    probs = reference.sample_probs(row, **settings)
    num_draws = 20000
    counts = np.bincount(draws(row, num_draws, seed=11, **settings), minlength=50)
    assert not counts[probs == 0].any()
    expected = probs * num_draws
    common = expected >= 5
    pairs = [
        (counts[common], expected[common]),
        ([counts[~common].sum()], [expected[~common].sum()]),
    ]
    observed, wanted = (np.concatenate(part) for part in zip(*pairs, strict=True))
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    freedom = max(len(wanted) - 1, 1)
    chi_square = ((observed - wanted) ** 2 / wanted).sum()
    # Wilson and Hilferty's normal approximation, at 4 standard deviations
    limit = freedom * (1 - 2 / (9 * freedom) + 4 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi_square < limit


@pytest.mark.parametrize("vocab_size", [1, 2, 127, 128, 129, 300])
def test_sample_at_temperature_0_is_the_first_best_token(rng: Any, vocab_size: int) -> None:
    logits = rng.integers(-3, 3, (30, vocab_size)).astype(np.float32)
    out = ops.sample(logits, **params(30, 0.0, top_k=5, top_p=0.5, min_p=0.5))
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
    out = ops.sample(logits, **settings)
    np.testing.assert_array_equal(out, reference.sample(logits, **settings))
    assert out.tolist()[:4] == [-1] * 4
    assert (out[4:] >= 0).all()


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), SETTINGS)
def test_sample_never_draws_a_masked_token(
    rng: Any, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = np.full((200, 3000), -INF, np.float32)
    allowed = rng.permutation(3000)[:7]
    logits[:, allowed] = rng.standard_normal((200, 7))
    out = ops.sample(logits, **params(200, temperature, top_k, top_p, min_p))
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
    counts = np.bincount(draws([1.0, 300.0, -1e30, -INF], 6000, temperature=3e38), minlength=4)
    assert counts[3] == 0
    assert (abs(counts[:3] - 2000) < 200).all()


def test_sample_of_a_row_depends_on_nothing_but_the_row(rng: Any) -> None:
    logits = (rng.standard_normal((12, 3001)) * 3).astype(np.float32)
    settings = params(12)
    for idx, setting in enumerate([(0.0, 0, 1.0, 0.0), *SETTINGS]):
        for name, value in zip(["temperature", "top_k", "top_p", "min_p"], setting, strict=True):
            settings[name][idx] = value
    together = ops.sample(logits, **settings)
    for row in range(12):
        alone = {name: values[row : row + 1] for name, values in settings.items()}
        assert ops.sample(logits[row : row + 1], **alone) == together[row]
    for count in (1, 3):
        with num_threads(count):
            np.testing.assert_array_equal(ops.sample(logits, **settings), together)


def test_sample_draws_anew_for_every_part_of_the_key() -> None:
    row, num_draws = np.zeros((1, 4096), np.float32), 5
    tokens = []
    for part in range(4):
        for value in range(1, num_draws):
            settings = params(1)
            if part < 3:
                settings["counters"][0, part] = value
            else:
                settings["seeds"][0] = value << 40
            tokens.append(int(ops.sample(row, **settings)[0]))
            np.testing.assert_array_equal(ops.sample(row, **settings), tokens[-1])
    assert len(set(tokens)) == len(tokens)


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


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("temperature", -1, "temperature must be finite and at least 0, got -1"),
        ("temperature", NAN, "temperature must be finite and at least 0, got nan"),
        ("temperature", INF, "temperature must be finite and at least 0, got inf"),
        ("top_p", 1.5, r"top_p must be in \[0, 1\], got 1.5"),
        ("top_p", NAN, r"top_p must be in \[0, 1\], got nan"),
        ("min_p", -0.25, r"min_p must be in \[0, 1\], got -0.25"),
    ],
)
def test_sample_refuses_values_out_of_range(name: str, value: float, text: str) -> None:
    settings = params(3)
    settings[name][2] = value
    with pytest.raises(ValueError, match=f"^sample: {text}$"):
        ops.sample(np.zeros((3, 8), np.float32), **settings)


def test_sample_refuses_what_does_not_fit() -> None:
    logits, settings = np.zeros((3, 8), np.float32), params(3)
    with pytest.raises(TypeError, match=r"^sample: logits must be float32, got float16$"):
        ops.sample(logits.astype(np.float16), **settings)
    with pytest.raises(ValueError, match=r"^sample: top_k must be \[num_rows=3\], got \[2\]$"):
        ops.sample(logits, **{**settings, "top_k": np.zeros(2, np.int32)})
    with pytest.raises(
        ValueError, match=r"^sample: counters must be \[num_rows=3, 3\], got \[3, 2\]"
    ):
        ops.sample(logits, **{**settings, "counters": np.zeros((3, 2), np.uint32)})
    with pytest.raises(TypeError, match=r"^sample: seeds must be uint64, got int64$"):
        ops.sample(logits, **{**settings, "seeds": np.zeros(3, np.int64)})


def test_sample_takes_no_rows() -> None:
    assert ops.sample(np.zeros((0, 8), np.float32), **params(0)).shape == (0,)
    np.testing.assert_array_equal(ops.sample(np.zeros((2, 0), np.float32), **params(2)), -1)
