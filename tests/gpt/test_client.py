# SPDX-License-Identifier: Apache-2.0
"""The `gpt` package against a server that answers as told."""

from __future__ import annotations

import copy
import inspect
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import requests

import gpt
from gpt.models import components, errors, operations

StandIn: TypeAlias = Any  # in conftest.py, which cannot be imported
REQUEST = components.CreateCompletionRequest(model="m", prompt="Say")


@pytest.fixture
def client(server: StandIn, session: requests.Session) -> gpt.Gpt:
    return gpt.Gpt("key", server_url=server.url, client=session)


def test_names_are_those_of_the_sdk() -> None:
    names = [
        "CreateCompletionRequest CreateCompletionRequest2 CreateCompletionResponse",
        "CreateCompletionResponseChoices CreateCompletionResponseFinishReason",
        "CreateCompletionResponseLogprobs CreateCompletionResponseObject CompletionUsage",
        "Model ModelObject ListModelsResponse DeleteModelResponse Security",
    ]
    for name in " ".join(names).split():
        assert inspect.isclass(getattr(components, name)), name
    of_operations = "CreateCompletionResponse ListModelsResponse RetrieveModelRequest"
    of_operations += " RetrieveModelResponse DeleteModelRequest DeleteModelResponse"
    for name in of_operations.split():
        assert inspect.isclass(getattr(operations, name)), name


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (gpt.Gpt, "api_key_auth server_idx server_url url_params client retry_config"),
        (
            components.CreateCompletionRequest,
            "model prompt best_of echo frequency_penalty logit_bias logprobs max_tokens n"
            " presence_penalty seed stop stream suffix temperature top_p user",
        ),
        (
            components.CreateCompletionResponse,
            "choices created id model object system_fingerprint usage",
        ),
        (components.CreateCompletionResponseChoices, "finish_reason index logprobs text"),
        (
            components.CreateCompletionResponseLogprobs,
            "text_offset token_logprobs tokens top_logprobs",
        ),
        (components.CompletionUsage, "completion_tokens prompt_tokens total_tokens"),
        (errors.SDKError, "message status_code body raw_response"),
        (gpt.utils.RetryConfig, "strategy backoff retry_connection_errors"),
        (
            gpt.utils.BackoffStrategy,
            "initial_interval max_interval exponent max_elapsed_time",
        ),
        (
            operations.CreateCompletionResponse,
            "content_type status_code raw_response create_completion_response",
        ),
        (
            operations.ListModelsResponse,
            "content_type status_code raw_response list_models_response",
        ),
        (operations.RetrieveModelResponse, "content_type status_code raw_response model"),
        (
            operations.DeleteModelResponse,
            "content_type status_code raw_response delete_model_response",
        ),
    ],
)
def test_arguments_are_those_of_the_sdk(kind: Any, expected: str) -> None:
    assert list(inspect.signature(kind).parameters) == expected.split()


def test_request_as_sent(server: StandIn, client: gpt.Gpt) -> None:
    server.answer()
    client.completions.create_completion(REQUEST)
    ((method, path, headers, body),) = server.requests
    assert (method, path) == ("POST", "/v1/completions")
    assert headers["accept"] == headers["content-type"] == "application/json"
    assert headers["authorization"] == "Bearer key"
    assert body == (
        b'{"best_of":1,"echo":false,"frequency_penalty":0,"logprobs":null,"max_tokens":16,'
        b'"model":"m","n":1,"presence_penalty":0,"prompt":"Say","stream":false,"suffix":null,'
        b'"temperature":1,"top_p":1}'
    )


def test_every_field_is_sent(server: StandIn, client: gpt.Gpt) -> None:
    server.answer()
    values = {
        "model": components.CreateCompletionRequest2.DAVINCI_002,
        "prompt": [[1, 2], [3]],
        "best_of": 3,
        "echo": True,
        "frequency_penalty": 0.5,
        "logit_bias": {"7": -100},
        "logprobs": 2,
        "max_tokens": None,
        "n": 2,
        "presence_penalty": -1,
        "seed": 9,
        "stop": ["é", "\n"],
        "stream": False,
        "suffix": "x",
        "temperature": 0,
        "top_p": 0.5,
        "user": "me",
    }
    assert list(values) == [field.name for field in fields(components.CreateCompletionRequest)]
    client.completions.create_completion(components.CreateCompletionRequest(**values))
    assert json.loads(server.requests[0][3]) == values | {"model": "davinci-002"}


