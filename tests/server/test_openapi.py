# SPDX-License-Identifier: Apache-2.0
"""Requests made up from the OpenAPI document: none may fail the server, none may hang."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from fullbeam.server.app import create_app
from fullbeam.server.settings import Settings
from server_harness import Running, running

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(max_choices=64) as server:
        yield server
        server.check_idle()


@pytest.fixture(scope="module")
def document(server: Running) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


PAGES = create_app(lambda: pytest.fail("loaded"), Settings(name="fake")).openapi()["paths"]
OPERATIONS = [(path, method) for path, methods in PAGES.items() for method in methods]


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_made_up_requests(document: Any, path: str, method: str) -> None:
    @settings(
        max_examples=50,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=document[path][method].as_strategy())
    def run(case: Any) -> None:
        # Made-up names of models are all alike: let most requests get to the engine.
        if case.path_parameters and len(case.path_parameters["model"]) % 4:
            case.path_parameters["model"] = "fake"
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "fake"
        case.call_and_validate(checks=CHECKS, timeout=10)

    run()
