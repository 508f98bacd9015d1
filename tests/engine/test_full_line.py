# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fullbeam.engine.full_line import FullLine, Hypothesis, best_score, length_factor, rank_score

FIRST, SECOND = (0.3, 2.0), (2.0, 0.7)  # bases and powers of the examples


def full_line(**given: Any) -> FullLine:
    defaults: dict[str, Any] = {
        "mode": "FULL_LINE",
        "constraint": b"",
        "prefix": "",
        "only_full_lines": True,
        "len_norm": FIRST,
        "length_penalty": 1.0,
        "alike": None,
        "keep_kinds": ("short", "prob"),
        "group_top_n": None,
        "top_n": None,
    }
    return FullLine(**(defaults | given))


def finished(text: str | bytes, p: float = 0.5, num_tokens: int = 1, group: int = 0) -> Hypothesis:
    data = text.encode() if isinstance(text, str) else text
    return Hypothesis(data, num_tokens, math.log(p), True, group)


def live(text: str | bytes, p: float = 0.5, num_tokens: int = 1, group: int = 0) -> Hypothesis:
    return finished(text, p, num_tokens, group)._replace(is_finished=False)


def texts(hypotheses: list[Hypothesis], **given: Any) -> list[str]:
    return [found.text for found in full_line(**given).suggestions(hypotheses)]


def text_of(hypothesis: Hypothesis, **given: Any) -> str | None:
    return full_line(**given).text(hypothesis)


# ---- scores (3.5)


@pytest.mark.parametrize(
    ("len_norm", "want"),
    [
        (FIRST, [1, 3.130178, 6.443787, 10.940828, 16.621302]),
        (SECOND, [1, 1.223086, 1.429862, 1.624505, 1.809605]),
        ((0.3, 0.0), [1] * 5),
    ],
)
def test_reference_length_factors(len_norm: tuple[float, float], want: list[float]) -> None:
    assert [length_factor(n, *len_norm) for n in range(1, 6)] == pytest.approx(want, abs=5e-7)


def test_length_factors_may_be_endless() -> None:
    assert length_factor(1000, 0.0, 1000.0) == math.inf
    assert rank_score(-5.0, 1000, (0.0, 1000.0), 1.0) == 1.0
    assert rank_score(-5.0, 1000, (0.0, -1000.0), 1.0) == 0.0
    assert rank_score(0.0, 1000, (0.0, -1000.0), 1.0) == 1.0


E1 = [
    ("b", True, 2, 0.180, (0.578204, 0.246098, 0.180)),
    ("ab", True, 3, 0.048, (0.624229, 0.119592, 0.048)),
    ("ac", True, 3, 0.042, (0.611427, 0.108929, 0.042)),
    ("aca", False, 3, 0.036, (0.596974, 0.097797, 0.036)),
    ("ac ", False, 3, 0.024, (0.560567, 0.073650, 0.024)),
]


@pytest.mark.parametrize(("text", "is_finished", "num_tokens", "p", "want"), E1)
def test_scores_of_the_first_example(
    text: str, is_finished: bool, num_tokens: int, p: float, want: tuple[float, ...]
) -> None:
    got = [rank_score(math.log(p), num_tokens, norm, 1.0) for norm in (FIRST, SECOND, (0.3, 0.0))]
    assert got == pytest.approx(want, abs=5e-7)


@pytest.mark.parametrize("only_full_lines", [True, False])
@pytest.mark.parametrize(
    ("more", "want"),
    [
        ({}, ["ab", "ac", "b"]),
        ({"len_norm": SECOND}, ["b", "ab", "ac"]),
        ({"top_n": 1}, ["ab"]),
        ({"top_n": 0}, []),
    ],
)
def test_suggestions_of_the_first_example(
    only_full_lines: bool, more: dict[str, Any], want: list[str]
) -> None:
    hypotheses = [
        Hypothesis(text.encode() + b"\n" * is_finished, num_tokens, math.log(p), is_finished, 0)
        for text, is_finished, num_tokens, p, _ in E1
    ]
    assert texts(hypotheses, only_full_lines=only_full_lines, **more) == want


def test_the_example_with_groups() -> None:
    hypotheses = [
        Hypothesis(b"b\n", 2, -1.714798, True, 0),
        Hypothesis(b"c\n", 2, -2.946942, True, 1),
    ]
    found = full_line().suggestions(hypotheses)
    assert [item.text for item in found] == ["b", "c"]
    assert [item.score for item in found] == pytest.approx([0.578204, 0.390057], abs=5e-7)
    third = [Hypothesis(b"a\n", 2, -2.302585, True, 2), hypotheses[0]]
    found = full_line().suggestions(third)
    assert [(item.text, item.source) for item in found] == [("b", 1), ("a", 0)]
    assert found[1].score == pytest.approx(0.479214, abs=5e-7)


