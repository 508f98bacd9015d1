# SPDX-License-Identifier: Apache-2.0
"""The gateway route: its fields, its errors, and answers like those of `/v1/completions`."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any, TypeAlias

import httpx
import pytest

from fullbeam.server.app import create_app
from fullbeam.server.settings import Settings

Client: TypeAlias = Any  # both are in conftest.py, which cannot be imported
FakeModel: TypeAlias = Any
Json: TypeAlias = dict[str, Any]
BASE = "/api/v1/compatibility/openai/v1"
LEAST = {"model": "fake", "prompt": "abc"}


def post(client: Client, body: Any = None, **fields: Any) -> httpx.Response:
    body = LEAST | fields if body is None else body
    response: httpx.Response = client.send("POST", f"{BASE}/completions", json=body)
    return response


def detail(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["detail"]
    assert isinstance(body["detail"], str)
    return str(body["detail"])


def violations(response: httpx.Response) -> list[tuple[list[str | int], str]]:
    assert response.status_code == 422, response.text
    body = response.json()
    assert list(body) == ["detail"]
    for item in body["detail"]:
        assert {"loc", "msg", "type"} <= set(item)
        assert isinstance(item["msg"], str)
    return [(item["loc"], item["type"]) for item in body["detail"]]


def test_answer_has_the_form_of_v1(client: Client, model: FakeModel) -> None:
    answer = post(client, n=2, max_tokens=2).json()
    assert (answer["object"], answer["model"]) == ("text_completion", "fake")
    assert answer["id"].startswith("cmpl-")
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    for choice in answer["choices"]:
        assert (choice["text"], choice["finish_reason"]) == (" w0 w1", "length")
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


def test_defaults(client: Client, model: FakeModel) -> None:
    assert len(post(client).json()["choices"][0]["text"].split()) == 16
    ((prompt, params),) = model.calls
    assert prompt == "abc"
    assert (params.temperature, params.n, params.stop_strings, params.seed) == (0, 1, (), None)
    assert params.max_tokens is None  # 16, or what fits


def test_fields_reach_the_model(client: Client, model: FakeModel) -> None:
    stop = [f"x{idx}" for idx in range(1024)]
    fields = {"temperature": 1, "n": 3, "stop": stop, "max_tokens": 7, "seed": -5}
    assert post(client, **fields).status_code == 200
    ((_, params),) = model.calls
    assert (params.temperature, params.n, params.max_tokens, params.seed) == (1, 3, 7, -5)
    assert params.stop_strings == tuple(stop)


def test_stream(client: Client) -> None:
    response = post(client, stream=True, max_tokens=2, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = client.parse_events(response.text)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == [" w0", " w1"]
    assert [chunk["usage"] for chunk in chunks] == [None, None]
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 2)
    assert done == "[DONE]"
    plain = client.parse_events(post(client, stream=True, max_tokens=2).text)
    assert all("usage" not in chunk for chunk in plain[:-1])


def test_null_is_absence_where_there_is_no_default(client: Client) -> None:
    assert post(client, stop=None, stream_options=None, seed=None).status_code == 200


def test_other_fields_are_ignored(client: Client, model: FakeModel) -> None:
    fields = {"top_p": 7, "logprobs": "x", "suffix": "y", "best_of": 0, "nonsense": []}
    answer = post(client, stop=["", "z"], stream_options={"other": 1}, **fields).json()
    assert answer["choices"][0]["logprobs"] is None
    assert model.calls[0][1].logprobs is None


@pytest.mark.parametrize(
    ("field", "value", "loc", "kind"),
    [
        ("model", None, [], "string_type"),
        ("model", 1, [], "string_type"),
        ("model", "\ud800", [], "string_unicode"),
        ("prompt", None, [], "string_type"),
        ("prompt", ["a"], [], "string_type"),
        ("prompt", [1, 2], [], "string_type"),
        ("prompt", "\ud800", [], "string_unicode"),
        ("temperature", -0.1, [], "greater_than_equal"),
        ("temperature", 2.1, [], "less_than_equal"),
        ("temperature", "1", [], "float_type"),
        ("temperature", True, [], "float_type"),
        ("temperature", None, [], "float_type"),
        ("n", 0, [], "greater_than_equal"),
        ("n", 129, [], "less_than_equal"),
        ("n", 1.5, [], "int_type"),
        ("n", True, [], "int_type"),
        ("n", "1", [], "int_type"),
        ("n", None, [], "int_type"),
        ("stop", "a", [], "list_type"),
        ("stop", [], [], "too_short"),
        ("stop", ["a"] * 1025, [], "too_long"),
        ("stop", ["a", 1], [1], "string_type"),
        ("stop", ["a", "\ud800"], [1], "string_unicode"),
        ("max_tokens", 0, [], "greater_than_equal"),
        ("max_tokens", None, [], "int_type"),
        ("max_tokens", "16", [], "int_type"),
        ("stream", "true", [], "bool_type"),
        ("stream", 1, [], "bool_type"),
        ("stream_options", [], [], "model_type"),
        ("stream_options", {"include_usage": "yes"}, ["include_usage"], "bool_type"),
        ("seed", 1.5, [], "int_type"),
        ("seed", 2**63, [], "less_than_equal"),
    ],
)
def test_violation(client: Client, field: str, value: Any, loc: list[str | int], kind: str) -> None:
    content = json.dumps(LEAST | {field: value}).encode()  # lone surrogates are escaped
    response = client.send("POST", f"{BASE}/completions", content=content)
    assert violations(response) == [(["body", field, *loc], kind)]


def test_every_violation_is_listed(client: Client) -> None:
    body = {"prompt": 1, "n": 0, "temperature": 3, "stop": [1, "a", None]}
    assert violations(post(client, body)) == [
        (["body", "model"], "missing"),
        (["body", "prompt"], "string_type"),
        (["body", "temperature"], "less_than_equal"),
        (["body", "n"], "greater_than_equal"),
        (["body", "stop", 0], "string_type"),
        (["body", "stop", 2], "string_type"),
    ]


@pytest.mark.parametrize("content", [b"[]", b'"text"', b"1", b"null"])
def test_body_must_be_an_object(client: Client, content: bytes) -> None:
    response = client.send("POST", f"{BASE}/completions", content=content)
    assert violations(response) == [(["body"], "model_type")]


@pytest.mark.parametrize(
    ("content", "position"),
    [
        (b"", 0),
        (b'{"model": }', 10),
        (b'{"model": "a"', 13),
        (b'"\xff"', 1),
        (b"[" * 100_000, 0),
        (b"1" * 5000, 0),
    ],
)
def test_malformed_json(client: Client, content: bytes, position: int) -> None:
    response = client.send("POST", f"{BASE}/completions", content=content)
    assert violations(response) == [(["body", position], "json_invalid")]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_none(client: Client, number: str) -> None:
    content = f'{{"model":"fake","prompt":"a","temperature":{number}}}'.encode()
    response = client.send("POST", f"{BASE}/completions", content=content)
    assert violations(response)[0][0] == ["body", "temperature"]


def test_prompt_beyond_the_context(client: Client) -> None:
    (found,) = violations(post(client, prompt="x" * 101))
    assert found == (["body", "prompt"], "context_length_exceeded")


def test_more_choices_than_the_server_gives(make_client: Any) -> None:
    (found,) = violations(post(make_client(max_choices=2), n=3))
    assert found == (["body", "n"], "less_than_equal")


@pytest.mark.parametrize("field", ["n", "prompt", "model"])
def test_messages_do_not_repeat_the_input(client: Client, field: str) -> None:
    assert "secret" not in post(client, **{field: ["secret"]}).text


def test_unknown_model(client: Client) -> None:
    assert "'other' does not exist" in detail(post(client, model="other"), 404)


def test_model_that_is_not_ready(model: FakeModel) -> None:
    may_load = threading.Event()

    def load() -> Any:
        may_load.wait()
        return model

    async def run() -> tuple[httpx.Response, ...]:
        app = create_app(load, Settings(name="fake"))
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as web:
                try:
                    early = await web.post(f"{BASE}/completions", json=LEAST)
                    listed = await web.get(f"{BASE}/models")
                    missing = await web.post(f"{BASE}/completions", json=LEAST | {"model": "x"})
                finally:
                    may_load.set()
                return early, listed, missing

    early, listed, missing = asyncio.run(run())
    assert "not ready" in detail(early, 400)
    assert listed.json()["data"][0]["status"] == "PENDING"
    detail(missing, 404)


def test_models(client: Client) -> None:
    body = client.send("GET", f"{BASE}/models").json()
    assert body["object"] == "list"
    (card,) = body["data"]
    assert (card["id"], card["object"], card["owned_by"]) == ("fake", "model", "fullbeam")
    assert isinstance(card["created"], int)
    own = (card["model_type"], card["model_engine"], card["status"])
    assert own == ("COMPLETIONS", "FULLBEAM", "AVAILABLE")


@pytest.mark.parametrize("header", [None, "Bearer wrong", "wrong", "Basic key", "Bearer"])
def test_key_missing_or_wrong(make_client: Any, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    client = make_client(api_keys=("key",))
    detail(client.send("GET", f"{BASE}/models", headers=headers), 401)
    path = f"{BASE}/completions"
    detail(client.send("POST", path, headers=headers, content=b"no JSON"), 401)


@pytest.mark.parametrize("header", ["Bearer key", "bearer key", "key"])
def test_key_with_and_without_its_scheme(make_client: Any, header: str) -> None:
    client = make_client(api_keys=("key",))
    headers = {"Authorization": header}
    assert client.send("GET", f"{BASE}/models", headers=headers).status_code == 200
    path = f"{BASE}/completions"
    assert client.send("POST", path, headers=headers, json=LEAST).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/completions", 405),
        ("DELETE", "/models", 405),
        ("POST", "/chat/completions", 404),
        ("GET", "", 404),
    ],
)
def test_routing_errors(client: Client, method: str, path: str, status: int) -> None:
    detail(client.send(method, BASE + path), status)


def test_limits_of_the_server(make_client: Any) -> None:
    detail(post(make_client(max_body_bytes=20)), 413)
    busy = post(make_client(max_requests=0))
    detail(busy, 429)
    assert int(busy.headers["retry-after"]) >= 1


def test_fault_shows_nothing_of_the_inside(client: Client, model: FakeModel) -> None:
    model.fail_after = 0
    assert "secret" not in detail(post(client), 500)


def test_fault_amid_the_stream_is_its_last_event(client: Client, model: FakeModel) -> None:
    model.fail_after = 1
    chunk, error = client.parse_events(post(client, stream=True).text)
    assert chunk["choices"][0]["text"] == " w0"
    assert error["error"]["type"] == "server_error"


def test_openapi_page(client: Client) -> None:
    document = client.send("GET", "/openapi.json").json()
    route = document["paths"][f"{BASE}/completions"]["post"]
    statuses = 200, 400, 401, 404, 413, 422, 429, 500, 503
    assert set(route["responses"]) == {str(status) for status in statuses}
    assert route["security"]
    fields = route["requestBody"]["content"]["application/json"]["schema"]
    assert fields["required"] == ["model", "prompt"]
    assert fields["properties"]["temperature"]["default"] == 0
    assert "$ref" not in str(fields)
    assert f"{BASE}/models" in document["paths"]
