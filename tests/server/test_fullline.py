# SPDX-License-Identifier: Apache-2.0
"""`POST /v1/complete/gpt`: fields, answers, errors, and requests that a newer one ends."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, TypeAlias

import httpx
import pytest

import fake_model
from fullbeam.engine.engine import Engine
from fullbeam.model import Model
from fullbeam.models.vocabulary import InfillTokens
from fullbeam.params import CompletionParams
from fullbeam.results import Choice, Completion, Usage
from fullbeam.server.fullline_fields import DETAIL_KEYS, FIELDS, PARAM_NAMES, split_code
from fullbeam.server.settings import EditorOptions
from table_model import (
    AFTER,
    LETTERS,
    NUMPY,
    NUMPY_AFTER,
    NUMPY_START,
    START,
    TableDecoder,
    TableTokenizer,
)

Client: TypeAlias = Any  # it is in conftest.py, which cannot be imported
Json = dict[str, Any]
PATH = "/v1/complete/gpt"
BODY: Json = {"code": "import num", "filename": "a/test.py", "offset": 10, "prefix": "num"}
DEFAULTS: Json = {"mode": "FULL_LINE", "max_tokens": 10, "beam_size": 3, "context_len": -1}


class Suggesting:
    """Stands in for `fullbeam.Model`: suggests the same each time, records what it was asked."""

    name = "fake"
    path = None
    context = 4096

    def __init__(self) -> None:
        self.tokenizer = SimpleNamespace(infill=None)
        self.calls: list[tuple[str, CompletionParams]] = []
        self.found = [("numpy as np", 0.62), ("num", 0.0)]
        self.fault: Exception | None = None

    async def acomplete(self, prompt: str, *, params: CompletionParams) -> Completion:
        self.calls.append((prompt, params))
        if self.fault is not None:
            raise self.fault
        choices = [
            Choice(idx, text, [1], "stop", None, None, score)
            for idx, (text, score) in enumerate(self.found)
        ]
        return Completion(choices, Usage(1, 2))

    @property
    def asked(self) -> CompletionParams:
        return self.calls[-1][1]

    def prepare(self) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture
def model() -> Suggesting:
    return Suggesting()


def post(client: Client, body: object = None, path: str = PATH, **options: Any) -> httpx.Response:
    response: httpx.Response = client.send("POST", path, json=body or BODY, **options)
    return response


def completions(client: Client, **fields: Any) -> Any:
    response = post(client, BODY | fields)
    assert response.status_code == 200, response.text
    body = response.json()
    assert list(body) == ["completions"]
    return body["completions"]


def error_of(response: httpx.Response, status: int) -> Json:
    """Return the error object of a response, its form checked."""
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"]
    error: Json = body["error"]
    assert set(error) == {"code", "message", "type", "issue"}
    assert error["code"] == status
    assert isinstance(error["message"], str)
    assert isinstance(error["type"], str)
    assert set(error["issue"]) == {"message", "validator", "value"}
    assert all(isinstance(value, str) for value in error["issue"].values())
    return error


def expected(**changes: Any) -> CompletionParams:
    return CompletionParams(**DEFAULTS | {"prefix": "num", "token_healing": True} | changes)


# Fields


@pytest.mark.parametrize("path", [PATH, "/v1/complete", "/v1/complete?language=Python"])
def test_every_route_answers(client: Client, path: str) -> None:
    assert post(client, path=path).json() == {"completions": ["numpy as np", "num"]}


def test_content_type_may_have_a_suffix_or_be_anything(client: Client) -> None:
    for kind in ("application/json;charset=utf-8", "text/plain"):
        content = json.dumps(BODY).encode()
        response = client.send("POST", PATH, content=content, headers={"Content-Type": kind})
        assert response.status_code == 200


def test_what_is_absent_has_its_default(client: Client, model: Suggesting) -> None:
    post(client, {"code": "import num", "filename": "x"})
    assert model.calls == [("import num", expected(prefix=""))]
    assert (model.asked.only_full_lines, model.asked.group_answers) == (True, False)
    assert (model.asked.top_n, model.asked.group_top_n) == (5, 5)
    assert (model.asked.len_norm, model.asked.diversity_strength) == ((0.3, 2.0), 0.3)
    assert model.asked.diversity_groups == 1


GIVEN: dict[str, tuple[Any, Json]] = {
    "code": ("# import num", {}),
    "offset": (4, {}),
    "prefix": ("nu", {"prefix": "nu"}),
    "mode": ("ONE_TOKEN", {"mode": "ONE_TOKEN"}),
    "num_iterations": (5, {"max_tokens": 5}),
    "beam_size": (6.0, {"beam_size": 6}),
    "diversity_groups": (4, {"diversity_groups": 4}),
    "diversity_strength": (0.7, {"diversity_strength": 0.7}),
    "len_norm_base": (2, {"len_norm_base": 2.0}),
    "len_norm_pow": (0.7, {"len_norm_pow": 0.7}),
    "group_answers": (True, {"group_answers": True}),
    "top_n": (0, {"top_n": 0}),
    "group_top_n": (7, {"group_top_n": 7}),
    "only_full_lines": (False, {"only_full_lines": False}),
    "context_len": (99, {"context_len": 99}),
    "min_prefix_dist": (0.2, {"min_prefix_dist": 0.2}),
    "min_edit_dist": (0.1, {"min_edit_dist": 0.1}),
    "keep_kinds": (["prob", "long"], {"keep_kinds": ("prob", "long")}),
    "use_top_n": (False, {"top_n": None}),
}


@pytest.mark.parametrize("name", GIVEN)
def test_every_field_reaches_the_model(client: Client, model: Suggesting, name: str) -> None:
    completions(client)
    value, changes = GIVEN[name]
    completions(client, **{name: value})
    assert model.asked == expected(**changes)
    assert model.calls[0] != model.calls[1]


def test_no_field_is_left_untested() -> None:
    others = {"filename", "token", "model", "detailed", *DETAIL_KEYS}  # below
    assert set(FIELDS) == set(GIVEN) | others
    assert set(GIVEN) >= set(PARAM_NAMES)


def test_token_is_the_older_name_of_prefix(client: Client, model: Suggesting) -> None:
    body = {name: value for name, value in BODY.items() if name != "prefix"}
    post(client, body | {"token": "num"})
    post(client, body | {"token": "num", "prefix": "um"})
    assert [(left, params.prefix) for left, params in model.calls] == [
        ("import ", "num"),
        ("import n", "um"),
    ]


def test_null_is_the_default_but_for_limits(client: Client, model: Suggesting) -> None:
    names = set(FIELDS) - {"code", "top_n", "group_top_n"}
    post(client, {"code": "import num", **dict.fromkeys(names)})
    assert model.calls == [("import num", expected(prefix=""))]
    completions(client, top_n=None)
    assert model.asked == expected(top_n=None)
    completions(client, group_top_n=None)
    assert model.asked == expected(group_top_n=None)


def test_unknown_and_ignored_fields(client: Client, model: Suggesting) -> None:
    completions(client, branches=[1], tokens={}, generator=2, whatever=None, use_top_n=True)
    assert model.asked == expected()


@pytest.mark.parametrize("name", ["best", "best (fake)", "bestest", "fake", "", None])
def test_models_by_name(client: Client, name: str | None) -> None:
    assert completions(client, model=name)


# Offset and prefix


@pytest.mark.parametrize(
    ("code", "offset", "prefix", "left", "right"),
    [
        ("import num\nimport os", 10, "num", "import ", "\nimport os"),
        ("import num", 7, "num", "import ", ""),
        ("import num", 99, "num", "import ", ""),
        ("import ", 7, "", "import ", ""),
        ("x = 1", 5, "foo", "x = 1", ""),
        ("aa", 1, "a", "", "a"),
        ("import num; x", 7, "num", "import ", "; x"),
        ("f(a)", 2, "", "f(", "a)"),
        ("f(a)", 2, "b", "f(", "a)"),
        ("abc", -1, "", "", "abc"),
        ("abc", None, "c", "ab", ""),
        ("🙂 = num; y", 8, "num", "🙂 = ", "; y"),  # UTF-16 units
        ("🙂 = num; y", 7, "num", "🙂 = ", "; y"),  # characters
        ("🙂 = num; y", 4, "num", "🙂 = ", "; y"),
        ("🙂 = ", 99, "num", "🙂 = ", ""),
        ("🙂 = x", 3, "num", "🙂 ", "= x"),  # neither: UTF-16 units
        ("🙂x", 1, "", "", "x"),  # inside a character
        ("\ud83dx", 2, "x", "", ""),
    ],
)
def test_the_code_is_split(
    code: str, offset: int | None, prefix: str, left: str, right: str
) -> None:
    assert split_code(code, offset, prefix) == (left, right)


def test_the_model_is_given_the_left_part(client: Client, model: Suggesting) -> None:
    completions(client, code="import num\nimport os")
    assert model.calls == [("import ", expected())]


# Text right of the cursor

INFILL = InfillTokens(prefix=22, suffix=21, middle=20)


def test_right_text_goes_to_models_that_fill_in(client: Client, model: Suggesting) -> None:
    model.tokenizer.infill = INFILL
    completions(client, code="import num\nimport os")
    assert model.asked == expected(suffix="\nimport os")


@pytest.mark.parametrize(
    "fields",
    [
        {"code": "import num"},
        {"code": "import num \n\t\n"},
        {"code": "import num\nimport os", "context_len": 63},
        {"code": "import num\nimport os", "num_iterations": 4040},
    ],
)
def test_right_text_may_be_missing_or_too_much(
    client: Client, model: Suggesting, fields: Json
) -> None:
    model.tokenizer.infill = INFILL
    completions(client, **fields)
    assert model.asked.suffix is None


def test_right_text_can_be_switched_off(make_client: Any, model: Suggesting) -> None:
    model.tokenizer.infill = INFILL
    client = make_client(editors=EditorOptions(infill=False))
    completions(client, code="import num\nimport os")
    assert model.asked == expected()


def test_right_text_is_cut_behind_a_line(client: Client, model: Suggesting) -> None:
    model.tokenizer.infill = INFILL
    completions(client, code="import num\n" + 500 * "abcd\n")
    assert model.asked.suffix == "\n" + 204 * "abcd\n"
    completions(client, code="import num" + 2000 * "a")
    assert model.asked.suffix == 1024 * "a"


# Answers


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("started_ts", 1600000000000),
        ("context_len", -1),
        ("language", "Python"),
        ("keep_kinds", ["short"]),
        ("min_prefix_dist", 0.2),
        ("min_edit_dist", 0),
        ("rollback_prefix", ["a"]),
        ("detailed", True),
        ("language", None),
    ],
)
def test_some_keys_ask_for_scores(client: Client, name: str, value: Any) -> None:
    first, second = completions(client, **{name: value})
    assert first == {"score": 0.62, "suggestion": "numpy as np", "isSyntaxCorrect": None}
    assert 0 < second["score"] < 1e-300  # too small for a float


def test_every_key_that_asks_for_scores_is_known() -> None:
    names = {"started_ts", "context_len", "language", "keep_kinds", "min_prefix_dist"}
    assert names | {"min_edit_dist", "rollback_prefix"} == DETAIL_KEYS


def test_scores_can_be_refused(client: Client) -> None:
    assert completions(client, language="Python", detailed=False) == ["numpy as np", "num"]


def test_scores_can_be_the_servers_default(make_client: Any) -> None:
    client = make_client(editors=EditorOptions(detailed_default=True))
    assert completions(client)[0]["score"] == 0.62
    assert completions(client, detailed=False)[0] == "numpy as np"


def test_nothing_found_is_an_empty_list(client: Client, model: Suggesting) -> None:
    model.found = []
    assert completions(client) == []
    assert completions(client, detailed=True) == []


# Errors


@pytest.mark.parametrize(
    ("changes", "message", "validator", "value"),
    [
        ({"code": None}, "'code': None is not of type 'string'", "type", "string"),
        ({"code": 7}, "'code': 7 is not of type 'string'", "type", "string"),
        ({"filename": []}, "'filename': [] is not of type 'string'", "type", "string"),
        ({"offset": "1"}, "'offset': '1' is not of type 'integer'", "type", "integer"),
        ({"offset": 1.5}, "'offset': 1.5 is not of type 'integer'", "type", "integer"),
        ({"offset": True}, "'offset': True is not of type 'integer'", "type", "integer"),
        ({"beam_size": 0}, "'beam_size': 0 is less than the minimum of 1", "minimum", "1"),
        ({"beam_size": 129}, "is greater than the maximum of 128", "maximum", "128"),
        ({"num_iterations": 0}, "is less than the minimum of 1", "minimum", "1"),
        ({"top_n": -1}, "'top_n': -1 is less than the minimum of 0", "minimum", "0"),
        ({"len_norm_base": -1}, "-1 is not greater than -1", "exclusiveMinimum", "-1"),
        ({"len_norm_pow": "2"}, "'2' is not of type 'number'", "type", "number"),
        ({"group_answers": 1}, "1 is not of type 'boolean'", "type", "boolean"),
        ({"mode": "LINE"}, "'LINE' is not one of", "enum", "['FULL_LINE', 'ONE_TOKEN']"),
        ({"mode": []}, "[] is not one of", "enum", "['FULL_LINE', 'ONE_TOKEN']"),
        ({"context_len": 0}, "'context_len': 0 is not valid under any of", "anyOf", "[{"),
        ({"min_edit_dist": 1.5}, "1.5 is greater than the maximum of 1", "maximum", "1"),
        ({"keep_kinds": ["best"]}, "'keep_kinds[0]': 'best' is not one of", "enum", "['short"),
        ({"keep_kinds": "prob"}, "'prob' is not of type 'array'", "type", "array"),
        ({"keep_kinds": []}, "'keep_kinds': [] has fewer items than 1", "minItems", "1"),
        ({"rollback_prefix": [1]}, "'rollback_prefix[0]': 1 is not", "type", "string"),
        ({"model": 1}, "'model': 1 is not of type 'string'", "type", "string"),
        ({"code": {"x": "y" * 500}}, "y... is not of type", "type", "string"),
    ],
)
def test_wrong_fields(
    client: Client, changes: Json, message: str, validator: str, value: str
) -> None:
    error = error_of(post(client, BODY | changes), 400)
    assert error["message"] == "Wrong parameters passed to gpt"
    assert error["type"] == "ValidationError"
    assert message in error["issue"]["message"]
    assert error["issue"]["validator"] == validator
    assert error["issue"]["value"].startswith(value)


@pytest.mark.parametrize("name", ["code", "filename"])
def test_missing_fields(client: Client, name: str) -> None:
    body = {key: value for key, value in BODY.items() if key != name}
    assert error_of(post(client, body), 400)["issue"] == {
        "message": f"{name!r} is a required property",
        "validator": "required",
        "value": "['code', 'filename']",
    }


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b'"code"', b"\xff", b'{"a": NaN}'])
def test_bodies_that_are_no_objects(client: Client, content: bytes) -> None:
    error = error_of(client.send("POST", PATH, content=content), 400)
    assert error["issue"]["message"].startswith("the body must be")


def test_half_a_character_in_the_prefix(client: Client) -> None:
    content = json.dumps(BODY | {"prefix": "\ud83d"})  # escaped
    error = error_of(client.send("POST", PATH, content=content), 400)
    assert "half a character" in error["issue"]["message"]


def test_unknown_model(client: Client) -> None:
    error = error_of(post(client, BODY | {"model": "other"}), 404)
    assert error["type"] == "ModelNotFound"
    assert "'other' does not exist" in error["issue"]["message"]


def test_fault_keeps_its_inner_workings(client: Client, model: Suggesting) -> None:
    model.fault = RuntimeError("a secret of the engine")
    response = post(client)
    error_of(response, 500)
    assert "secret" not in response.text


def test_what_is_in_the_way_of_a_route(client: Client) -> None:
    assert error_of(client.send("GET", PATH), 405)["type"] == "MethodNotAllowed"
    assert error_of(post(client, path="/v1/complete/other"), 404)["type"] == "UnknownUrl"


@pytest.mark.parametrize("path", [PATH, "/v1/complete", "/v1/status", "/v1/languages"])
def test_tokens(make_client: Any, path: str) -> None:
    client = make_client(api_keys=("key", "other"))

    def answer(header: str | None) -> httpx.Response:
        method = "POST" if path.startswith("/v1/complete") else "GET"
        options: Json = {"json": BODY} if method == "POST" else {}
        headers = {} if header is None else {"Authorization": header}
        response: httpx.Response = client.send(method, path, headers=headers, **options)
        return response

    for header in ("key", "other", "Bearer key", "bearer other"):
        assert answer(header).status_code == 200
    for wrong in (None, "wrong", "Bearer wrong", "Basic key", ""):
        assert error_of(answer(wrong), 403)["type"] == "InvalidApiKey"


# Companion routes


def test_status(client: Client) -> None:
    response = client.send("GET", "/v1/status", headers={"Authorization": "whatever"})
    assert (response.status_code, response.json()) == (
        200,
        {"status": True, "models_GPT": ["fake"]},
    )


def test_status_before_the_model_is_there(make_client: Any) -> None:
    client = make_client()

    async def run() -> httpx.Response:
        async with client.running_app() as app, web(app) as one:
            app.state.service._model = None
            return await one.get("/v1/status")

    error_of(asyncio.run(run()), 500)


def test_languages(client: Client) -> None:
    body = client.send("GET", "/v1/languages").json()
    assert list(body) == ["languages"]
    assert {"Python3", "Java", "Kotlin"} <= set(body["languages"])


def test_models_for_both_families(client: Client) -> None:
    body = client.send("GET", "/v1/models").json()
    assert (body["object"], body["data"][0]["id"]) == ("list", "fake")
    assert body["models"] == [body["best_model"]]
    assert body["best_model"] == {
        "name": "fake",
        "type": "main",
        "lifetime": None,
        "start_at": None,
        "time_left": None,
        "model": "fake",
        "main": True,
        "best": True,
    }


def test_models_by_bare_token(make_client: Any) -> None:
    client = make_client(api_keys=("key",))
    for header, status in (("key", 200), ("Bearer key", 200), ("wrong", 401)):
        response = client.send("GET", "/v1/models", headers={"Authorization": header})
        assert response.status_code == status


def test_openapi_knows_every_field(client: Client) -> None:
    document = client.send("GET", "/openapi.json").json()
    for path in (PATH, "/v1/complete"):
        route = document["paths"][path]["post"]
        schema = route["requestBody"]["content"]["application/json"]["schema"]
        assert set(schema["properties"]) == set(FIELDS)
        assert schema["required"] == ["code", "filename"]
        assert schema["properties"]["num_iterations"]["default"] == 10
        assert {"type": "null"} in schema["properties"]["mode"]["anyOf"]
        assert {"200", "204", "400", "403", "404", "500"} <= set(route["responses"])


# With an engine


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, make_client: Any) -> Iterator[Callable[..., Client]]:
    """Return a function from a decoder, a tokenizer and settings to a client of their server."""
    loaded: list[Any] = []

    def start(decoder: Any, tokenizer: Any, **settings: Any) -> Client:
        model = Model(Engine(decoder, tokenizer, max_rows=32, page_size=4), name="fake")
        loaded.append(model.close)
        monkeypatch.setattr(model, "close", lambda: None)  # the end of one server is not the end
        client = make_client(**settings)
        client.model = model
        return client

    yield start
    for close in loaded:
        close()


def web(app: Any, **options: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, **options)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


def letters(serve: Any) -> Client:
    return serve(TableDecoder(START, AFTER), TableTokenizer(LETTERS))


def test_example_1(serve: Any) -> None:
    client = letters(serve)
    fields = {"code": "", "offset": 0, "prefix": "", "beam_size": 2, "num_iterations": 3}
    assert completions(client, **fields) == ["ab", "ac", "b"]
    assert completions(client, **fields, only_full_lines=False) == ["ab", "ac", "b"]
    assert completions(client, **fields, top_n=1) == ["ab"]
    other = completions(client, **fields, len_norm_base=2.0, len_norm_pow=0.7, detailed=True)
    assert [item["suggestion"] for item in other] == ["b", "ab", "ac"]
    assert [item["score"] for item in other] == pytest.approx([0.246098, 0.119592, 0.108929], 1e-5)


def test_examples_2_and_3(serve: Any) -> None:
    client = letters(serve)
    fields = {"code": "", "offset": 0, "prefix": "", "num_iterations": 2}
    second = {"beam_size": 2, "diversity_groups": 2, "diversity_strength": 1.0}
    assert completions(client, **fields, **second) == ["b", "c"]
    third = {"beam_size": 1, "diversity_groups": 3, "diversity_strength": 0.5}
    assert completions(client, **fields, **third) == ["b", "a"]


@pytest.mark.parametrize("mode", ["FULL_LINE", "ONE_TOKEN"])
def test_example_4(serve: Any, mode: str) -> None:
    client = serve(TableDecoder(NUMPY_START, NUMPY_AFTER), TableTokenizer(NUMPY))
    fields = {"code": "num", "offset": 3, "beam_size": 2, "num_iterations": 2, "mode": mode}
    (found,) = completions(client, **fields, detailed=True)
    assert found["suggestion"] == "numpy"
    assert found["score"] == pytest.approx(0.708470, 1e-5)


def test_prefix_that_no_token_spells_has_no_suggestions(serve: Any) -> None:
    assert completions(letters(serve), code="", offset=0, prefix="xyz") == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beam_size": 33}, "beam_size must be at most 32 (max_rows) in all groups, got 33"),
        ({"diversity_groups": 100}, "diversity_groups must be at most 128 / beam_size, got 100"),
        ({"num_iterations": 64}, "prompt + num_iterations must be at most 64 tokens"),
        ({"num_iterations": 10**30}, "prompt + num_iterations must be at most 64 tokens"),
    ],
)
def test_what_the_engine_refuses(serve: Any, changes: Json, message: str) -> None:
    error = error_of(post(letters(serve), BODY | {"code": "", "prefix": ""} | changes), 400)
    assert error["issue"]["message"].startswith(message)
    assert (error["issue"]["validator"], error["issue"]["value"]) == ("", "")


CODE: Json = {"code": "bab  b\nab", "filename": "x.py", "offset": 9, "prefix": "ab"}
NEW_KEYS: Json = {
    "started_ts": 1650000000000,
    "language": "Python",
    "context_len": -1,
    "min_prefix_dist": 0.2,
    "min_edit_dist": 0.0,
    "keep_kinds": ["short", "prob"],
    "rollback_prefix": [],
}
EVALUATOR: Json = {
    "num_iterations": 5,
    "beam_size": 6,
    "len_norm_base": 2.0,
    "len_norm_pow": 0.7,
    "only_full_lines": False,
}
PROFILES: dict[str, Json] = {
    "published": {
        "mode": "FULL_LINE",
        "num_iterations": 10,
        "beam_size": 3,
        "diversity_groups": 3,
        "diversity_strength": 0.3,
        "top_n": 5,
        "only_full_lines": True,
    },
    "plugin 2020-05": {
        "token": "ab",
        "mode": "FULL_LINE",
        "num_iterations": 10,
        "beam_size": 6,
        "diversity_groups": 5,
        "diversity_strength": 0.3,
        "len_norm_base": 0.0,
        "len_norm_pow": 0.0,
        "only_full_lines": True,
        "model": "best (fake)",
    },
    "plugin 2022": {
        **NEW_KEYS,
        "mode": "FULL_LINE",
        "num_iterations": 5,
        "beam_size": 6,
        "diversity_groups": 1,
        "diversity_strength": 0.3,
        "len_norm_base": 2.0,
        "len_norm_pow": 0.7,
        "top_n": 3,
        "group_top_n": 5,
        "group_answers": True,
        "only_full_lines": False,
    },
    "evaluator": {**EVALUATOR, "top_n": 3, "offset": 7},
    "web demo": {**EVALUATOR, "top_n": 5, "code": "bab  b\ndab", "offset": 9},
}


@pytest.mark.parametrize("name", PROFILES)
def test_client_profiles(serve: Any, name: str) -> None:
    profile = CODE | PROFILES[name]
    client = serve(fake_model.FakeDecoder(256), fake_model.FakeTokenizer())
    found = completions(client, **profile)
    if name == "plugin 2022":
        assert all(set(item) == {"score", "suggestion", "isSyntaxCorrect"} for item in found)
        scores = [item["score"] for item in found]
        assert scores == sorted(scores, reverse=True)
        assert all(0 < score <= 1 for score in scores)
        found = [item["suggestion"] for item in found]
    assert found
    assert len(found) <= profile.get("top_n", 5)
    assert len(set(found)) == len(found)
    assert all(text.startswith("ab") and len(text) > 2 and "\n" not in text for text in found)


def test_healing_prefix_and_right_text_together(serve: Any) -> None:
    """The model gets whole tokens on both sides, and starts where it may choose its own."""
    tokenizer = fake_model.FakeTokenizer()
    tokenizer.infill = INFILL  # type: ignore[misc]
    client = serve(fake_model.FakeDecoder(256), tokenizer)
    engine, asked = client.model.engine, []
    submit = engine.submit

    def recorded(*args: Any, **options: Any) -> Any:
        asked.append(submit(*args, **options))
        return asked[-1]

    engine.submit = recorded
    fields = {"code": "dd ab\ncd" + 16 * " dd", "offset": 5, "prefix": "b", "num_iterations": 4}
    found = completions(client, **fields, only_full_lines=False, top_n=None)
    assert found
    assert all(text.startswith("b") and len(text) > 1 for text in found)
    (request,) = asked
    # BOS, PRE, "dd", " ", SUF, "\n", "cd", " ", "dd", ..., MID: the "a" is chosen anew.
    assert request.prompt_ids.tolist() == [0, 22, 13, 6, 21, 7, 11, *16 * [6, 13], 20]
    assert (request.constraint, request.healed) == (b"ab", b"a")


# Requests that end early


class Gated(fake_model.FakeDecoder):
    """Waits in one of its steps."""

    def __init__(self, hold_at: int) -> None:
        super().__init__(256)
        self.hold_at = hold_at
        self.may_go_on = threading.Event()

    def forward(self, batch: Any, kv: Any, stop: Any) -> Any:
        if self.num_calls + 1 == self.hold_at:
            self.num_calls += 1
            self.may_go_on.wait(10)
            self.num_calls -= 1
        return super().forward(batch, kv, stop)


@pytest.fixture
def gated(serve: Any) -> Callable[..., Client]:
    """Return a function from settings to a client of a server that waits in its third step."""
    return lambda **settings: serve(Gated(hold_at=3), fake_model.FakeTokenizer(), **settings)


LONG: Json = CODE | {"num_iterations": 30, "top_n": None}
SHORT: Json = CODE | {"num_iterations": 1}


async def send_two(
    client: Client,
    first: Json,
    second: Json,
    expected: list[int],
    *,
    headers: tuple[Json, Json] = ({}, {}),
    addresses: tuple[str, str] = ("1.1.1.1", "1.1.1.1"),
) -> None:
    """Send a second request while the first one computes its third step; compare the statuses."""
    decoder: Gated = client.model.engine._runner._decoder
    async with (
        client.running_app() as app,
        web(app, client=(addresses[0], 1)) as one,
        web(app, client=(addresses[1], 2)) as other,
    ):
        older = asyncio.create_task(one.post(PATH, json=first, headers=headers[0]))
        while decoder.num_calls < decoder.hold_at:
            await asyncio.sleep(0.001)
        newer = asyncio.create_task(other.post(PATH, json=second, headers=headers[1]))
        if expected == [200, 200]:
            await asyncio.sleep(0.1)
            assert not older.done()
            assert not newer.done()
        else:  # one of them need not wait for the step under way
            tasks = older, newer
            await asyncio.wait(tasks, timeout=5, return_when=asyncio.FIRST_COMPLETED)
            assert older.done() or newer.done()
        decoder.may_go_on.set()
        responses = [await older, await newer]
        assert [response.status_code for response in responses] == expected
        assert all(response.status_code != 204 or not response.content for response in responses)
        assert app.state.service.num_requests == 0
        await asyncio.to_thread(wait_idle, client.model)


def wait_idle(model: Model) -> None:
    deadline = time.monotonic() + 10
    while any(
        (stats := model.engine.stats(), stats.num_rows, stats.num_waiting, stats.num_used_pages)[1:]
    ):
        assert time.monotonic() < deadline, "rows or pages are not given back"
        time.sleep(0.002)
    model.engine.check()


def test_a_newer_request_ends_the_older_one_within_a_step(gated: Any) -> None:
    client = gated()
    asyncio.run(send_two(client, LONG, SHORT, [204, 200]))
    decoder = client.model.engine._runner._decoder
    assert decoder.num_calls == decoder.hold_at + 1  # the newer request's only one


def test_other_files_are_let_alone(gated: Any) -> None:
    asyncio.run(send_two(gated(), LONG, SHORT | {"filename": "y.py"}, [200, 200]))


def test_other_clients_are_let_alone(gated: Any) -> None:
    addresses = ("1.1.1.1", "2.2.2.2")
    asyncio.run(send_two(gated(), LONG, SHORT, [200, 200], addresses=addresses))


@pytest.mark.parametrize(
    ("second", "expected"), [("Bearer one", [204, 200]), ("one", [204, 200]), ("two", [200, 200])]
)
def test_a_client_is_known_by_its_token(gated: Any, second: str, expected: list[int]) -> None:
    headers = {"Authorization": "one"}, {"Authorization": second}
    addresses = ("1.1.1.1", "2.2.2.2")
    client = gated(api_keys=("one", "two"))
    asyncio.run(send_two(client, LONG, SHORT, expected, headers=headers, addresses=addresses))


def test_superseding_can_be_switched_off(gated: Any) -> None:
    client = gated(editors=EditorOptions(supersede=False))
    asyncio.run(send_two(client, LONG, SHORT, [200, 200]))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [(5, 6, [204, 200]), (5, 5, [204, 200]), (6, 5, [200, 204]), (6, None, [204, 200])],
)
def test_the_one_sent_last_is_the_newer_one(
    gated: Any, first: int, second: int | None, expected: list[int]
) -> None:
    """Requests may overtake each other on their way."""
    bodies = LONG | {"started_ts": first}, SHORT | {"started_ts": second}
    asyncio.run(send_two(gated(), *bodies, expected))


def test_too_many_requests(gated: Any) -> None:
    other_file = SHORT | {"filename": "y.py"}
    asyncio.run(send_two(gated(max_requests=1), LONG, other_file, [200, 429]))


def test_a_wrong_request_ends_nothing(gated: Any) -> None:
    client = gated()
    decoder = client.model.engine._runner._decoder

    async def run() -> list[int]:
        async with client.running_app() as app, web(app) as one:
            older = asyncio.create_task(one.post(PATH, json=LONG))
            while decoder.num_calls < decoder.hold_at:
                await asyncio.sleep(0.001)
            wrong = await one.post(PATH, json=SHORT | {"beam_size": 0})
            decoder.may_go_on.set()
            return [(await older).status_code, wrong.status_code]

    assert asyncio.run(run()) == [200, 400]


def test_many_keystrokes_leave_only_the_last(gated: Any) -> None:
    client = gated(max_requests=1)

    async def run() -> list[int]:
        async with client.running_app() as app, web(app) as one:
            tasks = []
            for _ in range(20):
                tasks.append(asyncio.create_task(one.post(PATH, json=LONG)))
                await asyncio.sleep(0.005)
            client.model.engine._runner._decoder.may_go_on.set()
            answers = [(await task).status_code for task in tasks]
            await asyncio.to_thread(wait_idle, client.model)
            assert app.state.newest._running == {}
            return answers

    assert asyncio.run(run()) == [204] * 19 + [200]


def test_a_client_that_goes_away_stops_the_search(gated: Any) -> None:
    client = gated()
    decoder = client.model.engine._runner._decoder

    async def run() -> None:
        async with client.running_app() as app:
            sent: list[Any] = [{"type": "http.request", "body": json.dumps(LONG).encode()}]

            async def receive() -> Any:
                if sent:
                    return sent.pop()
                while decoder.num_calls < decoder.hold_at:
                    await asyncio.sleep(0.001)
                return {"type": "http.disconnect"}

            async def send(message: Any) -> None:
                pass

            scope: Json = {"type": "http", "method": "POST", "path": PATH, "headers": []}
            scope |= {"query_string": b"", "asgi": {"spec_version": "2.3"}}
            await asyncio.wait_for(app(scope, receive, send), 5)
            decoder.may_go_on.set()
            await asyncio.to_thread(wait_idle, client.model)
            assert app.state.newest._running == {}

    asyncio.run(run())
    assert decoder.num_calls == decoder.hold_at
