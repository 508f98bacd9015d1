# SPDX-License-Identifier: Apache-2.0
"""`POST /api/v1/compatibility/openai/v1/completions`: fewer fields, held to their types.

Requests are answered as those of `/v1/completions`; errors are `{"detail": ...}`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, FastAPI, Request
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from fullbeam.checks import shown
from fullbeam.params import DEFAULT_MAX_TOKENS, MAX_STOP, MAX_WIDTH, CompletionParams
from fullbeam.server import openai, schema
from fullbeam.server.auth import require_key
from fullbeam.server.errors import ApiError, Json, Surface
from fullbeam.server.openai_fields import Call
from fullbeam.server.stream import ClientGone

if TYPE_CHECKING:
    from fullbeam.server.service import Service

BASE = "/api/v1/compatibility/openai/v1"


def _check_unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = "Input should be valid Unicode without lone surrogates"
        raise PydanticCustomError("string_unicode", message) from error
    return text


Text = Annotated[str, AfterValidator(_check_unicode)]


class StreamOptions(BaseModel):
    """How to stream."""

    model_config = ConfigDict(strict=True)

    include_usage: bool = False


class CompletionRequest(BaseModel):
    """What this surface understands; other fields are ignored."""

    model_config = ConfigDict(strict=True)

    model: Text
    prompt: Text
    temperature: float = Field(0, ge=0, le=2)
    n: int = Field(1, ge=1, le=MAX_WIDTH)
    stop: list[Text] | None = Field(None, min_length=1, max_length=MAX_STOP)
    max_tokens: int = Field(DEFAULT_MAX_TOKENS, ge=1)
    stream: bool = False
    stream_options: Annotated[
        StreamOptions | None,
        WithJsonSchema(
            {
                "type": ["object", "null"],
                "properties": {"include_usage": {"type": "boolean", "default": False}},
            }
        ),
    ] = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)


class InvalidBody(ApiError):
    """A body with all that is wrong with it.

    Parameters
    ----------
    violations
        Each with `loc` (where: "body", then names and indices), `msg` and `type`.
    """

    def __init__(self, violations: list[Json]) -> None:
        super().__init__(422, "; ".join(violation["msg"] for violation in violations))
        self.violations = violations


class Violation(BaseModel):
    """One thing that is wrong."""

    loc: list[str | int]
    msg: str
    type: str


class Violations(BaseModel):
    """The answer to a body that breaks rules."""

    detail: list[Violation]


class Refusal(BaseModel):
    """The answer to what is refused for other reasons."""

    detail: str


def add_routes(app: FastAPI) -> None:
    """Register the routes of this surface."""
    guarded = [Depends(require_key)]
    content = {"application/json": {"schema": CompletionRequest.model_json_schema()}}
    refusals = {
        400: "The model is not ready.",
        401: "The API key is missing or wrong.",
        404: "There is no such model.",
        413: "The body is too large.",
        429: "Too many requests wait already.",
        500: "The server failed.",
        503: "The answer took too long.",
    }
    responses: dict[int | str, Json] = {
        status: {"model": Refusal, "description": text} for status, text in refusals.items()
    }
    responses[200] = schema.completion_responses()[200]
    responses[422] = {"model": Violations, "description": "What is wrong with the body, all of it."}
    app.post(
        f"{BASE}/completions",
        summary="Complete a prompt",
        dependencies=guarded,
        openapi_extra={"requestBody": {"required": True, "content": content}},
        responses=responses,
    )(completions)
    app.get(
        f"{BASE}/models",
        dependencies=guarded,
        responses={401: responses[401]},
    )(list_models)


def _render(error: ApiError) -> Response:
    detail = error.violations if isinstance(error, InvalidBody) else error.message
    return JSONResponse({"detail": detail}, error.status, error.headers)


SURFACE = Surface(roots=(BASE,), render=_render)


async def completions(request: Request) -> Response:
    """Complete a prompt."""
    service: Service = request.app.state.service
    try:
        body = _read(await request.body())
    except ClientDisconnect as error:
        raise ClientGone from error
    service.check_name(body.model)
    if service.model is None:
        raise ApiError(400, f"model {shown(body.model)} is not ready", retry_after=1)
    if body.n > service.settings.max_choices:
        bound = f"Input should be less than or equal to {service.settings.max_choices}"
        raise _invalid(["n"], bound, "less_than_equal")
    try:
        return await openai.answer(request, _call(body), service.model)
    except ApiError as error:
        if error.status != 400:
            raise
        where = [] if error.param is None else [error.param]
        raise _invalid(where, error.message, error.code or "value_error") from error


async def list_models(request: Request) -> Response:
    """List the models of this server."""
    service: Service = request.app.state.service
    status = "AVAILABLE" if service.is_ready else "PENDING"
    if service.failure is not None:
        status = "UNAVAILABLE"
    own = {"model_type": "COMPLETIONS", "model_engine": "FULLBEAM", "status": status}
    return JSONResponse({"object": "list", "data": [service.card() | own]})


def _read(data: bytes) -> CompletionRequest:
    """Check a body.

    Raises
    ------
    InvalidBody
        With every violation.
    """
    try:
        body: Any = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        pos = getattr(error, "pos", getattr(error, "start", 0))
        raise _invalid([pos], f"JSON decode error: {error}", "json_invalid") from error
    try:
        return CompletionRequest.model_validate(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        raise InvalidBody([{**item, "loc": ["body", *item["loc"]]} for item in found]) from error


def _call(body: CompletionRequest) -> Call:
    is_given = "max_tokens" in body.model_fields_set  # if not, what fits will do
    params = CompletionParams(
        max_tokens=body.max_tokens if is_given else None,
        temperature=body.temperature,
        n=body.n,
        stop=body.stop,
        seed=body.seed,
    )
    options = body.stream_options or StreamOptions()
    return Call(
        model=body.model,
        prompt=body.prompt,
        params=params,
        stream=body.stream,
        include_usage=options.include_usage,
        return_token_ids=False,
        request_id=None,
    )


def _invalid(where: Sequence[str | int], message: str, kind: str) -> InvalidBody:
    return InvalidBody([{"loc": ["body", *where], "msg": message, "type": kind}])
