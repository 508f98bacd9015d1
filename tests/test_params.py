# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import math
import pickle
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest

from fullbeam.params import CompletionParams, ParameterError


def test_defaults() -> None:
    params = CompletionParams()
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (None, 1, 1, 0)
    assert (params.min_p, params.seed, params.n, params.logprobs) == (0, None, 1, None)
    assert (params.stop_strings, params.stop_ids) == ((), ())
    assert not params.ignore_eos
    assert not params.echo


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
        ("stop", ["x"] * 65),
        ("stop_token_ids", [-1]),
        ("logprobs", -1),
        ("logprobs", 101),
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
