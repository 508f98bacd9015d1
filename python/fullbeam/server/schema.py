# SPDX-License-Identifier: Apache-2.0
"""What the OpenAPI document says about bodies that are read and written by hand."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from fullbeam.params import CompletionParams
from fullbeam.server.openai import PARAM_NAMES

Json = dict[str, Any]


def completion_request() -> Json:
    """Return what the OpenAPI document says about the request."""
    texts: Json = {"type": "array", "items": {"type": "string"}}
    ids: Json = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
    prompt = [{"type": "string"}, texts, ids, {"type": "array", "items": ids}, {"type": "null"}]
    kinds: dict[str, Json] = {
        "int": {"type": "integer"},
        "float": {"type": "number"},
        "bool": {"type": "boolean"},
        "str": {"type": "string"},
        "None": {"type": "null"},
        "Iterable[str]": texts,
        "Iterable[int]": {"type": "array", "items": {"type": "integer"}},
    }
    properties: Json = {
        "model": {"type": ["string", "null"], "description": "This server's model, or absent."},
        "prompt": {"anyOf": prompt, "description": "Absent, null and '' start a document."},
        "stream": {"type": ["boolean", "null"], "default": False},
        "stream_options": {
            "type": ["object", "null"],
            "properties": {"include_usage": {"type": ["boolean", "null"], "default": False}},
            "description": "Only with stream.",
        },
    }
    for field in fields(CompletionParams):
        if field.name not in PARAM_NAMES:
            continue
        names = str(field.type).split(" | ")
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        options = [kinds[name] for name in names if name != "None"] + [kinds["None"]]
        properties[field.name] = {"anyOf": options, "default": default}
    body = {"schema": {"type": "object", "properties": properties}}
    return {"requestBody": {"required": True, "content": {"application/json": body}}}


def completion_responses() -> dict[int | str, Json]:
    """Return what the OpenAPI document says about the answers."""
    choice = _object(
        text={"type": "string"},
        index={"type": "integer"},
        logprobs={"type": ["object", "null"]},
        finish_reason={"enum": ["stop", "length", None]},
        stop_reason={"type": ["string", "integer", "null"]},
    )
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    completion = _object(
        id={"type": "string"},
        object={"const": "text_completion"},
        created={"type": "integer"},
        model={"type": "string"},
        system_fingerprint={"type": "string"},
        choices={"type": "array", "items": choice},
        usage=_object(**{name: {"type": "integer"} for name in counts}),
    )
    text = {"type": "string"}
    ok: Json = {
        "description": "The completion; with stream, its parts as events, then [DONE].",
        "content": {
            "application/json": {"schema": completion},
            "text/event-stream": {"schema": text},
        },
    }
    return {200: ok} | error_responses(400, 401, 404, 413, 429, 500, 503)


def error_responses(*statuses: int) -> dict[int | str, Json]:
    """Return what the OpenAPI document says about errors."""
    text = {"type": "string"}
    text_or_null = {"type": ["string", "null"]}
    error = _object(error=_object(message=text, type=text, param=text_or_null, code=text_or_null))
    content = {"application/json": {"schema": error}}
    meanings = {
        400: "A field is wrong: `param` names it.",
        401: "The API key is missing or wrong.",
        404: "There is no such model.",
        413: "The body is too large.",
        429: "Too many requests wait already.",
        500: "The server failed.",
        503: "The model is loading.",
    }
    return {status: {"description": meanings[status], "content": content} for status in statuses}


def path_parameter(path: str) -> Json:
    """Return what the OpenAPI document says about the model's id in a path."""
    if "{model" not in path:
        return {}
    parameter = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    return {"parameters": [parameter]}


def _object(**properties: Json) -> Json:
    return {"type": "object", "properties": properties, "required": list(properties)}
