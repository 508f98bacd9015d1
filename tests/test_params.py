# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import math
import pickle
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import numpy as np
import pytest

from fullbeam.params import CompletionParams, ContextLengthError, ParameterError, field_schema


def test_defaults() -> None:
    params = CompletionParams()
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (None, 1, 1, 0)
    assert (params.min_p, params.seed, params.n, params.logprobs) == (0, None, 1, None)
    assert (params.stop_strings, params.stop_ids) == ((), ())
    assert not params.ignore_eos
    assert not params.echo
    assert (params.num_candidates, params.num_top, params.is_search, params.width) == (1, -1, 0, 0)
    assert not params.has_penalty


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 2),
        ("top_p", -0.5),
        ("top_p", math.nan),
        ("top_k", -2),
        ("top_k", 2**31),
        ("min_p", 1.5),
        ("min_p", math.nan),
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
        ("n", 0),
        ("n", 129),
        ("stop", ["x"] * 1025),
        ("stop_token_ids", [-1]),
        ("logprobs", -1),
        ("logprobs", 101),
        ("min_tokens", -1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", 101),
        ("logit_bias", {3: 100.5}),
        ("logit_bias", {-1: 0}),
        ("allowed_token_ids", [2**31]),
        ("bad_words", ["x"] * 65),
        ("best_of", -1),
        ("best_of", 129),
        ("prompt_logprobs", -2),
        ("prompt_logprobs", 101),
        ("context_len", 0),
        ("context_len", -2),
        ("truncate_prompt_tokens", 0),
        ("beam_size", 0),
        ("beam_size", 129),
        ("diversity_groups", 0),
        ("diversity_strength", -0.1),
        ("diversity_strength", math.inf),
        ("length_penalty", 11),
        ("len_norm_base", -1),
        ("len_norm_base", math.inf),
        ("len_norm_pow", -11),
        ("mode", "full_line"),
        ("top_n", -1),
        ("group_top_n", -1),
        ("min_prefix_dist", 1.1),
        ("min_edit_dist", -0.1),
        ("keep_kinds", ["short", "best"]),
        ("keep_kinds", []),
    ],
)
def test_values_out_of_range_name_the_field(field: str, value: Any) -> None:
    with pytest.raises(ParameterError, match=rf"^CompletionParams: {field} must be ") as caught:
        CompletionParams(**{field: value})
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", "3"),
        ("max_tokens", 3.0),
        ("max_tokens", True),
        ("temperature", "1"),
        ("temperature", None),
        ("top_p", True),
        ("top_k", 1.5),
        ("seed", 0.5),
        ("n", None),
        ("stop", 5),
        ("stop", [5]),
        ("stop", b"x"),
        ("stop_token_ids", "12"),
        ("stop_token_ids", 3),
        ("stop_token_ids", [1.5]),
        ("ignore_eos", 1),
        ("logprobs", True),
        ("echo", "yes"),
        ("min_tokens", 1.5),
        ("presence_penalty", "1"),
        ("frequency_penalty", None),
        ("repetition_penalty", True),
        ("logit_bias", 3),
        ("logit_bias", "ab"),
        ("logit_bias", ["ab"]),
        ("logit_bias", {"3": 1}),
        ("logit_bias", {3: "1"}),
        ("allowed_token_ids", None),
        ("allowed_token_ids", ["a"]),
        ("bad_words", 3),
        ("best_of", 2.0),
        ("include_stop_str_in_output", 1),
        ("skip_special_tokens", None),
        ("add_special_tokens", "no"),
        ("prompt_logprobs", True),
        ("return_tokens_as_token_ids", 1),
        ("suffix", b"x"),
        ("prefix", None),
        ("token_healing", 1),
        ("context_len", 5.0),
        ("truncate_prompt_tokens", "5"),
        ("beam_size", True),
        ("diversity_groups", None),
        ("diversity_strength", "1"),
        ("length_penalty", "1"),
        ("len_norm_base", []),
        ("len_norm_pow", "2"),
        ("mode", 1),
        ("only_full_lines", 1),
        ("group_answers", None),
        ("top_n", 2.5),
        ("group_top_n", "5"),
        ("min_prefix_dist", "0"),
        ("min_edit_dist", True),
        ("keep_kinds", 5),
    ],
)
def test_values_of_a_wrong_kind_name_the_field(field: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^CompletionParams: {field} must be "):
        CompletionParams(**{field: value})


def test_unknown_field_is_named_with_the_closest() -> None:
    with pytest.raises(TypeError, match="'tempratur' is not a known field; did you mean 'temp"):
        CompletionParams(tempratur=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"'zzz' is not a known field$"):
        CompletionParams(zzz=1)  # type: ignore[call-arg]


def test_stop_takes_one_or_several_and_leaves_out_empty_ones() -> None:
    assert CompletionParams(stop="ab").stop_strings == ("ab",)
    assert CompletionParams(stop=["", "b", "a", "b"]).stop_strings == ("b", "a")


def test_numbers_of_other_libraries_become_plain_ones() -> None:
    params = CompletionParams(n=np.int64(2), temperature=np.float32(0.5))  # type: ignore[arg-type]
    assert type(params.n) is int
    assert type(params.temperature) is float


def test_minus_one_switches_top_k_off() -> None:
    assert CompletionParams(top_k=-1).top_k == 0


def test_frozen_comparable_and_copyable() -> None:
    params = CompletionParams(n=2, stop="a")
    with pytest.raises(FrozenInstanceError):
        params.n = 3  # type: ignore[misc]
    assert replace(params, n=3).n == 3
    assert copy.deepcopy(params) == pickle.loads(pickle.dumps(params)) == params


@pytest.mark.parametrize(
    ("fields", "field", "requirement"),
    [
        ({"min_tokens": 3, "max_tokens": 2}, "min_tokens", "at most max_tokens = 2"),
        ({"best_of": 2, "n": 3}, "best_of", "at least n = 3"),
        ({"context_len": 3, "truncate_prompt_tokens": 3}, "truncate_prompt_tokens", "left out"),
        ({"max_tokens": 0, "beam_size": 2}, "max_tokens", "at least 1 beside beam_size"),
        ({"best_of": 2, "beam_size": 2}, "best_of", "left out beside beam_size"),
        ({"temperature": 0, "beam_size": 2}, "temperature", "left out beside beam_size"),
        ({"presence_penalty": 1, "beam_size": 2}, "presence_penalty", "left out beside beam_size"),
        ({"diversity_groups": 2}, "diversity_groups", "left out unless beam_size is given"),
        ({"diversity_strength": 1}, "diversity_strength", "left out unless beam_size is given"),
        ({"length_penalty": 0.5}, "length_penalty", "left out unless beam_size is given"),
        ({"len_norm_base": 0.5}, "len_norm_base", "left out unless beam_size is given"),
        ({"mode": "FULL_LINE"}, "mode", "left out unless beam_size is given"),
        ({"top_n": None}, "top_n", "left out unless beam_size is given"),
        ({"beam_size": 2, "top_n": 3}, "top_n", "left out unless mode is given"),
        ({"beam_size": 2, "group_answers": True}, "group_answers", "left out unless mode"),
        ({"beam_size": 2, "mode": "FULL_LINE", "n": 2}, "n", "left out beside mode"),
        ({"beam_size": 2, "mode": "FULL_LINE", "echo": True}, "echo", "left out beside mode"),
        ({"beam_size": 2, "mode": "FULL_LINE", "logprobs": 1}, "logprobs", "left out beside mode"),
        (
            {"beam_size": 2, "length_penalty": 1, "len_norm_pow": 0.7},
            "length_penalty",
            "left out beside len_norm_base and len_norm_pow",
        ),
        (
            {"beam_size": 2, "diversity_groups": 2, "n": 5},
            "n",
            r"at most beam_size \* diversity_groups = 4",
        ),
        ({"beam_size": 33, "diversity_groups": 4}, "diversity_groups", "at most 128 / beam_size"),
    ],
)
def test_values_that_do_not_go_together(
    fields: dict[str, Any], field: str, requirement: str
) -> None:
    with pytest.raises(ParameterError, match=f"{field} must be {requirement}.*, got ") as caught:
        CompletionParams(**fields)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"beam_size": 1}, "beam_size"),
        ({"best_of": 3, "n": 2}, "best_of"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
    ],
)
def test_what_cannot_be_streamed(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(ParameterError, match="left out of a streamed completion") as caught:
        CompletionParams(**fields).check_stream()
    assert caught.value.field == field
    CompletionParams(n=2, best_of=2, logprobs=1).check_stream()


@pytest.mark.parametrize(("best_of", "n", "expected"), [(0, 3, 3), (1, 3, 3), (3, 3, 3), (5, 3, 5)])
def test_candidates(best_of: int, n: int, expected: int) -> None:
    params = CompletionParams(best_of=best_of, n=n)
    assert params.num_candidates == expected
    assert params.num_top == (0 if expected > n else -1)  # ranking takes log-probabilities
    assert replace(params, logprobs=2).num_top == 2


def test_biases_are_plain_pairs_and_can_be_given_again() -> None:
    params = CompletionParams(logit_bias={np.int64(7): 1, 3: np.float32(-0.5)})  # type: ignore[dict-item]
    assert params.biases == ((3, -0.5), (7, 1.0))
    assert replace(params, n=2).biases == params.biases


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_penalties_need_the_tokens_so_far(name: str) -> None:
    assert CompletionParams(**{name: 1.5}).has_penalty  # type: ignore[arg-type]


def test_how_a_search_ranks() -> None:
    def ranking(**fields: Any) -> tuple[Any, float]:
        params = CompletionParams(beam_size=2, **fields)
        return params.len_norm, params.length_rank

    assert ranking() == (None, 1.0)
    assert ranking(length_penalty=0) == (None, 0.0)
    assert ranking(len_norm_base=2) == ((2.0, 2.0), 1.0)
    assert ranking(len_norm_pow=0) == ((0.3, 0.0), 1.0)
    assert ranking(mode="ONE_TOKEN") == ((0.3, 2.0), 1.0)
    assert ranking(mode="ONE_TOKEN", length_penalty=0.5) == (None, 0.5)


def test_when_suggestions_are_alike() -> None:
    def alike(**fields: Any) -> tuple[float, float] | None:
        return CompletionParams(beam_size=2, mode="FULL_LINE", **fields).alike

    assert alike() is None
    assert alike(min_prefix_dist=0, min_edit_dist=0) is None
    assert alike(group_answers=True) == (0.2, 0.0)
    assert alike(group_answers=True, min_edit_dist=0.5) == (0.0, 0.5)
    assert alike(min_prefix_dist=0.3) == (0.3, 0.0)


def test_an_empty_suffix_is_none() -> None:
    assert CompletionParams(suffix="").suffix is None


@pytest.mark.parametrize("name", [field.name for field in fields(CompletionParams)])
def test_schemas_are_those_of_the_checks(name: str) -> None:
    schema = field_schema(name)
    assert schema["description"]
    default = CompletionParams.__dataclass_fields__[name].default
    assert schema["default"] == (list(default) if isinstance(default, tuple) else default)
    beside: dict[str, Any] = {"mode": {"beam_size": 2}, "diversity_strength": {"beam_size": 2}}
    search = ("length_penalty", "len_norm_base", "len_norm_pow", "diversity_groups")
    beside |= {other: {"beam_size": 1} for other in search}
    suggest = {"beam_size": 2, "mode": "FULL_LINE"}
    suggestions = ("top_n", "group_top_n", "min_prefix_dist", "min_edit_dist", "keep_kinds")
    beside |= {other: suggest for other in suggestions}
    for option in schema.get("anyOf", [schema]):
        if "minimum" in option:
            low = option["minimum"]
            largest = {"min_tokens": {"max_tokens": None}}.get(name, {})
            CompletionParams(**{name: low}, **beside.get(name, {}), **largest)
            with pytest.raises(ParameterError):
                CompletionParams(**{name: low - 2}, **beside.get(name, {}))
        if "maximum" in option:
            CompletionParams(**{name: option["maximum"]}, **beside.get(name, {}))
            with pytest.raises(ParameterError):
                CompletionParams(**{name: option["maximum"] + 1}, **beside.get(name, {}))
        for word in option.get("enum", []):
            CompletionParams(**{name: word}, **beside.get(name, {}))


HUGE = {"number": 10**100_000, "text": "x" * 1_000_000, "list": [[1] * 100_000]}


def refusal(**given: Any) -> str:
    try:
        CompletionParams(**given)
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", HUGE)
@pytest.mark.parametrize("field", [field.name for field in fields(CompletionParams)])
def test_errors_name_the_field_and_show_little_of_huge_values(field: str, kind: str) -> None:
    text = refusal(**{field: HUGE[kind]})
    assert text == "" or text.startswith(f"CompletionParams: {field} must be ")
    assert len(text) < 250


def test_huge_numbers_are_out_of_range() -> None:
    with pytest.raises(ParameterError, match=r"temperature must be in 0\.\.2, got 1000000000"):
        CompletionParams(temperature=10**400)
    with pytest.raises(ParameterError, match=r"n must be in 1\.\.128, got one of too many digits$"):
        CompletionParams(n=10**100_000)
    with pytest.raises(TypeError, match=r"^CompletionParams: 'x{96}\.\.\. is not a known field$"):
        CompletionParams(**{"x" * 1_000_000: 1})
    error = ContextLengthError(limit=10, prompt_tokens=2, completion_tokens=10**100_000)
    assert "got one of too many digits (2 in the prompt, one of too many digits" in str(error)
