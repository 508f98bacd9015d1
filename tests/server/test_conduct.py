# SPDX-License-Identifier: Apache-2.0
"""What every request gets on any surface: limits, a deadline, errors in shape, a log line."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import httpx
import pytest

from fullbeam.server import app as server_app
from fullbeam.server import auth
from fullbeam.server.settings import Settings
from server_harness import Running, running, wait_until

Client: TypeAlias = Any  # both are in conftest.py, which cannot be imported
FakeModel: TypeAlias = Any
Json = dict[str, Any]

GATEWAY = "/api/v1/compatibility/openai/v1"
SECRET = "abc dd a"  # in every prompt below, and nowhere else


def openai_shape(body: Json) -> None:
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] is None or isinstance(body["error"]["code"], str)


def ide_shape(body: Json) -> None:
    assert set(body) == {"error"}
    assert set(body["error"]) == {"code", "message", "type", "issue"}
    assert isinstance(body["error"]["code"], int)
    assert set(body["error"]["issue"]) == {"message", "validator", "value"}


def gateway_shape(body: Json) -> None:
    assert set(body) == {"detail"}
    assert isinstance(body["detail"], str)


class Route:
    """A route of a surface with a body that it answers."""

    def __init__(self, path: str, shape: Callable[[Json], None], key_status: int, **body: Any):
        self.path = path
        self.shape = shape
        self.key_status = key_status
        self.body = body

    def error_in(self, response: httpx.Response, status: int) -> Json:
        assert response.status_code == status, response.text
        assert response.headers["content-type"] == "application/json"
        body: Json = response.json()
        self.shape(body)
        return body


ROUTES = [
    Route("/v1/completions", openai_shape, 401, prompt=SECRET),
    Route("/v1/complete/gpt", ide_shape, 403, code=SECRET, filename="x.py"),
    Route("/v1/complete", ide_shape, 403, code=SECRET, filename="x.py"),
    Route(f"{GATEWAY}/completions", gateway_shape, 401, prompt=SECRET, model="fake"),
]
STREAMING = [route for route in ROUTES if route.shape is not ide_shape]


@pytest.fixture(params=ROUTES, ids=lambda route: route.path)
def route(request: pytest.FixtureRequest) -> Route:
    param: Route = request.param
    return param


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[Running]:
    """A server; tests say how slow it is, and how it is set, by a `serving` marker."""
    with running(**getattr(request, "param", {})) as server:
        yield server


# Errors in shape


@pytest.mark.parametrize("authorization", [None, "wrong", "Bearer wrong", "Bearer", "Basic key"])
def test_key_missing_or_wrong(make_client: Any, route: Route, authorization: str | None) -> None:
    client = make_client(api_keys=("other", "key"))
    headers = {} if authorization is None else {"Authorization": authorization}
    response = client.send("POST", route.path, headers=headers, json=route.body)
    route.error_in(response, route.key_status)


@pytest.mark.parametrize("authorization", ["Bearer key", "bearer key", "key"])
def test_key_with_and_without_scheme(make_client: Any, route: Route, authorization: str) -> None:
    client = make_client(api_keys=("other", "key"))
    headers = {"Authorization": authorization}
    status = client.send("POST", route.path, headers=headers, content=b"").status_code
    if authorization == "key" and route.shape is openai_shape:
        assert status == 401
    else:
        assert status in (400, 422)  # past the key, the empty body is refused


@pytest.mark.parametrize("path", ["/v1/status", "/v1/languages"])
def test_companion_routes_of_editors_ask_for_the_key(make_client: Any, path: str) -> None:
    client = make_client(api_keys=("key",))
    ide_shape(client.send("GET", path).json())
    assert client.send("GET", path).status_code == 403
    assert client.send("GET", path, headers={"Authorization": "key"}).status_code == 200


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("/v1/completion", openai_shape),
        ("/v1/completesomething", openai_shape),
        ("/v1/complete/gpt/more", ide_shape),
        ("/v1/status/more", ide_shape),
        (f"{GATEWAY}/more", gateway_shape),
        (f"{GATEWAY}more", openai_shape),
        ("/", openai_shape),
    ],
)
def test_unknown_paths_are_refused_by_their_surface(
    client: Client, path: str, shape: Callable[[Json], None]
) -> None:
    response = client.send("GET", path)
    assert response.status_code == 404
    shape(response.json())
    assert f"GET {path}: Not Found" in response.text
    assert "No such model" not in response.text


def test_wrong_method(client: Client, route: Route) -> None:
    response = client.send("DELETE", route.path)
    route.error_in(response, 405)
    assert "POST" in response.headers["allow"]


@pytest.mark.parametrize("declared", [True, False])
def test_body_above_the_limit(make_client: Any, route: Route, declared: bool) -> None:
    client = make_client(max_body_bytes=200)

    async def chunks() -> Any:
        for _ in range(40):
            yield b" " * 10

    body = json.dumps(route.body)
    assert client.send("POST", route.path, content=body.ljust(200)).status_code == 200
    content: Any = body.ljust(201) if declared else chunks()
    error = route.error_in(client.send("POST", route.path, content=content), 413)
    assert "200 bytes" in str(error)


def test_fault_tells_nothing_of_the_inside(
    client: Client, model: FakeModel, route: Route, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.fail_after = 0
    error = route.error_in(client.send("POST", route.path, json=route.body), 500)
    assert "secret" not in str(error)
    assert "Traceback" not in str(error)


def test_fault_outside_of_the_engine(
    client: Client, route: Route, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def slot(*_: Any) -> Any:
        raise LookupError("a secret of the server")

    monkeypatch.setattr("fullbeam.server.service.Service.slot", slot)
    error = route.error_in(client.send("POST", route.path, json=route.body), 500)
    assert "secret" not in str(error)
    assert "a secret of the server" in caplog.text  # for whoever runs the server


def test_loading_is_told_in_shape(model: FakeModel, route: Route) -> None:
    def load() -> Any:
        raise ValueError("no such model")

    async def run() -> httpx.Response:
        app = server_app.create_app(load, Settings(name="fake"))
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as web:
                return await web.post(route.path, json=route.body)

    status = 400 if route.shape is gateway_shape else 503  # completions.md section 7
    route.error_in(asyncio.run(run()), status)


# Limits


def held(client: Client, model: FakeModel, route: Route, *later: Json) -> list[httpx.Response]:
    """Send a request that takes for ever; return the answers to later ones."""
    model.hold_after = 0

    async def run() -> list[httpx.Response]:
        async with client.running_app() as app:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as web:
                first = asyncio.create_task(web.post("/v1/completions", json={"n": 3}))
                while not model.streams:
                    await asyncio.sleep(0.001)
                answers = [await web.post(route.path, json=body) for body in later]
                first.cancel()
                await asyncio.gather(first, return_exceptions=True)
                return answers

    return asyncio.run(run())


def test_full_queue(make_client: Any, model: FakeModel, route: Route) -> None:
    client = make_client(max_requests=1)
    (refused,) = held(client, model, route, route.body)
    route.error_in(refused, 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert len(model.calls) == 1  # the second one has not reached the engine


def test_choices_are_bounded_over_all_requests(make_client: Any, model: FakeModel) -> None:
    client = make_client(max_choices=8, timeout_s=0.3)
    bodies = [{"prompt": ["a", "b"], "n": 3}, {"prompt": ["a"], "n": 5}]
    refused, accepted = held(client, model, ROUTES[0], *bodies)
    client.error_in(refused, 429)
    assert accepted.status_code == 503  # in time, it was let in: 3 + 5 choices
    assert len(model.calls) == 2


def test_retry_after_follows_how_long_requests_take(client: Client, model: FakeModel) -> None:
    async def run() -> list[int]:
        async with client.running_app() as app:
            service = app.state.service
            seconds = [service.retry_after_s]
            for mean in (2.5, 1000.0):
                service._mean_s = mean
                seconds.append(service.retry_after_s)
            return seconds

    assert asyncio.run(run()) == [1, 3, 60]


def test_deadline_of_a_plain_answer(make_client: Any, model: FakeModel, route: Route) -> None:
    model.hold_after = 0
    client = make_client(timeout_s=0.05)
    response = client.send("POST", route.path, json=route.body)
    assert "0.05 s" in str(route.error_in(response, 503))
    assert int(response.headers["retry-after"]) >= 1
    assert [stream.is_closed for stream in model.streams] == [True]


@pytest.mark.parametrize("route", STREAMING, ids=lambda route: route.path)
def test_deadline_of_a_stream(make_client: Any, model: FakeModel, route: Route) -> None:
    model.hold_after = 2
    client = make_client(timeout_s=0.05)
    response = client.send("POST", route.path, json=route.body | {"stream": True})
    assert response.status_code == 200
    events = client.parse_events(response.text)
    assert len(events) == 3
    openai_shape(events[-1])
    assert events[-1]["error"]["code"] == "overloaded"
    assert [stream.is_closed for stream in model.streams] == [True]


def test_no_deadline(make_client: Any) -> None:
    client = make_client(timeout_s=0)
    assert client.post(prompt="a").status_code == 200


# Ids, logs, origins


@pytest.mark.parametrize(
    ("given", "is_kept"),
    [("a-1_b.c:2", True), ("", False), ("a b", False), ("x" * 129, False), ('"}', False)],
)
def test_request_id_is_sent_back(client: Client, given: str, is_kept: bool) -> None:
    for path in ("/v1/models", "/nothing"):
        response = client.send("GET", path, headers={"X-Request-Id": given})
        sent = response.headers["x-request-id"]
        assert (sent == given) == is_kept
        assert len(sent) == 32 or is_kept


@contextmanager
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[list[Json]]:
    """Collect the lines of requests that end meanwhile."""
    lines: list[Json] = []
    with caplog.at_level(logging.INFO, "fullbeam.requests"):
        yield lines
    for entry in caplog.records:
        if entry.name == "fullbeam.requests":
            assert "\n" not in entry.getMessage()
            lines.append(json.loads(entry.getMessage()))


@pytest.mark.parametrize("stream", [False, True])
def test_each_request_has_a_line(
    server: Running, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    with logged(caplog) as lines, httpx.Client(base_url=server.url) as web:
        body = {"prompt": SECRET, "max_tokens": 5, "ignore_eos": True, "n": 2, "stream": stream}
        assert web.post("/v1/completions", json=body, headers={"X-Request-Id": "me"}).is_success
        wait_until(lambda: len(caplog.records) >= 1)  # the line comes after the answer
        assert web.get("/v1/models/fake").is_success
        assert web.get("/v1/completions").status_code == 405
        assert web.get(f"/{SECRET}").status_code == 404
        wait_until(lambda: len(caplog.records) >= 4)
    completion, models, method, path = lines
    assert (completion["request_id"], completion["method"]) == ("me", "POST")
    assert (completion["route"], completion["status"]) == ("/v1/completions", 200)
    assert completion["ended"] == "complete"
    assert completion["prompt_tokens"] == 5
    assert completion["completion_tokens"] == 10
    assert 0 < completion["first_token_ms"] <= completion["duration_ms"] < 10_000
    assert completion["time"].endswith("+00:00")
    assert (models["route"], models["prompt_tokens"]) == ("/v1/models/{model:path}", None)
    assert (method["route"], method["status"]) == ("/v1/completions", 405)
    assert (path["route"], path["status"]) == (None, 404)
    assert SECRET not in caplog.text


def test_lines_of_refusals_and_deadlines(
    make_client: Any, model: FakeModel, caplog: pytest.LogCaptureFixture
) -> None:
    client = make_client(timeout_s=0.05)
    model.hold_after = 1
    with logged(caplog) as lines:
        client.post(prompt=SECRET, top_p=SECRET)
        client.post(prompt=SECRET)
        client.post(prompt=SECRET, stream=True)
        model.hold_after, model.fail_after = None, model._num_pieces
        client.post(prompt=SECRET)
    assert [(line["status"], line["ended"]) for line in lines] == [
        (400, "complete"),
        (503, "timeout"),
        (503, "timeout"),
        (500, "fault"),
    ]
    assert not any(SECRET in json.dumps(line) for line in lines)


@pytest.mark.parametrize("server", [{"step_s": 0.02}], indirect=True)
@pytest.mark.parametrize("stream", [False, True])
def test_line_of_a_client_that_went_away(
    server: Running, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    with logged(caplog) as lines:
        leave(server, stream=stream)
        wait_until(lambda: caplog.records)
    (line,) = lines
    assert (line["status"], line["ended"]) == (499, "disconnect")
    assert 0 < line["completion_tokens"] < 200


def test_no_page_of_another_origin_may_call(client: Client) -> None:
    headers = {"Origin": "http://page", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in client.post(prompt="a").headers
    response = client.send("OPTIONS", "/v1/completions", headers=headers)
    assert response.status_code == 405
    assert "access-control-allow-origin" not in response.headers


def test_origins_that_may_call(make_client: Any) -> None:
    client = make_client(cors_origins=("http://page",), api_keys=("key",))
    headers = {
        "Origin": "http://page",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, x-stainless-os",
    }
    response = client.send("OPTIONS", "/v1/completions", headers=headers)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "http://page"
    assert "x-stainless-os" in response.headers["access-control-allow-headers"]
    refused = client.send("POST", "/v1/completions", headers={"Origin": "http://page"}, json={})
    assert refused.status_code == 401  # but the page may read why
    assert refused.headers["access-control-allow-origin"] == "http://page"
    other = client.send("POST", "/v1/completions", headers={"Origin": "http://other"}, json={})
    assert "access-control-allow-origin" not in other.headers


# Keys


def test_keys_are_compared_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []

    def compare(one: bytes, two: bytes) -> bool:
        compared.append((len(one), len(two)))
        return one == two

    monkeypatch.setattr(auth.hmac, "compare_digest", compare)
    assert auth.is_key(b"one", ("one", "two", "three"))
    assert not auth.is_key(b"on", ("one", "two", "three"))
    assert compared == [(32, 32)] * 6  # every key, whatever comes out; lengths say nothing


def test_keys_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\n\n one\ntwo\n")
    assert auth.read_keys(path) == ("one", "two")
    path.write_text("# none\n")
    with pytest.raises(ValueError, match="serve: api_key_file must hold a key in a line, got none"):
        auth.read_keys(path)


# Sockets


def leave(server: Running, *, stream: bool, max_tokens: int = 200) -> None:
    """Send a request and close the connection while it is being answered."""
    address = urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port)
    body = {"prompt": SECRET, "max_tokens": max_tokens, "ignore_eos": True, "n": 3}
    connection.request("POST", "/v1/completions", json.dumps(body | {"stream": stream}))
    wait_until(lambda: server.engine.stats().num_generated_tokens >= 6)
    connection.close()


@pytest.mark.parametrize("server", [{"step_s": 0.1}], indirect=True)
@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_frees_rows_and_pages_within_a_step(server: Running, stream: bool) -> None:
    leave(server, stream=stream)
    num_calls = server.decoder.num_calls
    server.check_idle()
    assert server.decoder.num_calls <= num_calls + 1
    assert server.engine.stats().num_cancelled == 1


def test_connections_are_kept(server: Running) -> None:
    address = urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port)
    connection.connect()
    used = connection.sock
    headers = {"Accept-Encoding": "gzip, deflate, br"}
    for body in ({"prompt": "a"}, {"prompt": "a", "stream": True}, {"top_p": 2}, {"prompt": "b"}):
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        response = connection.getresponse()
        assert response.version == 11
        assert response.getheader("content-encoding") is None
        response.read()
        assert connection.sock is used
    connection.close()


def test_rest_of_a_large_body_does_not_become_a_request(server: Running) -> None:
    address = urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Content-Length", str(1 << 30))
    connection.endheaders()
    response = connection.getresponse()
    assert (response.status, response.getheader("connection")) == (413, "close")
    openai_shape(json.loads(response.read()))


def test_a_request_without_a_path_is_refused_in_shape(server: Running) -> None:
    address = urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port)
    with closing(connection):
        connection.request("OPTIONS", "*")
        response = connection.getresponse()
        assert response.status == 404
        openai_shape(json.loads(response.read()))


def curl(*words: str) -> str:
    done = subprocess.run(
        ["curl", "--silent", "--show-error", "--max-time", "20", *words],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.fixture
def _curl() -> None:
    try:
        curl("--version")
    except FileNotFoundError:
        pytest.skip("there is no curl")


@pytest.mark.usefixtures("_curl")
def test_curl(server: Running, client: Client) -> None:
    url = f"{server.url}/v1/completions"
    body = {"prompt": "a", "max_tokens": 3, "ignore_eos": True, "seed": 1}
    kind = ["-H", "Content-Type: application/json"]
    plain = json.loads(curl("--compressed", *kind, "-d", json.dumps(body), url))
    text = curl("--compressed", "-N", *kind, "-d", json.dumps(body | {"stream": True}), url)
    events = client.parse_events(text)
    assert events[-1] == "[DONE]"
    streamed = "".join(event["choices"][0]["text"] for event in events[:-1])
    assert streamed == plain["choices"][0]["text"]
    count = curl("-o", os.devnull, "-o", os.devnull, "-w", "%{num_connects}", url, url)
    assert count == "10"  # the second request goes over the connection of the first


# The end

PROGRAM = """
import sys
import fake_model
from server_harness import SlowDecoder
from fullbeam.engine.engine import Engine
from fullbeam.model import Model
from fullbeam.server.serve import serve
from fullbeam.server.settings import Settings

