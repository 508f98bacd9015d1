# SPDX-License-Identifier: Apache-2.0
"""`POST /v1/complete/gpt`: code completion in editors, as a search for the rest of the line."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Depends, FastAPI, Request
from starlette.responses import JSONResponse, Response

from fullbeam.params import CompletionParams, ParameterError
from fullbeam.server.auth import require_key
from fullbeam.server.errors import ApiError, Json, Surface
from fullbeam.server.fullline_fields import (
    Call,
    Issue,
    from_value_error,
    read_call,
    request_schema,
)
from fullbeam.server.openai import read_json
from fullbeam.server.stream import until_disconnect

if TYPE_CHECKING:
    from fullbeam.model import Model
    from fullbeam.results import Choice, Completion
    from fullbeam.server.service import Service

T = TypeVar("T")

LANGUAGES = (
    *("Python3", "Java", "Kotlin", "JavaScript", "TypeScript", "C", "C++", "C#", "Go", "Rust"),
    *("PHP", "Ruby", "Swift", "Scala", "Shell", "SQL", "HTML", "CSS"),
)
"""What models of code know more or less; nothing depends on the language that a client names."""

_MAX_RIGHT = 1024
"""Characters right of the cursor that the model is given: some models read them after the text
left of it, and have to again whenever that grows; and what is further away says less."""

_MIN_INFILL_TOKENS = 64
"""Room below which the text left of the cursor gets all of it."""


class Superseded(Exception):
    """A newer request has come in the place of this one."""


class Newest:
    """The request under way for each client and file; a newer one ends it."""

    def __init__(self) -> None:
        self._running: dict[tuple[str, str], tuple[asyncio.Task[Any], int | None]] = {}

    async def run(
        self,
        key: tuple[str, str],
        started_ts: int | None,
        work: Callable[[], Coroutine[Any, Any, T]],
    ) -> T:
        """Return what `work` returns, unless another call with the same key comes meanwhile.

        Raises
        ------
        Superseded
            When one came, or when one that was sent later is there already.
        """
        older, older_ts = self._running.get(key, (None, None))
        if older is not None:
            if started_ts is not None and older_ts is not None and started_ts < older_ts:
                raise Superseded
            older.cancel()
        task = asyncio.ensure_future(work())
        entry = self._running[key] = task, started_ts
        try:
            return await task
        except asyncio.CancelledError:
            if self._running.get(key) is not entry:
                raise Superseded from None
            raise
        finally:
            if self._running.get(key) is entry:
                del self._running[key]


def add_routes(app: FastAPI) -> None:
    """Register the routes of this surface."""
    app.state.newest = Newest()
    guarded = [Depends(require_key)]
    for path in ("/v1/complete/gpt", "/v1/complete"):
        app.post(
            path,
            summary="Complete code in an editor",
            dependencies=guarded,
            openapi_extra=request_schema(),
            responses=_RESPONSES,
        )(complete)
    refusals: dict[int | str, Json] = {code: _RESPONSES[code] for code in (403, 500)}
    for path, answer in (("/v1/status", status), ("/v1/languages", languages)):
        app.get(path, dependencies=guarded, responses=refusals)(answer)


async def complete(request: Request) -> Response:
    """Suggest how the code goes on at the cursor, best first."""
    service: Service = request.app.state.service
    options = service.settings.editors
    call = read_call(await read_json(request))
    model = service.model_for(call.model)
    params = _with_right(call, model) if options.infill else call.params

    async def work() -> Completion:
        with service.slot(params.width):
            return await model.acomplete(call.left, params=params)

    newest: Newest = request.app.state.newest
    key = _client(request), call.filename
    try:
        result = await until_disconnect(
            request.receive,
            newest.run(key, call.started_ts, work) if options.supersede else work(),
        )
    except Superseded:
        return Response(status_code=204)
    except ParameterError as error:
        if error.field == "prefix":  # no tokens spell it: no text starts with it
            return JSONResponse({"completions": []})
        raise from_value_error(error) from error
    except ValueError as error:
        raise from_value_error(error) from error
    detailed = options.detailed_default if call.detailed is None else call.detailed
    return JSONResponse({"completions": [_item(choice, detailed) for choice in result.choices]})


async def status(request: Request) -> Response:
    """Tell whether the server can complete."""
    service: Service = request.app.state.service
    if not service.is_ready:  # editors know 200, 403 and 500 here
        raise ApiError(500, "the model is not loaded")
    return JSONResponse({"status": True, "models_GPT": [service.settings.name]})


async def languages(_request: Request) -> Response:
    """List languages that can be completed."""
    return JSONResponse({"languages": LANGUAGES})


def model_lists(name: str) -> Json:
    """Return what editors look for in the answer of `GET /v1/models`."""
    model = {
        "name": name,
        "type": "main",  # it was not loaded by a user for a while
        "lifetime": None,
        "start_at": None,
        "time_left": None,
        "model": name,
        "main": True,
        "best": True,
    }
    return {"best_model": model, "models": [model]}


def _render(error: ApiError) -> Response:
    """Return an error in the shape of this surface."""
    messages = {400: "Wrong parameters passed to gpt", 403: "Wrong token", 404: "No such model"}
    kind, validator, value = "ApiError", "", ""
    if isinstance(error, Issue):
        kind, validator, value = error.kind, error.validator, error.value
    elif error.code is not None:
        kind = "".join(word.capitalize() for word in error.code.split("_"))
    if error.code == "unknown_url":
        del messages[404]
    body = {
        "code": error.status,
        "message": messages.get(error.status, "gpt cannot answer"),
        "type": kind,
        "issue": {"message": error.message, "validator": validator, "value": value},
    }
    return JSONResponse({"error": body}, error.status, error.headers)


SURFACE = Surface(
    roots=("/v1/complete", "/v1/status", "/v1/languages"), render=_render, key_status=403
)


def _client(request: Request) -> str:
    """Return who asks: the key where there are keys, else the address."""
    service: Service = request.app.state.service
    if service.settings.api_keys:
        header = request.headers.get("authorization", "")
        return re.sub(r"^bearer +", "", header, flags=re.IGNORECASE)
    return request.client.host if request.client is not None else ""


def _with_right(call: Call, model: Model) -> CompletionParams:
    """Return the parameters with the text right of the cursor, where the model can use it."""
    params = call.params
    assert params.max_tokens is not None
    assert params.context_len is not None
    room = model.context - params.max_tokens
    if params.context_len > 0:
        room = min(room, params.context_len)
    if model.tokenizer.infill is None or room < _MIN_INFILL_TOKENS or not call.right.strip():
        return params
    right = call.right[:_MAX_RIGHT]
    if len(right) < len(call.right) and "\n" in right:
        right = right[: right.rindex("\n") + 1]
    return replace(params, suffix=right)


def _item(choice: Choice, detailed: bool) -> Json | str:
    if not detailed:
        return choice.text
    assert choice.score is not None
    # A probability may be too small for a float, yet it is above 0.
    score = max(choice.score, sys.float_info.min)
    return {"score": score, "suggestion": choice.text, "isSyntaxCorrect": None}


def _object(**properties: Json) -> Json:
    return {"type": "object", "properties": properties, "required": list(properties)}


_TEXT: Json = {"type": "string"}
_DETAILED = _object(
    score={"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    suggestion=_TEXT,
    isSyntaxCorrect={"type": "null"},
)
_SUGGESTIONS = _object(completions={"type": "array", "items": {"anyOf": [_TEXT, _DETAILED]}})
_ERROR = _object(
    error=_object(
        code={"type": "integer"},
        message=_TEXT,
        type=_TEXT,
        issue=_object(message=_TEXT, validator=_TEXT, value=_TEXT),
    )
)
_REFUSALS: dict[int | str, str] = {
    400: "A field is wrong: `issue` says how.",
    403: "The token is missing or wrong.",
    404: "There is no such model.",
    413: "The body is too large.",
    429: "Too many requests wait already.",
    500: "The server failed.",
    503: "The model is loading.",
}
_RESPONSES: dict[int | str, Json] = {
    status: {"description": text, "content": {"application/json": {"schema": _ERROR}}}
    for status, text in _REFUSALS.items()
}
_RESPONSES[200] = {
    "description": "Suggestions, best first; none is an empty list.",
    "content": {"application/json": {"schema": _SUGGESTIONS}},
}
_RESPONSES[204] = {"description": "A newer request took the place of this one."}
