# SPDX-License-Identifier: Apache-2.0
"""The OpenAPI page of `/v1/completions`: complete, and true of what the server does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import jsonschema_rs
import pytest

from fullbeam.params import CompletionParams
from fullbeam.server import openai_fields, schema
from fullbeam.server.settings import Settings

Client: TypeAlias = Any  # both are in conftest.py, which cannot be imported
FakeModel: TypeAlias = Any
Json = dict[str, Any]

SETTINGS = Settings(name="fake")
BODY: Json = schema.completion_request(SETTINGS)["requestBody"]["content"]["application/json"]
FIELDS: Json = BODY["schema"]["properties"]
ANSWER: Json = schema.completion_responses()[200]["content"]["application/json"]["schema"]
OWN = {"model", "prompt", "stream", "stream_options", "use_beam_search", "return_token_ids"}
WITH_DEFAULT = [name for name, field in FIELDS.items() if "default" in field and name != "prompt"]
# Fields that are refused alone, with what makes them welcome.
BESIDE: Json = {
    "stream_options": {"stream": True},
    **{name: {"use_beam_search": True} for name in openai_fields.SEARCH_NAMES},
    **{name: {"use_beam_search": True} for name in openai_fields.ALIASES},
    "diversity_groups": {"use_beam_search": True, "beam_width": 128},
    "num_beam_groups": {"use_beam_search": True, "beam_width": 128},
}


def test_every_field_is_there() -> None:
    names = {*openai_fields.PARAM_NAMES, *openai_fields.SEARCH_NAMES, *openai_fields.ALIASES}
    names |= {*openai_fields.NOT_SUPPORTED, *openai_fields.WITHOUT_EFFECT, "request_id", *OWN}
    assert set(FIELDS) == names
    for field in FIELDS.values():
        assert field["description"]
    assert set(schema._ORDER) >= openai_fields.PARAM_NAMES


@pytest.mark.parametrize("name", WITH_DEFAULT)
def test_defaults_are_the_defaults(client: Client, model: FakeModel, name: str) -> None:
    beside = BESIDE.get(name, {})
    client.post(prompt="a", **beside)
    client.post(prompt="a", **beside | {name: FIELDS[name]["default"]})
    (_, plain), (_, given) = model.calls
    assert given == plain


def ranges() -> Iterator[tuple[str, Any, Any]]:
    """Fields with the value at a bound, and one beyond it."""
    for name, field in FIELDS.items():
        for option in field.get("anyOf", []):
            if "minimum" in option:
                below = 2 if option["minimum"] == 1 else 1
                yield name, option["minimum"], option["minimum"] - below
            if "maximum" in option:
                yield name, option["maximum"], option["maximum"] + 1
            if "maxLength" in option and name != "model":
                yield name, "x" * option["maxLength"], "x" * (option["maxLength"] + 1)
            if "maxItems" in option:
                texts = [str(number) for number in range(option["maxItems"] + 1)]
                yield name, texts[1:], texts


@pytest.mark.parametrize(("name", "bound", "beyond"), list(ranges()))
def test_ranges_are_the_ranges(client: Client, name: str, bound: Any, beyond: Any) -> None:
    beside = BESIDE.get(name, {})
    assert client.post(prompt="a", **beside | {name: bound}).status_code == 200
    error = client.error_of(400, prompt="a", **beside | {name: beyond})
    assert error["param"] == openai_fields.ALIASES.get(name, name)


def test_limits_are_those_of_the_settings() -> None:
    settings = Settings(name="fake", max_logprobs=20, max_stop=9)
    fields = schema._completion_fields(settings)["properties"]
    assert fields["logprobs"]["anyOf"][0]["maximum"] == 20
    assert "0..20" in fields["logprobs"]["description"]
    assert fields["stop"]["anyOf"][1]["maxItems"] == 9


@pytest.mark.parametrize("name", BODY["examples"])
def test_examples_are_accepted(client: Client, model: FakeModel, name: str) -> None:
    example = BODY["examples"][name]["value"]
    assert jsonschema_rs.is_valid(BODY["schema"], example)
    assert client.send("POST", "/v1/completions", json=example).status_code == 200
    assert model.calls[0][1] != CompletionParams()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"logprobs": 2, "echo": True, "n": 2},
        {"stop": " w2"},
        {"max_tokens": 0},
    ],
)
def test_answers_are_as_described(client: Client, fields: Json) -> None:
    body = client.post(prompt="abc", **fields).json()
    jsonschema_rs.validate(ANSWER, body)


def test_page_holds_the_routes_of_this_surface(client: Client) -> None:
    paths = client.send("GET", "/openapi.json").json()["paths"]
    for path in ("/v1/completions", "/completions", "/v1/engines/{model}/completions"):
        operation = paths[path]["post"]
        request = operation["requestBody"]["content"]["application/json"]["schema"]
        assert set(request["properties"]) == set(FIELDS)
        answer = operation["responses"]["200"]["content"]["application/json"]
        jsonschema_rs.validate(answer["schema"], answer["example"])
        statuses = {"200", "400", "401", "404", "413", "429", "500", "503"}
        assert statuses == set(operation["responses"])
