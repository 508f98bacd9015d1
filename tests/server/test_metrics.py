# SPDX-License-Identifier: Apache-2.0
"""What /metrics tells: HTTP requests as they ended, the engine as it is."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from fullbeam.server.app import create_app
from fullbeam.server.settings import Settings
from server_harness import Running, running, wait_until

BODY: dict[str, Any] = {"prompt": "abc dd a", "max_tokens": 6, "ignore_eos": True}


@pytest.fixture
def server() -> Iterator[Running]:
    with running(step_s=0.005) as server:
        yield server


@pytest.fixture
def web(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url) as web:
        yield web


def scrape(web: httpx.Client) -> dict[str, float]:
    """Values by name with labels, such as `x{route=a}`."""
    response = web.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    values = {}
    for family in text_string_to_metric_families(response.text):
        assert family.documentation
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            values[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return values


def test_requests_are_counted_by_route_and_status(web: httpx.Client) -> None:
    web.post("/v1/completions", json=BODY)
    web.post("/v1/completions", json=BODY | {"stream": True})
    web.post("/v1/completions", json=BODY | {"top_p": 2})
    web.get("/v1/models/fake")
    web.get("/v1/models/other")
    web.get("/abc")
    web.get("/abd")
    values = scrape(web)
    for route, status, count in [
        ("/v1/completions", 200, 2),
        ("/v1/completions", 400, 1),
        ("/v1/models/{model:path}", 200, 1),
        ("/v1/models/{model:path}", 404, 1),
        ("none", 404, 2),  # made-up paths do not make up labels
    ]:
        assert values[f"fullbeam_requests_total{{route={route},status={status}}}"] == count
    assert values["fullbeam_request_duration_seconds_count{route=/v1/completions}"] == 3
    assert values["fullbeam_request_duration_seconds_sum{route=/v1/completions}"] > 0.05


def test_tokens_and_times(web: httpx.Client) -> None:
    web.post("/v1/completions", json=BODY | {"n": 2})
    values = scrape(web)
    assert values["fullbeam_prompt_tokens_total"] == 5
    assert values["fullbeam_generated_tokens_total"] == 12
    assert values["fullbeam_computed_tokens_total"] == 5 + 2 * 5
    assert values["fullbeam_reused_tokens_total"] == 0
    assert values["fullbeam_time_to_first_token_seconds_count"] == 1
    assert 0.005 < values["fullbeam_time_to_first_token_seconds_sum"] < 5
    assert values["fullbeam_time_per_output_token_seconds_count"] == 1
    assert 0.005 < values["fullbeam_time_per_output_token_seconds_sum"] < 1
    web.post("/v1/completions", json=BODY | {"prompt": ["abc dd a", "abc dd a"]})
    later = scrape(web)
    assert later["fullbeam_prompt_tokens_total"] == 15
    assert later["fullbeam_reused_tokens_total"] >= 8  # cache hits
    assert later["fullbeam_time_to_first_token_seconds_count"] == 2  # one for a request
    assert later["fullbeam_time_per_output_token_seconds_count"] == 3  # one for a prompt
    assert later["fullbeam_time_to_first_token_seconds_sum"] < 5


def test_drafted_and_accepted_tokens(web: httpx.Client) -> None:
    assert scrape(web)["fullbeam_drafted_tokens_total"] == 0
    body = BODY | {"max_tokens": 40, "temperature": 0, "logit_bias": {"2": 9, "3": 8}}
    web.post("/v1/completions", json=body)
    values = scrape(web)
    assert values["fullbeam_generated_tokens_total"] == 40
    assert values["fullbeam_computed_tokens_total"] > 44
    drafted = values["fullbeam_drafted_tokens_total"]
    assert drafted >= values["fullbeam_accepted_tokens_total"] > 10


def test_scoring_has_no_first_token(web: httpx.Client) -> None:
    web.post("/v1/completions", json=BODY | {"max_tokens": 0, "echo": True, "logprobs": 1})
    assert scrape(web)["fullbeam_time_to_first_token_seconds_count"] == 0


def test_engine_at_work_and_idle(server: Running, web: httpx.Client) -> None:
    server.decoder.step_s = 0.05
    body = BODY | {"max_tokens": 200, "n": 9, "stream": True}
    address = urlsplit(server.url)
    clients = [HTTPConnection(address.hostname or "", address.port) for _ in range(2)]
    for client in clients:
        client.request("POST", "/v1/completions", json.dumps(body))
    wait_until(lambda: server.service.num_requests == 2 and server.decoder.num_calls > 1)
    busy = scrape(web)
    for client in clients:
        client.close()
    assert busy["fullbeam_requests_in_progress"] == 2
    assert busy["fullbeam_rows"] == 9
    assert busy["fullbeam_rows_limit"] == 16
    assert busy["fullbeam_queue_length"] == 1  # 18 rows are too many
    assert busy["fullbeam_pages_used"] >= 9
    assert busy["fullbeam_pages"] == server.engine.stats().num_pages
    server.check_idle()
    wait_until(lambda: "fullbeam_requests_total{route=/v1/completions,status=499}" in scrape(web))
    idle = scrape(web)
    for name in ("requests_in_progress", "rows", "queue_length", "pages_used"):
        assert idle[f"fullbeam_{name}"] == 0
    assert idle["fullbeam_pages_cached"] > 0
    assert idle["fullbeam_cancelled_prompts_total"] == 2
    assert idle["fullbeam_preemptions_total"] == 0


def test_metrics_while_the_model_loads() -> None:
    def load() -> Any:
        raise ValueError("no such model")

    async def run() -> httpx.Response:
        app = create_app(load, Settings(name="fake", api_keys=("key",)))
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as web:
                return await web.get("/metrics")

    response = asyncio.run(run())
    assert response.status_code == 200  # as /health, without a key
    assert "fullbeam_requests_in_progress 0.0" in response.text
    assert "fullbeam_pages" not in response.text