@pytest.mark.parametrize("mode", ["FULL_LINE", "ONE_TOKEN"])
def test_the_example_with_a_prefix(mode: str) -> None:
    hypotheses = [
        finished("numpy\n", 0.34, 2),
        finished("num\n", 0.175, 2),
        live("numm", 0.0375, 2),
        live("numpym", 0.024, 2),
    ]
    found = full_line(mode=mode, constraint=b"num", prefix="num").suggestions(hypotheses)
    assert [item.text for item in found] == ["numpy"]
    assert found[0].score == pytest.approx(0.708470, abs=5e-7)
    assert rank_score(math.log(0.175), 2, FIRST, 1.0) == pytest.approx(0.573024, abs=5e-7)


def test_ranking_by_a_length_penalty() -> None:
    assert rank_score(-6.0, 3, None, 1.0) == -2.0
    assert rank_score(-6.0, 3, None, 0.0) == -6.0
    assert rank_score(-6.0, 2, None, -1.0) == -12.0


@given(
    st.floats(-50, 0),
    st.integers(1, 20),
    st.lists(st.floats(0, 5), min_size=1, max_size=20),
    st.one_of(st.none(), st.tuples(st.floats(-0.9, 5), st.floats(-5, 5))),
    st.floats(-5, 5),
)
def test_no_future_is_better_than_the_bound(
    logprob: float,
    num_tokens: int,
    costs: list[float],
    len_norm: tuple[float, float] | None,
    length_penalty: float,
) -> None:
    max_tokens = num_tokens + len(costs)
    bound = best_score(logprob, num_tokens, max_tokens, len_norm, length_penalty)
    for step in range(1, len(costs) + 1):
        later = logprob - sum(costs[:step])
        score = rank_score(later, num_tokens + step, len_norm, length_penalty)
        assert score <= bound or math.isclose(score, bound)
    free = [
        rank_score(logprob, n, len_norm, length_penalty)
        for n in range(num_tokens + 1, max_tokens + 1)
    ]
    assert bound == pytest.approx(max(free), rel=1e-12), "the bound could be tighter"


# ---- texts (2.5, 3.2, 3.6, 3.7.1)


@pytest.mark.parametrize(
    ("hypothesis", "more", "want"),
    [
        (finished("ab\ncd"), {}, "ab"),
        (finished("ab\r\ncd"), {}, "ab"),
        (finished("ab"), {}, "ab"),  # ended by an end token
        (finished("  a b  \n"), {}, "a b"),
        (finished("\n"), {}, None),
        (finished("   \n"), {}, None),
        (finished("a\tb\n"), {}, "a\tb"),
        (finished("a\x07b\n"), {}, None),
        (finished("a\rb\n"), {}, None),
        (finished("a\x85b\n"), {}, None),
        (finished(b"a\xe2\x82"), {}, None),
        (finished(b"a\xffb\n"), {}, None),
        (finished("abc;def"), {"stop_strings": ("ef", ";")}, "abc"),
        # a constraint as long as the prefix, longer, and shorter
        (finished("numpy\n"), {"constraint": b"num", "prefix": "num"}, "numpy"),
        (finished(" numpy\n"), {"constraint": b" num", "prefix": "num"}, "numpy"),
        (finished("mpy\n"), {"constraint": b"m", "prefix": "num"}, "numpy"),
        (finished(" numpy\n"), {"constraint": b" ", "prefix": ""}, "numpy"),
        (finished("num\n"), {"constraint": b"num", "prefix": "num"}, None),
        (finished("num  \n"), {"constraint": b"num", "prefix": "num"}, None),
        (finished("num  x\n"), {"constraint": b"num", "prefix": "num"}, "num  x"),
        (finished("nu"), {"constraint": b"num", "prefix": "num"}, None),
    ],
)
def test_text_of_a_finished_line(
    hypothesis: Hypothesis, more: dict[str, Any], want: str | None
) -> None:
    assert text_of(hypothesis, **more) == want


