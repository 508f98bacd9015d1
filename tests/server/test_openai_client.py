# SPDX-License-Identifier: Apache-2.0
"""The `openai` package against a server that runs: every field, as the engine understands it.

A field's answer has to be that of `Model.complete` with the parameters that the field stands for,
and has to differ from the answer without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import openai
import pytest

import fake_model
from fullbeam.engine.engine import Engine
from fullbeam.model import Model
from fullbeam.models.vocabulary import InfillTokens
from fullbeam.results import Completion
from fullbeam.server import openai_fields, schema
from server_harness import serving

Json = dict[str, Any]

ANSWER: Json = schema.completion_responses()[200]["content"]["application/json"]["schema"]
PROMPT = "abc d"
BASE: Json = {"prompt": PROMPT, "max_tokens": 24, "seed": 5}


class Tokenizer(fake_model.FakeTokenizer):
    infill = InfillTokens(prefix=22, suffix=21, middle=20)  # type: ignore[assignment]


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    decoder: Any = fake_model.FakeDecoder(256)
    with Model(Engine(decoder, Tokenizer(), page_size=4), name="fake") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def api(model: Model) -> Iterator[openai.OpenAI]:
    """A client of a server that runs in a thread."""
    with (
        serving(model, max_logprobs=8) as url,
        openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client,
    ):
        yield client


def ask(api: openai.OpenAI, **fields: Any) -> Json:
    """Complete; fields that the package does not know go into the extra body."""
    body = BASE | fields
    known = {"prompt", "suffix", "max_tokens", "temperature", "top_p", "n", "best_of", "logprobs"}
    known |= {"echo", "stop", "presence_penalty", "frequency_penalty", "logit_bias", "seed", "user"}
    own = {name: value for name, value in body.items() if name in known}
    extra = {name: value for name, value in body.items() if name not in known}
    answer = api.completions.create(model="fake", **own, extra_body=extra).to_dict()
    jsonschema_rs.validate(ANSWER, answer)
    return without_identity(answer)


def without_identity(answer: Json) -> Json:
    return {name: value for name, value in answer.items() if name not in ("id", "created")}


def shown(result: Completion) -> list[Json]:
    """Choices as `model.complete` returns them, in the words of the wire."""
    return [
        {
            "text": choice.text,
            "index": choice.index,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            "logprobs": None
            if choice.logprobs is None
            else {
                name: getattr(choice.logprobs, name)
                for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
            },
        }
        for choice in result.choices
    ]


# Fields of the wire, fields of CompletionParams that they mean, fields of both questions.
DRAWN: dict[str, tuple[Json, Json, Json]] = {
    "max_tokens": ({"max_tokens": 3}, {"max_tokens": 3}, {}),
    "min_tokens": ({"min_tokens": 20}, {"min_tokens": 20}, {"logit_bias": {"1": 4}}),
    "temperature": ({"temperature": 0}, {"temperature": 0}, {}),
    "top_p": ({"top_p": 0.2}, {"top_p": 0.2}, {}),
    "top_k": ({"top_k": 2}, {"top_k": 2}, {}),
    "min_p": ({"min_p": 0.7}, {"min_p": 0.7}, {}),
    "presence_penalty": ({"presence_penalty": 2}, {"presence_penalty": 2}, {"ignore_eos": True}),
    "frequency_penalty": ({"frequency_penalty": 2}, {"frequency_penalty": 2}, {"ignore_eos": True}),
    "repetition_penalty": ({"repetition_penalty": 3}, {"repetition_penalty": 3}, {}),
    "logit_bias": ({"logit_bias": {"10": 3.5, "6": -100}}, {"logit_bias": {10: 3.5, 6: -100}}, {}),
    "allowed_token_ids": ({"allowed_token_ids": [2, 3]}, {"allowed_token_ids": [2, 3]}, {}),
    "bad_words": ({"bad_words": ["a", "dd"]}, {"bad_words": ["a", "dd"]}, {"ignore_eos": True}),
    "seed": ({"seed": -6}, {"seed": -6}, {}),
    "n": ({"n": 3}, {"n": 3}, {}),
    "best_of": ({"best_of": 4}, {"best_of": 4}, {}),
    "best_of=1": ({"best_of": 1, "n": 2}, {"n": 2}, {}),
    "stop": ({"stop": ["c", "d"]}, {"stop": ["c", "d"]}, {"ignore_eos": True}),
    "stop_token_ids": ({"stop_token_ids": [10]}, {"stop_token_ids": [10]}, {}),
    "include_stop_str_in_output": (
        {"include_stop_str_in_output": True},
        {"include_stop_str_in_output": True},
        {"ignore_eos": True, "stop": "c"},
    ),
    "ignore_eos": ({"ignore_eos": True}, {"ignore_eos": True}, {"logit_bias": {"1": 4}}),
    "skip_special_tokens": (
        {"skip_special_tokens": False},
        {"skip_special_tokens": False},
        {"logit_bias": {"0": 4}},
    ),
    "add_special_tokens": ({"add_special_tokens": False}, {"add_special_tokens": False}, {}),
    "logprobs": ({"logprobs": 2}, {"logprobs": 2}, {}),
    "return_tokens_as_token_ids": (
        {"return_tokens_as_token_ids": True},
        {"return_tokens_as_token_ids": True},
        {"logprobs": 1, "echo": True},
    ),
    "echo": ({"echo": True}, {"echo": True}, {}),
    "suffix": ({"suffix": "dd"}, {"suffix": "dd"}, {}),
    "token_healing": ({"token_healing": True}, {"token_healing": True}, {}),
    "truncate_prompt_tokens": ({"truncate_prompt_tokens": 2}, {"truncate_prompt_tokens": 2}, {}),
}

WIDE: Json = {"use_beam_search": True, "beam_width": 6, "n": 3, "max_tokens": 6, "logprobs": 0}
SEARCHED: dict[str, tuple[Json, Json, Json]] = {
    "use_beam_search": ({"use_beam_search": True}, {"beam_size": 1}, {}),
    "use_beam_search n": ({"use_beam_search": True}, {"beam_size": 3}, {"n": 3}),
    "use_beam_search best_of": (
        {"use_beam_search": True},
        {"n": 2, "beam_size": 5},
        {"n": 2, "best_of": 5},
    ),
    "beam_width": ({"beam_width": 8}, {"beam_size": 8}, WIDE),
    "length_penalty": ({"length_penalty": -3}, {"length_penalty": -3}, WIDE),
    "diversity_groups": (
        {"diversity_groups": 3},
        {"beam_size": 2, "diversity_groups": 3, "diversity_strength": 0},
        WIDE,
    ),
    "diversity_strength": (
        {"diversity_strength": 1.5},
        {"beam_size": 2, "diversity_groups": 3, "diversity_strength": 1.5},
        WIDE | {"diversity_groups": 3},
    ),
    "num_beam_groups": (
        {"num_beam_groups": 3},
        {"beam_size": 2, "diversity_groups": 3, "diversity_strength": 0},
        WIDE,
    ),
    "diversity_penalty": (
        {"diversity_penalty": 1.5},
        {"beam_size": 2, "diversity_groups": 3, "diversity_strength": 1.5},
        WIDE | {"diversity_groups": 3},
    ),
}

OF_THE_SEARCH = (
    *("use_beam_search", "beam_width", "length_penalty", "diversity_groups", "diversity_strength"),
    *("prompt", "best_of"),
)


def as_params(wire: Json) -> Json:
    """Fields that both have, as CompletionParams takes them."""
    fields = {name: value for name, value in wire.items() if name not in OF_THE_SEARCH}
    if "logit_bias" in fields:
        fields["logit_bias"] = {int(key): value for key, value in fields["logit_bias"].items()}
    return fields


@pytest.mark.parametrize("name", DRAWN)
def test_fields_of_a_draw(api: openai.OpenAI, model: Model, name: str) -> None:
    wire, fields, of_both = DRAWN[name]
    answer = ask(api, **of_both, **wire)
    expected = model.complete(PROMPT, **as_params(BASE | of_both) | fields)
    assert answer["choices"] == shown(expected)
    assert answer["usage"]["prompt_tokens"] == expected.usage.prompt_tokens
    assert answer["usage"]["completion_tokens"] == expected.usage.completion_tokens
    assert answer != ask(api, **of_both)


@pytest.mark.parametrize("name", SEARCHED)
def test_fields_of_a_search(api: openai.OpenAI, model: Model, name: str) -> None:
    wire, fields, of_both = SEARCHED[name]
    answer = ask(api, **of_both | wire)
    if "beam_width" in of_both:
        fields = {"beam_size": 6, **fields}
    expected = model.complete(PROMPT, **as_params(BASE | of_both) | fields)
    assert answer["choices"] == shown(expected)
    assert answer["usage"]["completion_tokens"] == expected.usage.completion_tokens
    assert answer != ask(api, **of_both)


@pytest.mark.parametrize(
    "name", ["temperature", "top_p", "top_k", "min_p", "presence_penalty", "repetition_penalty"]
)
def test_a_search_draws_nothing(api: openai.OpenAI, name: str) -> None:
    wire = {"use_beam_search": True, "beam_width": 4}
    assert ask(api, **wire, **DRAWN[name][0]) == ask(api, **wire)
    assert ask(api, **DRAWN[name][0], ignore_eos=True) != ask(api, ignore_eos=True)
    with pytest.raises(openai.BadRequestError) as caught:
        ask(api, **wire, **{name: 1000 if name != "top_k" else -5})
    assert caught.value.param == name


def test_every_field_has_a_test() -> None:
    drawn = {name for name in DRAWN if "=" not in name}
    assert drawn | {"prompt_logprobs"} == openai_fields.PARAM_NAMES
    assert {*openai_fields.SEARCH_NAMES, *openai_fields.ALIASES} <= set(SEARCHED)


@pytest.mark.parametrize(
    "prompt", ["", "ab", ["ab", "dd a"], [2, 3], [[2, 3], [4, 5, 6]], None, ["", "b"]]
)
def test_prompts(api: openai.OpenAI, model: Model, prompt: Any) -> None:
    assert ask(api, prompt=prompt, n=2)["choices"] == shown(
        model.complete(prompt, max_tokens=24, seed=5, n=2)
    )


def test_same_seed_same_answer_and_none_is_random(api: openai.OpenAI) -> None:
    assert ask(api) == ask(api)
    assert len({ask(api, seed=None)["choices"][0]["text"] for _ in range(8)}) > 1


def test_prompt_logprobs(api: openai.OpenAI, model: Model) -> None:
    (choice,) = ask(api, prompt=[2, 3, 4], prompt_logprobs=2)["choices"]
    (expected,) = model.complete([2, 3, 4], **as_params(BASE), prompt_logprobs=2).choices
    assert expected.prompt_logprobs is not None
    assert choice["prompt_logprobs"][0] is None
    for place, entry in zip(
        choice["prompt_logprobs"][1:], expected.prompt_logprobs[1:], strict=True
    ):
        assert entry is not None
        assert place == {
            str(token_id): {
                "logprob": value.logprob,
                "rank": value.rank,
                "decoded_token": value.decoded_token,
            }
            for token_id, value in entry.items()
        }
    (choice,) = ask(api, prompt=[2, 3], prompt_logprobs=-1)["choices"]
    assert len(choice["prompt_logprobs"][1]) == fake_model.VOCAB_SIZE
    assert "prompt_logprobs" not in ask(api)["choices"][0]


@pytest.mark.parametrize("fields", [{}, {"use_beam_search": True, "beam_width": 3}])
def test_token_ids(api: openai.OpenAI, model: Model, fields: Json) -> None:
    choices = ask(api, prompt=["ab", "dd"], n=2, return_token_ids=True, **fields)["choices"]
    options = {"beam_size": 3} if fields else {}
    expected = model.complete(["ab", "dd"], **as_params(BASE), n=2, **options).choices
    assert [choice["token_ids"] for choice in choices] == [choice.token_ids for choice in expected]
    prompts = [[fake_model.BOS, 8], [fake_model.BOS, 13]]
    assert [choice["prompt_token_ids"] for choice in choices] == [
        prompt for prompt in prompts for _ in range(2)
    ]
    assert "token_ids" not in ask(api)["choices"][0]


def test_tokens_may_be_named_by_their_ids(api: openai.OpenAI) -> None:
    fields: Json = {"prompt": [2, 3], "max_tokens": 4, "logprobs": 8, "echo": True}
    answer = ask(api, return_tokens_as_token_ids=True, return_token_ids=True, **fields)
    (choice,) = answer["choices"]
    ids = [*choice["prompt_token_ids"], *choice["token_ids"]]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token_id}" for token_id in ids]
    for name, top in zip(
        choice["logprobs"]["tokens"][1:], choice["logprobs"]["top_logprobs"][1:], strict=True
    ):
        assert 8 <= len(top) <= 9
        assert name in top
        assert all(key.startswith("token_id:") for key in top)


def test_bytes_that_are_no_character_and_minus_infinity(api: openai.OpenAI) -> None:
    fields: Json = {"logprobs": 0, "max_tokens": 1, "allowed_token_ids": [14]}
    logprobs = ask(api, **fields)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["bytes:\\xc3"]
    assert list(logprobs["top_logprobs"][0]) == ["bytes:\\xc3"]


def test_request_id_becomes_the_id(api: openai.OpenAI) -> None:
    create = api.completions.create
    answer = create(model="fake", prompt="a", extra_body={"request_id": "mine-7"})
    assert answer.id == "cmpl-mine-7"
    ids = {create(model="fake", prompt="a").id for _ in range(2)}
    assert len(ids) == 2


def test_hints_change_nothing(api: openai.OpenAI) -> None:
    hints: Json = {"user": "me", "priority": 3, "cache_salt": "x", "cache_prompt": False}
    assert set(hints) == set(openai_fields.WITHOUT_EFFECT)
    assert ask(api, **hints, no_such_field=[1]) == ask(api)


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 3},
        {"prompt": ["ab", "d"], "echo": True, "logprobs": 2, "n": 2},
        {"stop": ["cd", "b a"], "n": 4, "logprobs": 0},
        {"suffix": "dd", "echo": True},
        {"prompt": "d ab", "token_healing": True, "echo": True, "logprobs": 1},
        {"prompt": "a", "max_tokens": 0, "echo": True, "logprobs": 1},
        {"best_of": 1, "n": 2, "return_token_ids": True},
    ],
)
def test_streams_add_up_to_the_answer(api: openai.OpenAI, fields: Json) -> None:
    whole = ask(api, **fields)
    body = {"model": "fake", **BASE, **fields}
    extra = {name: body.pop(name) for name in ("token_healing", "return_token_ids") if name in body}
    events = list(
        api.completions.create(
            **body, stream=True, stream_options={"include_usage": True}, extra_body=extra
        )
    )
    usage = events.pop().to_dict()
    assert (usage["choices"], usage["usage"]) == ([], whole["usage"])
    assert len({(event.id, event.created, event.model) for event in events}) == 1
    choices: dict[int, Json] = {}
    for event in events:
        assert event.to_dict()["usage"] is None
        (part,) = event.to_dict()["choices"]
        choice = choices.setdefault(part["index"], part)
        if choice is part:
            continue
        assert choice["finish_reason"] is None
        choice["text"] += part["text"]
        choice["finish_reason"], choice["stop_reason"] = part["finish_reason"], part["stop_reason"]
        if "token_ids" in part:
            choice["token_ids"] += part["token_ids"]
            assert part["prompt_token_ids"] is None
        if part["logprobs"] is not None:
            for name, values in part["logprobs"].items():
                choice["logprobs"][name] += values
    assert [choices[index] for index in sorted(choices)] == whole["choices"]


def test_usage_of_a_stream_is_only_there_when_asked_for(api: openai.OpenAI) -> None:
    events = list(api.completions.create(model="fake", prompt="a", stream=True))
    assert all("usage" not in event.to_dict() for event in events)
    assert events[-1].choices[0].finish_reason is not None


WRONG: list[tuple[Json, str]] = [
    ({"temperature": 3}, "temperature"),
    ({"best_of": 21}, "best_of"),
    ({"best_of": 2, "n": 3}, "best_of"),
    ({"best_of": 3, "n": 2, "stream": True}, "best_of"),
    ({"logprobs": 9}, "logprobs"),
    ({"logit_bias": {"23": 1}}, "logit_bias"),
    ({"logit_bias": {"3": 101}}, "logit_bias"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"²": 1}}, "logit_bias"),
    ({"logit_bias": {"1" * 20: 1}}, "logit_bias"),
    ({"logit_bias": [[1, 2]]}, "logit_bias"),
    ({"allowed_token_ids": [23]}, "allowed_token_ids"),
    ({"min_tokens": 25}, "min_tokens"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"prompt_logprobs": -1, "n": 2}, "prompt_logprobs"),
    ({"token_healing": True, "prompt": [2, 3]}, "token_healing"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": 3, "suffix": "b"}, "truncate_prompt_tokens"),
    ({"use_beam_search": "yes"}, "use_beam_search"),
    ({"use_beam_search": True, "stream": True}, "use_beam_search"),
    ({"use_beam_search": True, "beam_width": 0}, "beam_width"),
    ({"use_beam_search": True, "beam_width": 17}, "beam_width"),
    ({"use_beam_search": True, "beam_width": 129}, "beam_width"),
    ({"use_beam_search": True, "beam_width": 2, "n": 3}, "n"),
    ({"use_beam_search": True, "beam_width": 2, "best_of": 3}, "best_of"),
    ({"use_beam_search": True, "beam_width": 6, "diversity_groups": 4}, "diversity_groups"),
    ({"use_beam_search": True, "diversity_groups": 2}, "diversity_groups"),
    ({"use_beam_search": True, "diversity_groups": 0}, "diversity_groups"),
    ({"use_beam_search": True, "diversity_strength": -1}, "diversity_strength"),
    ({"use_beam_search": True, "length_penalty": 11}, "length_penalty"),
    ({"use_beam_search": True, "length_penalty": "1"}, "length_penalty"),
    ({"use_beam_search": True, "max_tokens": 0}, "max_tokens"),
    ({"beam_width": 2}, "beam_width"),
    ({"length_penalty": 2}, "length_penalty"),
    ({"diversity_groups": 2}, "diversity_groups"),
    ({"diversity_penalty": 1}, "diversity_strength"),
    (
        {"use_beam_search": True, "diversity_groups": 1, "num_beam_groups": 2, "beam_width": 2},
        "num_beam_groups",
    ),
    ({"request_id": 3}, "request_id"),
    ({"return_token_ids": 1}, "return_token_ids"),
    ({"suffix": 3}, "suffix"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG)
def test_wrong_values_raise_with_the_field(api: openai.OpenAI, fields: Json, param: str) -> None:
    body: Json = {"model": "fake", "prompt": PROMPT, "max_tokens": 24, **fields}
    with pytest.raises(openai.BadRequestError) as caught:
        api.post("/completions", body=body, cast_to=object)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert caught.value.code is None
    assert param in caught.value.message


def test_neutral_fields_of_a_search_need_none(api: openai.OpenAI) -> None:
    neutral: Json = {"use_beam_search": False, "length_penalty": 1.0, "diversity_groups": 1}
    assert ask(api, **neutral, diversity_penalty=0) == ask(api)


def test_a_prompt_that_does_not_fit(api: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(api, prompt=[2] * 250)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "max_tokens")
    for number in ("256", "274", "250", "24"):
        assert number in caught.value.message
    assert ask(api, prompt=[2] * 250, max_tokens=None)["usage"]["completion_tokens"] <= 6
    assert ask(api, prompt=[2] * 250, truncate_prompt_tokens=-1)["usage"]["prompt_tokens"] == 232
    with pytest.raises(openai.BadRequestError) as caught:
        ask(api, prompt=[2] * 257, max_tokens=None)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")


def test_unknown_models_and_urls(api: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        api.completions.create(model="other", prompt="a")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError) as caught:
        api.post("/nothing", body={}, cast_to=object)
    assert caught.value.code == "unknown_url"
