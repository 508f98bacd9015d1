# SPDX-License-Identifier: Apache-2.0
"""What the OpenAPI document says about bodies that are read and written by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fullbeam.params import MAX_WIDTH, field_schema
from fullbeam.server.openai_fields import (
    ALIASES,
    MAX_BEST_OF,
    NOT_SUPPORTED,
    PARAM_NAMES,
    WITHOUT_EFFECT,
)

if TYPE_CHECKING:
    from fullbeam.server.settings import Settings

Json = dict[str, Any]

_NULL: Json = {"type": "null"}
_TEXT: Json = {"type": "string"}
_NUMBER: Json = {"type": "number"}
_INTEGER: Json = {"type": "integer"}
_FLAG: Json = {"type": "boolean"}
_TOKEN_IDS: Json = {"type": "array", "items": {"type": "integer", "minimum": 0}}


def completion_request(settings: Settings) -> Json:
    """Return what the OpenAPI document says about the request."""
    body = {"schema": _completion_fields(settings), "examples": _EXAMPLES}
    return {"requestBody": {"required": True, "content": {"application/json": body}}}


def _completion_fields(settings: Settings) -> Json:
    properties = {
        "model": _optional(_TEXT | {"maxLength": 256}, None, "This server's model, or absent."),
        "prompt": _optional(
            {
                "anyOf": [
                    _TEXT,
                    {"type": "array", "items": _TEXT, "minItems": 1},
                    _TOKEN_IDS | {"minItems": 1},
                    {"type": "array", "items": _TOKEN_IDS | {"minItems": 1}, "minItems": 1},
                ]
            },
            None,
            "A text, texts, token ids, or lists of them. Null and '' start a document.",
        ),
    }
    for name in [name for name in _ORDER if name in PARAM_NAMES]:
        properties[name] = _nullable(field_schema(name))
    properties |= _with_caps(settings) | _OWN_FIELDS
    for alias, name in ALIASES.items():
        properties[alias] = properties[name] | {"description": f"Another name of `{name}`."}
    for name, neutral in NOT_SUPPORTED.items():
        text = "Constrained decoding is not supported: refused with 400."
        properties[name] = {"enum": [*neutral, None], "description": text}
    for name in WITHOUT_EFFECT:
        properties[name] = {"description": "Accepted, and changes nothing."}
    return {
        "type": "object",
        "properties": properties,
        "description": "Null stands for the default of any field; unknown fields are ignored.",
    }


def _with_caps(settings: Settings) -> Json:
    """Fields for which this server has limits of its own."""
    of_best_of = field_schema("best_of")["description"].replace(str(MAX_WIDTH), str(MAX_BEST_OF))
    stops: Json = {"type": "array", "items": _TEXT, "maxItems": settings.max_stop}
    most = settings.max_logprobs
    of_logprobs = field_schema("logprobs")["description"].replace("0..100", f"0..{most}")
    return {
        "best_of": _optional(_integer(0, MAX_BEST_OF), None, of_best_of),
        "logprobs": _optional(
            {"anyOf": [_integer(0, most), _FLAG]},
            None,
            f"{of_logprobs} True is 1, false is null.",
        ),
        "stop": _optional(
            {"anyOf": [_TEXT, stops]},
            None,
            "Strings that end the text, which is cut before them. Empty ones are ignored.",
        ),
    }


def _optional(schema: Json, default: object, description: str) -> Json:
    """Return the schema of a field that may be null."""
    return _nullable(schema | {"default": default, "description": description})


def _nullable(schema: Json) -> Json:
    notes = {
        "default": schema["default"],
        "description": schema["description"].replace("None", "null"),
    }
    rest = {name: value for name, value in schema.items() if name not in notes}
    options = rest["anyOf"] if set(rest) == {"anyOf"} else [rest]
    return {"anyOf": options if _NULL in options else [*options, _NULL]} | notes


def _integer(low: int, high: int) -> Json:
    return {"type": "integer", "minimum": low, "maximum": high}


# Fields of this surface that `CompletionParams` has not, or not under this name.
_OWN_FIELDS: Json = {
    "stream": _optional(_FLAG, False, "Answer with server-sent events as text comes."),
    "stream_options": _optional(
        {
            "type": "object",
            "properties": {
                "include_usage": _optional(
                    _FLAG, False, "End with an event that has no choices, but `usage`."
                )
            },
        },
        None,
        "Only with `stream`.",
    ),
    "use_beam_search": _optional(
        _FLAG,
        False,
        "Search for the likeliest texts rather than draw one. Fields that shape a draw "
        "(`temperature`, `top_p`, `top_k`, `min_p`, penalties, `seed`) then change nothing. "
        "Not with `stream`.",
    ),
    "beam_width": _optional(
        _integer(1, MAX_WIDTH),
        None,
        "Hypotheses of the search, in all groups; at least `n`. Null: `best_of` or `n`.",
    ),
    "length_penalty": _optional(
        _NUMBER | {"minimum": -10, "maximum": 10},
        1.0,
        "Rank results of the search by log-probability / tokens ** this.",
    ),
    "diversity_groups": _optional(
        _integer(1, MAX_WIDTH),
        1,
        "Groups that share `beam_width`, which they must divide. Each is kept from the tokens "
        "that those before it chose in the same step.",
    ),
    "diversity_strength": _optional(
        _NUMBER | {"minimum": 0, "maximum": 100},
        0.0,
        field_schema("diversity_strength")["description"],
    ),
    "return_token_ids": _optional(
        _FLAG, False, "Put `token_ids` and `prompt_token_ids` into the choices."
    ),
    "request_id": _optional(
        _TEXT | {"maxLength": 256}, None, "What the answer's `id` has after `cmpl-`."
    ),
}

_ORDER = (
    *("suffix", "max_tokens", "temperature", "top_p", "n", "best_of", "logprobs", "echo", "stop"),
    *("presence_penalty", "frequency_penalty", "logit_bias", "seed", "top_k", "min_p"),
    *("repetition_penalty", "stop_token_ids", "ignore_eos", "min_tokens"),
    *("include_stop_str_in_output", "skip_special_tokens", "add_special_tokens"),
    *("token_healing", "prompt_logprobs", "return_tokens_as_token_ids", "allowed_token_ids"),
    *("bad_words", "truncate_prompt_tokens"),
)

_EXAMPLES: Json = {
    "text": {"value": {"prompt": "def fibonacci(n):", "max_tokens": 32, "temperature": 0}},
    "stream": {
        "value": {
            "prompt": "Once upon a time",
            "stream": True,
            "stream_options": {"include_usage": True},
            "stop": ["\n"],
        }
    },
    "infill": {
        "summary": "Fill in the middle, with models that can",
        "value": {"prompt": "def area(r):\n    return ", "suffix": " * r ** 2\n"},
    },
    "score": {
        "summary": "Log-probabilities of a text",
        "value": {"prompt": "2 + 2 = 4", "max_tokens": 0, "echo": True, "logprobs": 1},
    },
    "diverse beams": {
        "summary": "Six hypotheses in three groups, the best three",
        "value": {
            "prompt": "import ",
            "use_beam_search": True,
            "beam_width": 6,
            "diversity_groups": 3,
            "diversity_strength": 0.5,
            "n": 3,
            "max_tokens": 8,
        },
    },
}


def completion_responses() -> dict[int | str, Json]:
    """Return what the OpenAPI document says about the answers."""
    ok: Json = {
        "description": "The completion. With `stream`, `data:` events of the same form with one "
        "choice each, without `usage`; the last one is `data: [DONE]`.",
        "content": {
            "application/json": {"schema": _COMPLETION, "example": _ANSWER},
            "text/event-stream": {"example": "data: {...}\n\ndata: [DONE]\n\n"},
        },
    }
    return {200: ok} | error_responses(400, 401, 404, 413, 429, 500, 503)


def error_responses(*statuses: int) -> dict[int | str, Json]:
    """Return what the OpenAPI document says about errors."""
    text_or_null: Json = {"type": ["string", "null"]}
    error = _object(error=_object(message=_TEXT, type=_TEXT, param=text_or_null, code=text_or_null))
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
    parameter = {"name": "model", "in": "path", "required": True, "schema": _TEXT}
    return {"parameters": [parameter]}


def _object(*, optional: Json | None = None, **properties: Json) -> Json:
    return {
        "type": "object",
        "properties": properties | (optional or {}),
        "required": list(properties),
    }


_LOGPROBS: Json = _object(
    tokens={"type": "array", "items": _TEXT},
    token_logprobs={"type": "array", "items": {"type": ["number", "null"]}},
    top_logprobs={
        "type": "array",
        "items": {"type": ["object", "null"], "additionalProperties": _NUMBER},
    },
    text_offset={"type": "array", "items": _INTEGER},
) | {
    "description": "One entry for each token. Values are the model's, before bias, penalties and "
    "temperature; minus infinity is -9999. Offsets count characters from the prompt's start."
}

_CHOICE: Json = _object(
    text=_TEXT,
    index=_INTEGER | {"description": "Prompt index * n + choice."},
    logprobs={"anyOf": [_LOGPROBS, _NULL]},
    finish_reason={"enum": ["stop", "length", None]},
    stop_reason={
        "type": ["string", "integer", "null"],
        "description": "The stop string or token of `stop_token_ids` that ended the text.",
    },
    optional={
        "token_ids": _TOKEN_IDS | {"description": "Generated tokens, with `return_token_ids`."},
        "prompt_token_ids": {
            "anyOf": [_TOKEN_IDS, _NULL],
            "description": "The prompt's, too; in a stream, those of a choice's first event.",
        },
        "prompt_logprobs": {
            "type": "array",
            "items": {
                "type": ["object", "null"],
                "additionalProperties": _object(
                    logprob=_NUMBER, rank=_INTEGER, decoded_token=_TEXT
                ),
            },
            "description": "Where asked for: tokens in each place of the prompt, by id.",
        },
    },
)

_COMPLETION: Json = _object(
    id=_TEXT,
    object={"const": "text_completion"},
    created=_INTEGER,
    model=_TEXT,
    system_fingerprint=_TEXT,
    choices={"type": "array", "items": _CHOICE},
    usage=_object(prompt_tokens=_INTEGER, completion_tokens=_INTEGER, total_tokens=_INTEGER),
)

_ANSWER: Json = {
    "id": "cmpl-0b1d",
    "object": "text_completion",
    "created": 1700000000,
    "model": "gemma-3-270m",
    "system_fingerprint": "fp_0123456789ab",
    "choices": [
        {
            "text": " Paris",
            "index": 0,
            "logprobs": {
                "tokens": [" Paris"],
                "token_logprobs": [-0.25],
                "top_logprobs": [{" Paris": -0.25, " a": -2.5}],
                "text_offset": [24],
            },
            "finish_reason": "stop",
            "stop_reason": ".",
        }
    ],
    "usage": {"prompt_tokens": 6, "completion_tokens": 2, "total_tokens": 8},
}
