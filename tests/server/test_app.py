# SPDX-License-Identifier: Apache-2.0
"""Routes, keys, limits, the life of the model, and a server that really runs."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, TypeAlias

import httpx
import openai
import pytest
import uvicorn

from fullbeam.server.app import create_app
from fullbeam.server.serve import serve
from fullbeam.server.settings import Settings

GATEWAY = "/api/v1/compatibility/openai/v1"

Client: TypeAlias = Any  # both are in conftest.py, which cannot be imported
FakeModel: TypeAlias = Any


def test_models_are_listed(client: Client) -> None:
    body = client.send("GET", "/v1/models").json()
    assert body["object"] == "list"
    (card,) = body["data"]
    assert (card["id"], card["object"], card["owned_by"]) == ("fake", "model", "fullbeam")
    assert isinstance(card["created"], int)


def test_model_id_may_contain_a_slash(make_client: Any) -> None:
    client = make_client(name="some/model.v1")
    assert client.send("GET", "/v1/models/some/model.v1").json()["id"] == "some/model.v1"
    error = client.error_in(client.send("GET", "/v1/models/other"), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")


def test_health(client: Client) -> None:
    response = client.send("GET", "/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "unknown_url"),
        ("POST", "/v1/completions/", 404, "unknown_url"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
    ],
)
def test_routing_errors(client: Client, method: str, path: str, status: int, code: str) -> None:
    response = client.send(method, path)
    assert client.error_in(response, status)["code"] == code
    if status == 405:
        assert response.headers["allow"]


def test_openapi_page_tells_the_truth(client: Client) -> None:
    assert client.send("GET", "/docs").status_code == 200
    document = client.send("GET", "/openapi.json").json()
    route = document["paths"]["/v1/completions"]["post"]
    body = route["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert {"prompt", "model", "stream", "max_tokens", "stop", "logprobs"} <= set(body)
    assert body["temperature"]["default"] == 1.0
    assert {"200", "400", "401", "404", "429"} <= set(route["responses"])
    assert route["security"]
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert ("422" in operation["responses"]) == (path == f"{GATEWAY}/completions")
            named = [parameter["name"] for parameter in operation.get("parameters", [])]
            assert named == (["model"] if "{model}" in path else [])


KEYS = ("first", "schlüssel")


@pytest.mark.parametrize("path", ["/v1/completions", "/completions", "/v1/engines/x/completions"])
@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer", "first", "Basic first"])
def test_key_missing_or_wrong(make_client: Any, path: str, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    client = make_client(api_keys=KEYS)
    response = client.send("POST", path, headers=headers, content=b"no JSON")
    assert client.error_in(response, 401)["code"] == "invalid_api_key"


def test_every_key_opens(make_client: Any) -> None:
    client = make_client(api_keys=KEYS)
    for key in KEYS:
        headers = {"Authorization": f"Bearer {key}".encode()}
        response = client.send("POST", "/v1/completions", headers=headers, json={})
        assert response.status_code == 200


def test_empty_key_does_not_open_to_everybody(make_client: Any) -> None:
    client = make_client(api_keys=("",))
    client.error_in(client.send("GET", "/v1/models"), 401)


def test_models_need_the_key_and_health_does_not(make_client: Any) -> None:
    client = make_client(api_keys=KEYS)
    client.error_in(client.send("GET", "/v1/models"), 401)
    client.error_in(client.send("GET", "/v1/models/fake"), 401)
    assert client.send("GET", "/health").status_code == 200


def test_without_keys_the_header_is_ignored(client: Client) -> None:
    headers = {"Authorization": "Bearer anything"}
    assert client.send("GET", "/v1/models", headers=headers).status_code == 200


def test_too_many_requests(make_client: Any, model: FakeModel) -> None:
    model.hold_after = 0

    async def run() -> list[httpx.Response]:
        async with client.running_app() as app:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as web:
                for stream in (False, True):
                    body = {"stream": stream}
                    held.append(asyncio.create_task(web.post("/v1/completions", json=body)))
                while len(model.streams) < 2:
                    await asyncio.sleep(0.001)
                refused = await web.post("/v1/completions", json={})
                for task in held:
                    task.cancel()
                await asyncio.gather(*held, return_exceptions=True)
                model.hold_after = None
                return [refused, await web.post("/v1/completions", json={})]

    held: list[asyncio.Task[httpx.Response]] = []
    client = make_client(max_requests=2)
    refused, accepted = asyncio.run(run())
    assert client.error_in(refused, 429)["code"] == "rate_limit_exceeded"
    assert int(refused.headers["retry-after"]) >= 1
    assert accepted.status_code == 200


def test_model_loads_while_the_server_answers(model: FakeModel) -> None:
    may_load = threading.Event()

    def load() -> Any:
        may_load.wait()
        return model

    async def run() -> list[httpx.Response]:
        app = create_app(load, Settings(name="fake"))
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as web:
                try:
                    early = [await web.get("/health"), await web.post("/v1/completions", json={})]
                finally:
                    may_load.set()
                while not app.state.service.is_ready:
                    await asyncio.sleep(0.001)
                return [*early, await web.get("/health")]

    health, completion, later = asyncio.run(run())
    assert (health.status_code, health.json()) == (503, {"status": "loading"})
    assert completion.status_code == 503
    assert completion.json()["error"]["code"] == "overloaded"
    assert completion.headers["retry-after"]
    assert later.status_code == 200
    assert model.is_closed


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def test_port_in_use_is_found_before_loading() -> None:
    def load() -> Any:
        pytest.fail("loaded")

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = rf"serve: cannot listen on port {port} of 127\.0\.0\.1: Address already in use"
        with pytest.raises(OSError, match=message):
            serve(load, Settings(name="x"), host="127.0.0.1", port=port)


def test_failed_load_ends_the_server() -> None:
    def load() -> Any:
        raise ValueError("no such model")

    urls: list[str] = []
    with pytest.raises(ValueError, match="no such model"):
        serve(load, Settings(name="x"), host="127.0.0.1", port=0, on_listen=urls.append)
    assert urls[0].startswith("http://127.0.0.1:")


@pytest.fixture
def url(model: FakeModel) -> Iterator[str]:
    """The address of a server that runs in a thread."""
    settings = Settings(name="fake", api_keys=("key",))
    app = create_app(lambda: model, settings)
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started and app.state.service.is_ready)
    yield f"http://127.0.0.1:{port}/v1"
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_openai_package(url: str) -> None:
    with openai.OpenAI(base_url=url, api_key="key", max_retries=0) as web:
        assert [card.id for card in web.models.list()] == ["fake"]
        assert web.models.retrieve("fake").owned_by == "fullbeam"
        answer = web.completions.create(
            model="fake", prompt=["a", "b"], n=2, max_tokens=2, logprobs=1, extra_body={"top_k": 3}
        )
        assert [choice.text for choice in answer.choices] == [" w0 w1"] * 4
        assert answer.choices[0].logprobs is not None
        assert answer.choices[0].logprobs.tokens == [" w0", " w1"]
        assert answer.usage is not None
        assert answer.usage.total_tokens == 14
        chunks = list(
            web.completions.create(
                model="fake",
                prompt="a",
                max_tokens=3,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == " w0 w1 w2"
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 3


def test_openai_package_raises_typed_errors(url: str, model: FakeModel) -> None:
    with openai.OpenAI(base_url=url, api_key="key", max_retries=0) as web:
        with pytest.raises(openai.BadRequestError, match="top_p must be in") as caught:
            web.completions.create(model="fake", prompt="a", top_p=2)
        assert caught.value.param == "top_p"
        with pytest.raises(openai.NotFoundError) as missing:
            web.completions.create(model="other", prompt="a")
        assert missing.value.code == "model_not_found"
        model.fail_after = 0
        with pytest.raises(openai.InternalServerError):
            web.completions.create(model="fake", prompt="a")
        model.fail_after = 2
        with pytest.raises(openai.APIError, match="the server failed"):
            list(web.completions.create(model="fake", prompt="a", stream=True))
    with (
        openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as web,
        pytest.raises(openai.AuthenticationError),
    ):
        web.models.list()


def test_closed_connection_stops_the_work(url: str, model: FakeModel) -> None:
    model.hold_after = 2
    with openai.OpenAI(base_url=url, api_key="key") as web:
        stream = web.completions.create(model="fake", prompt="a", stream=True)
        next(iter(stream))
        stream.close()
    wait_until(lambda: model.streams[-1].is_closed)