def load():
    return Model(Engine(SlowDecoder(256, 0.02), fake_model.FakeTokenizer(), page_size=4), name="x")

def on_listen(url):
    print(url, flush=True)

serve(load, Settings(name="x", grace_s=int(sys.argv[1])), host="127.0.0.1", port=0,
      on_listen=on_listen)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(("grace_s", "num_tokens"), [(20, 40), (0, 200)])
def test_stopped_server_lets_answers_end(client: Client, grace_s: int, num_tokens: int) -> None:
    folder = Path(__file__).parents[1]
    path = os.pathsep.join([str(folder), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(grace_s)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    wait_until(lambda: httpx.get(f"{url}/health").status_code == 200)
    body = {"prompt": "a", "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=20) as response:
        chunks = response.iter_text()
        text = next(chunks)
        process.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        text += "".join(chunks)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")
    _, errors = process.communicate(timeout=20)
    assert time.monotonic() - begin < 10
    assert process.returncode == -signal.SIGTERM
    events = client.parse_events(text)
    lines = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
    if grace_s:
        assert events[-1] == "[DONE]"
        assert lines[-1]["ended"] == "complete"
        assert lines[-1]["completion_tokens"] == num_tokens
    else:
        openai_shape(events[-1])
        assert events[-1]["error"]["message"] == "the server stops"
        assert (lines[-1]["status"], lines[-1]["ended"]) == (200, "cancelled")
    assert "Traceback" not in errors


LOADING = """
import threading
from fullbeam.server.serve import serve
from fullbeam.server.settings import Settings

serve(lambda: threading.Event().wait(), Settings(name="x"), host="127.0.0.1", port=0,
      on_listen=lambda url: print(url, flush=True))
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_server_ends_while_it_loads(number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", LOADING],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    wait_until(lambda: httpx.get(f"{url}/health").status_code == 503)
    begin = time.monotonic()
    process.send_signal(number)
    process.communicate(timeout=20)
    assert time.monotonic() - begin < 5
    assert process.returncode == -number