def test_unset_survives_a_copy_and_none_does_not_mean_it(server: StandIn, client: gpt.Gpt) -> None:
    server.answer()
    request = copy.deepcopy(REQUEST)
    assert request.seed is components.CreateCompletionRequest.UNSET
    request.stop = None
    client.completions.create_completion(request)
    body = json.loads(server.requests[0][3])
    assert "seed" not in body
    assert body["stop"] is None


def test_response(server: StandIn, client: gpt.Gpt) -> None:
    server.answer(Content_Type="Application/JSON; charset=utf-8")
    result = client.completions.create_completion(REQUEST)
    assert (result.status_code, result.content_type) == (200, "Application/JSON; charset=utf-8")
    assert isinstance(result.raw_response, requests.Response)
    assert result.create_completion_response == components.CreateCompletionResponse(
        choices=[
            components.CreateCompletionResponseChoices(
                finish_reason=components.CreateCompletionResponseFinishReason.STOP,
                index=0,
                logprobs=None,
                text=" é",
            )
        ],
        created=1700000000,
        id="cmpl-1",
        model="m",
        object=components.CreateCompletionResponseObject.TEXT_COMPLETION,
        usage=components.CompletionUsage(completion_tokens=7, prompt_tokens=5, total_tokens=12),
    )


def test_response_with_logprobs(server: StandIn, client: gpt.Gpt) -> None:
    logprobs = {"tokens": ["a", "b"], "token_logprobs": [None, -1.5]}
    logprobs |= {"top_logprobs": [None, {"b": -1.5}]}
    choice = {"text": "ab", "index": 1, "finish_reason": "length", "logprobs": logprobs}
    body = {"id": "i", "object": "text_completion", "created": 1, "model": "m"}
    body |= {"choices": [choice], "system_fingerprint": "fp"}
    server.answer(body=json.dumps(body).encode())
    answer = client.completions.create_completion(REQUEST).create_completion_response
    assert answer is not None
    assert (answer.system_fingerprint, answer.usage) == ("fp", None)
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].logprobs == components.CreateCompletionResponseLogprobs(
        tokens=["a", "b"], token_logprobs=[None, -1.5], top_logprobs=[None, {"b": -1.5}]
    )


def test_events_raise_with_their_text(server: StandIn, client: gpt.Gpt) -> None:
    text = 'data: {"text":"é"}\n\ndata: [DONE]\n\n'
    server.answer(body=text.encode(), Content_Type="text/event-stream")
    request = components.CreateCompletionRequest(model="m", prompt="p", stream=True)
    with pytest.raises(errors.SDKError) as caught:
        client.completions.create_completion(request)
    assert json.loads(server.requests[0][3])["stream"] is True
    error = caught.value
    assert error.message == "unknown content-type received: text/event-stream"
    assert (error.status_code, error.body) == (200, text)
    assert str(error) == f"{error.message}: Status 200\n{text}"
    assert error.raw_response.status_code == 200


@pytest.mark.parametrize("status", [400, 404, 499, 500, 599])
def test_error_status_raises(server: StandIn, client: gpt.Gpt, status: int) -> None:
    server.answer(status, b'{"error":1}')
    with pytest.raises(errors.SDKError) as caught:
        client.models.list_models()
    assert str(caught.value) == f'API error occurred: Status {status}\n{{"error":1}}'
    assert (caught.value.status_code, caught.value.body) == (status, '{"error":1}')


def test_error_text_without_a_body(server: StandIn, client: gpt.Gpt) -> None:
    server.answer(503, b"")
    with pytest.raises(errors.SDKError) as caught:
        client.models.list_models()
    assert str(caught.value) == "API error occurred: Status 503"


@pytest.mark.parametrize("status", [201, 304])
def test_other_status_has_no_payload(server: StandIn, client: gpt.Gpt, status: int) -> None:
    server.answer(status, b"" if status == 304 else b"{}")
    result = client.completions.create_completion(REQUEST)
    assert result.status_code == status
    assert result.create_completion_response is None


