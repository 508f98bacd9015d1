# SPDX-License-Identifier: Apache-2.0
"""`POST /v1/completions`: fields, answers and errors."""

from __future__ import annotations

import json
from typing import Any, TypeAlias

import pytest

from fullbeam.params import CompletionParams
from fullbeam.server import openai_fields

Client: TypeAlias = Any  # both are in conftest.py, which cannot be imported
FakeModel: TypeAlias = Any


def test_answer_has_the_documented_form(client: Client) -> None:
    body = client.post(model="fake", prompt="say", max_tokens=2).json()
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert isinstance(body["created"], int)
    assert body["model"] == "fake"
    assert body["system_fingerprint"].startswith("fp_")
    choice = {"text": " w0 w1", "index": 0, "logprobs": None, "finish_reason": "length"}
    assert body["choices"] == [choice | {"stop_reason": None}]
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


@pytest.mark.parametrize("path", ["/completions", "/v1/engines/fake/completions"])
def test_alias_routes(client: Client, path: str) -> None:
    assert client.send("POST", path, json={"prompt": "a"}).status_code == 200


def test_model_may_be_absent_but_not_unknown(client: Client) -> None:
    assert client.post(prompt="a").status_code == 200
    assert client.post(prompt="a", model=None).json()["model"] == "fake"
    error = client.error_of(404, prompt="a", model="other")
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    response = client.send("POST", "/v1/engines/o/ther/completions", json={"prompt": "a"})
    assert "'o/ther'" in client.error_in(response, 404)["message"]


@pytest.mark.parametrize("prompt", ["text", "", ["a", "b"], [1, 2, 3], [[1, 2], [3]], ["", "b"]])
def test_prompt_forms(client: Client, model: FakeModel, prompt: Any) -> None:
    assert client.post(prompt=prompt).status_code == 200
    assert model.calls[0][0] == prompt


@pytest.mark.parametrize("body", [{}, {"prompt": None}])
def test_absent_prompt_is_an_empty_document(
    client: Client, model: FakeModel, body: dict[str, Any]
) -> None:
    assert client.post(**body).status_code == 200
    assert model.calls[0][0] == ""


@pytest.mark.parametrize(
    "prompt",
    [
        *([], [[]], [[1], []], 1, {}, [1, "a"], ["a", 1], [[1], "a"], [1.5], [True], [None]),
        *("\ud800", ["\ud800"]),
    ],
)
def test_bad_prompts(client: Client, prompt: Any) -> None:
    response = client.send("POST", "/v1/completions", content=json.dumps({"prompt": prompt}))
    assert client.error_in(response, 400)["param"] == "prompt"


def test_ids_outside_the_vocabulary(client: Client) -> None:
    error = client.error_of(400, prompt=[1000])
    assert error["param"] == "prompt"
    assert error["message"] == "complete: prompt[0] must be in 0..99, got 1000"


@pytest.mark.parametrize("stream", [False, True])
def test_prompt_longer_than_the_context(client: Client, stream: bool) -> None:
    error = client.error_of(400, prompt="x" * 101, max_tokens=7, stream=stream)
    assert error["code"] == "context_length_exceeded"
    for number in ("100", "108", "101", "7"):
        assert number in error["message"]


def test_null_is_the_default(client: Client, model: FakeModel) -> None:
    names = {*openai_fields.PARAM_NAMES, *openai_fields.SEARCH_NAMES, *openai_fields.ALIASES}
    names |= {*openai_fields.NOT_SUPPORTED, *openai_fields.WITHOUT_EFFECT, "stream", "request_id"}
    names |= {"stream_options", "use_beam_search", "return_token_ids"}
    assert client.post(prompt="a", **dict.fromkeys(names)).status_code == 200
    assert model.calls[0][1] == CompletionParams()


def test_unknown_and_ignored_fields(client: Client, model: FakeModel) -> None:
    assert client.post(prompt="a", user="me", whatever=[1], cache_prompt=True).status_code == 200
    assert model.calls[0][1] == CompletionParams()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_tokens", -1, "max_tokens must be at least 0, got -1"),
        ("max_tokens", "5", "max_tokens must be an integer, got str"),
        ("max_tokens", 1.5, "max_tokens must be an integer, got float"),
        ("temperature", 2.5, "temperature must be in 0..2, got 2.5"),
        ("temperature", "hot", "temperature must be a number, got str"),
        ("top_p", 2, "top_p must be in 0..1, got 2"),
        ("top_k", -2, "top_k must be in -1..2147483647, got -2"),
        ("min_p", -0.5, "min_p must be in 0..1, got -0.5"),
        ("n", 0, "n must be in 1..128, got 0"),
        ("n", True, "n must be an integer, got bool"),
        ("seed", 2**63, "seed must be in "),
        ("stop", 7, "stop must be a string or several, got int"),
        ("stop", ["a", 7], "stop must be a string or several, got int"),
        ("stop", list("abcde"), "stop must be at most 4 strings, got 5"),
        ("stop", "\ud800", "stop must be valid Unicode"),
        ("stop_token_ids", [-1], "stop_token_ids must be "),
        ("ignore_eos", 1, "ignore_eos must be True or False, got int"),
        ("logprobs", 6, "logprobs must be at most 5, got 6"),
        ("logprobs", -1, "logprobs must be in 0..100, got -1"),
        ("echo", "yes", "echo must be True or False, got str"),
        ("stream", "yes", "stream must be true or false, got 'yes'"),
        ("model", 7, "model must be a string of at most 256 characters, got 7"),
        ("model", "m" * 257, "model must be a string of at most 256 characters, got 'mmm"),
        ("best_of", -1, "best_of must be in 0..20, got -1"),
        ("best_of", 2.5, "best_of must be an integer, got float"),
        ("bad_words", ["\ud800"], "bad_words must be valid Unicode"),
        ("suffix", "\ud800", "suffix must be valid Unicode"),
        ("request_id", "\ud800", "request_id must be valid Unicode"),
        ("stream_options", [], "stream_options must be an object, got []"),
        ("stream_options", {}, "stream_options must be left out unless stream is true, got {}"),
    ],
)
def test_wrong_values_name_the_field(client: Client, field: str, value: Any, message: str) -> None:
    response = client.send("POST", "/v1/completions", content=json.dumps({field: value}))
    error = client.error_in(response, 400)
    assert error["message"].startswith(message)
    assert error["param"] == field
    assert error["code"] is None