@pytest.mark.parametrize(
    ("text", "prefix", "want"),
    [
        ("foo(bar, ba", "", "foo(bar,"),
        ("foo(", "", "foo("),
        ("foo", "", None),
        ("foo.bar", "foo.b", None),
        ("foo.bar(x", "foo.b", "foo.bar("),
        ("é€é", "", "é€"),
        ("foo(é".encode()[:-1], "", "foo("),
        ("foo(€".encode()[:-1], "", "foo("),
        ("", "", None),
    ],
)
def test_an_unfinished_text_is_cut_behind_its_last_whole_word(
    text: str | bytes, prefix: str, want: str | None
) -> None:
    constraint = prefix.encode()
    assert text_of(live(text), prefix=prefix, constraint=constraint, only_full_lines=False) == want
    assert text_of(live(text), prefix=prefix, constraint=constraint) is None


@pytest.mark.parametrize(
    ("text", "prefix", "want"),
    [
        ("foo.bar", "", "foo"),
        ("foo", "", "foo"),
        (" = foo", "", "="),
        ("é1_ x", "", "é1_"),
        (" \n", "", None),
        ("numpy as", "num", "numpy"),
        ("num.py", "num", None),
        ("x.foo()", "x.", "x.foo"),
        (b"foo \xe2", "", "foo"),
        (b"fo\xe2 ", "", None),
    ],
)
def test_one_token_is_the_first_word(text: str | bytes, prefix: str, want: str | None) -> None:
    more: dict[str, Any] = {"mode": "ONE_TOKEN", "prefix": prefix, "constraint": prefix.encode()}
    assert text_of(finished(text), **more) == want
    assert text_of(live(text), only_full_lines=False, **more) is None


# ---- the list (3.7.2 to 3.7.5)


def test_the_same_text_keeps_its_highest_score() -> None:
    hypotheses = [finished("a", 0.2), finished("b", 0.3), finished("a ", 0.4, group=1)]
    found = full_line().suggestions(hypotheses)
    assert [(item.text, item.source) for item in found] == [("a", 2), ("b", 1)]


def test_equal_scores_stay_in_the_order_given() -> None:
    assert texts([finished("b"), finished("a"), finished("c")]) == ["b", "a", "c"]


def test_groups_are_cut_before_they_are_merged() -> None:
    hypotheses = [
        finished("a", 0.9),
        finished("a ", 0.8),
        finished("b", 0.7),
        finished("c", 0.1, group=1),
    ]
    assert texts(hypotheses, group_top_n=2) == ["a", "c"]
    assert texts(hypotheses, group_top_n=0) == []
    assert texts(hypotheses, top_n=2) == ["a", "b"]


ALIKE = [
    finished("abcdefghij", 0.5),
    finished("abcdefghijk", 0.4),
    finished("abcdefghi", 0.3),
    finished("xbcdefghij", 0.2),
    finished("q", 0.1),
]


@pytest.mark.parametrize(
    ("kinds", "want"),
    [
        (("prob",), [0, 3, 4]),
        (("short",), [2, 3, 4]),
        (("long",), [1, 3, 4]),
        (("short", "prob"), [0, 2, 3, 4]),
        (("prob", "long"), [0, 1, 3, 4]),
        (("short", "prob", "long"), [0, 1, 2, 3, 4]),
    ],
)
def test_of_texts_with_a_common_start_some_kinds_stay(
    kinds: tuple[str, ...], want: list[int]
) -> None:
    found = full_line(alike=(0.2, 0.0), keep_kinds=kinds).suggestions(ALIKE)
    assert [item.source for item in found] == want


def test_texts_with_few_edits_between_them_are_alike() -> None:
    found = full_line(alike=(0.0, 0.2), keep_kinds=("prob",)).suggestions(ALIKE)
    assert [item.source for item in found] == [0, 4]
    pair = [finished("kitten", 0.5), finished("sitting", 0.4)]  # three edits, of seven
    assert texts(pair, alike=(0.0, 3 / 7), keep_kinds=("prob",)) == ["kitten", "sitting"]
    assert texts(pair, alike=(0.0, 0.43), keep_kinds=("prob",)) == ["kitten"]


def test_a_text_is_compared_with_the_best_of_each_cluster_only() -> None:
    chain = [finished("aaaaaaaaaa", 0.5), finished("aaaaaaaaab", 0.4), finished("aaaaaaaabb", 0.3)]
    found = full_line(alike=(0.15, 0.0), keep_kinds=("prob",)).suggestions(chain)
    assert [item.source for item in found] == [0, 2]


def test_the_threshold_itself_is_not_alike() -> None:
    pair = [finished("abcd", 0.5), finished("abce", 0.4)]
    assert texts(pair, alike=(0.25, 0.0), keep_kinds=("prob",)) == ["abcd", "abce"]
    assert texts(pair, alike=(0.0, 0.0), keep_kinds=("prob",)) == ["abcd", "abce"]