@pytest.mark.parametrize("body", [b"", b"no", b"[]", b'{"data":[],"object":"other"}'])
def test_payload_of_another_form_raises(server: StandIn, client: gpt.Gpt, body: bytes) -> None:
    server.answer(body=body)
    with pytest.raises(errors.SDKError, match="unknown form of ListModelsResponse"):
        client.models.list_models()


def test_models(server: StandIn, client: gpt.Gpt) -> None:
    card = {"id": "a/b", "object": "model", "created": 3, "owned_by": "me", "permission": []}
    server.answer(body=json.dumps({"object": "list", "data": [card]}).encode())
    server.answer(body=json.dumps(card).encode())
    server.answer(body=b'{"id":"a/b","object":"model","deleted":true}')
    model = components.Model(
        created=3, id="a/b", object=components.ModelObject.MODEL, owned_by="me"
    )
    listed = client.models.list_models().list_models_response
    assert listed is not None
    assert (listed.data, listed.object) == ([model], "list")
    assert client.models.retrieve_model(model="a/b").model == model
    deleted = client.models.delete_model("ft:a b?").delete_model_response
    assert deleted == components.DeleteModelResponse(deleted=True, id="a/b", object="model")
    assert [(method, path) for method, path, _, _ in server.requests] == [
        ("GET", "/v1/models"),
        ("GET", "/v1/models/a/b"),
        ("DELETE", "/v1/models/ft:a%20b%3F"),
    ]


def test_key_may_be_a_function_and_have_its_scheme(server: StandIn) -> None:
    server.answer(404)
    keys = iter(["first", "bearer second", "BEARER third", "Bearerless", "schlüssel"])
    client = gpt.Gpt(lambda: next(keys), server_url=server.url)
    for _ in range(5):
        with pytest.raises(errors.SDKError):
            client.models.list_models()
    client.sdk_configuration.client.close()
    sent = [headers["authorization"] for _, _, headers, _ in server.requests]
    sent[4] = sent[4].encode("latin-1").decode()
    scheme = ["Bearer first", "bearer second", "BEARER third", "Bearer Bearerless"]
    assert sent == [*scheme, "Bearer schlüssel"]


def test_netrc_does_not_replace_the_key(
    server: StandIn, client: gpt.Gpt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    server.answer()
    client.completions.create_completion(REQUEST)
    assert server.requests[0][2]["authorization"] == "Bearer key"


def test_session_is_used(server: StandIn, client: gpt.Gpt, session: requests.Session) -> None:
    server.answer()
    session.headers["x-own"] = "yes"
    client.completions.create_completion(REQUEST)
    assert server.requests[0][2]["x-own"] == "yes"


def test_server_url_is_templated_and_loses_a_slash(
    server: StandIn, session: requests.Session
) -> None:
    server.answer(404)
    port = server.url.split(":")[2].split("/")[0]
    url = "http://{host}:{port}/{host}/v1/"
    params = {"host": "127.0.0.1", "port": port}
    client = gpt.Gpt("", server_url=url, url_params=params, client=session)
    with pytest.raises(errors.SDKError):
        client.models.list_models()
    assert server.requests[0][1] == "/127.0.0.1/v1/models"


def test_server_is_chosen_by_index(
    server: StandIn, session: requests.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answer(404)
    monkeypatch.setattr(gpt.sdk, "SERVERS", ["http://127.0.0.1:1/v1", f"{server.url}/other"])
    with pytest.raises(errors.SDKError):
        gpt.Gpt("", 1, client=session).models.list_models()
    assert server.requests[0][1] == "/v1/other/models"
    with pytest.raises(requests.ConnectionError):
        gpt.Gpt("", client=session).models.list_models()


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "http://127.0.0.1:8000/v1"), ({"FULLBEAM_URL": "http://x/v1"}, "http://x/v1")],
)
def test_default_server_comes_from_the_environment(given: dict[str, str], expected: str) -> None:
    code = "import gpt, sys; print(gpt.SERVERS); assert 'fullbeam' not in sys.modules"
    environment = {"PYTHONPATH": str(Path(gpt.__file__).parents[1])} | given
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert result.stdout == f"['{expected}']\n"