def test_number_too_large_for_a_float(client: Client) -> None:
    response = client.send("POST", "/v1/completions", content=b'{"top_p": 1' + b"0" * 400 + b"}")
    client.error_in(response, 400)


def test_caps_are_settings(make_client: Any) -> None:
    client = make_client(max_logprobs=20, max_stop=6)
    assert client.post(prompt="a", logprobs=20, stop=list("abcdef")).status_code == 200


@pytest.mark.parametrize("name", openai_fields.NOT_SUPPORTED)
def test_constrained_decoding_is_refused_by_name(client: Client, name: str) -> None:
    for value in ({"type": "json_object"}, {"x": 1}, "[a-z]+", ["a"]):
        error = client.error_of(400, prompt="a", **{name: value})
        assert error["param"] == name
        expected = f"{name} must be left out: constrained decoding is not supported, got "
        assert error["message"].startswith(expected)
    for neutral in openai_fields.NOT_SUPPORTED[name]:
        assert client.post(prompt="a", **{name: neutral}).status_code == 200


def test_choices_are_numbered_by_prompt_then_choice(client: Client) -> None:
    choices = client.post(prompt=["a", "b"], n=3).json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(6))


def test_stop_reason_tells_what_stopped(client: Client) -> None:
    choice = client.post(prompt="a", stop=" w2").json()["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (
        " w0 w1",
        "stop",
        " w2",
    )


def test_logprobs_are_four_parallel_arrays(client: Client) -> None:
    logprobs = client.post(prompt="abc", logprobs=1, max_tokens=2).json()["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": [" w0", " w1"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{" w0": -0.5, " x": -9999.0}, {" w1": -0.5, " x": -9999.0}],
        "text_offset": [3, 3],
    }


def test_logprobs_true_and_false(client: Client, model: FakeModel) -> None:
    client.post(prompt="a", logprobs=True)
    client.post(prompt="a", logprobs=False)
    assert [params.logprobs for _, params in model.calls] == [1, None]


def test_echo_scores_the_prompt(client: Client) -> None:
    body = client.post(prompt="abc", echo=True, logprobs=1, max_tokens=0).json()
    choice = body["choices"][0]
    assert choice["text"] == "abc"
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert choice["logprobs"]["top_logprobs"][0] is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the body must be JSON"),
        (b"{", "the body must be JSON"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b'{"prompt": "\xff"}', "the body must be JSON in UTF-8"),
        (b"[" * 100_000, "the body must be JSON"),
        (b'{"n": ' + b"1" * 5000 + b"}", "the body must be JSON"),
        (b"[]", "the body must be a JSON object"),
        (b"null", "the body must be a JSON object"),
    ],
)
def test_bad_bodies(client: Client, content: bytes, message: str) -> None:
    error = client.error_in(client.send("POST", "/v1/completions", content=content), 400)
    assert message in error["message"]
    assert error["param"] is None


def test_content_type_does_not_matter(client: Client) -> None:
    for kind in ("application/json; charset=utf-8", "text/plain"):
        headers = {"Content-Type": kind}
        response = client.send("POST", "/v1/completions", content=b"{}", headers=headers)
        assert response.status_code == 200


def test_number_of_choices_is_bounded(make_client: Any) -> None:
    client = make_client(max_choices=6)
    assert client.post(prompt=["a", "b", "c"], n=2).status_code == 200
    assert client.post(prompt=[1, 2, 3], n=6).status_code == 200
    error = client.error_of(400, prompt=["a", "b", "c", "d"], n=2)
    assert (error["param"], error["message"]) == (
        "n",
        "n must be at most 6 choices in all prompts, got 8",
    )


def test_candidates_and_hypotheses_are_choices_too(make_client: Any) -> None:
    client = make_client(max_choices=6)
    assert client.error_of(400, prompt=["a", "b"], best_of=4)["param"] == "best_of"
    wide = {"use_beam_search": True, "beam_width": 4}
    assert client.error_of(400, prompt=["a", "b"], **wide)["param"] == "beam_width"


def test_body_limit(make_client: Any) -> None:
    client = make_client(max_body_bytes=50)
    assert client.post(prompt="x" * 30).status_code == 200
    assert client.error_of(413, prompt="x" * 50)["code"] == "request_too_large"


def test_fault_of_the_engine_is_500_and_tells_nothing(client: Client, model: FakeModel) -> None:
    model.fail_after = 0
    for stream in (False, True):
        error = client.error_of(500, prompt="a", stream=stream)
        assert "secret" not in error["message"]
        assert error["code"] is None
    model.fail_after = None
    assert client.post(prompt="a").status_code == 200
