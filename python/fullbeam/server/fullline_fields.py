# SPDX-License-Identifier: Apache-2.0
"""The fields of `POST /v1/complete/gpt`: their schema, and how they become `CompletionParams`."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fullbeam.checks import shown
from fullbeam.params import CompletionParams, field_schema
from fullbeam.server.errors import ApiError, Json

_DEFAULTS: Json = {"mode": "FULL_LINE", "max_tokens": 10, "beam_size": 3, "context_len": -1}

# Fields of `CompletionParams` by their names here.
PARAM_NAMES = {
    name: "max_tokens" if name == "num_iterations" else name
    for name in (
        *("mode", "num_iterations", "beam_size", "diversity_groups", "diversity_strength"),
        *("len_norm_base", "len_norm_pow", "group_answers", "top_n", "group_top_n"),
        *("only_full_lines", "context_len", "min_prefix_dist", "min_edit_dist", "keep_kinds"),
    )
}

# Clients that send one of these expect scores.
DETAIL_KEYS = frozenset(
    {"started_ts", "context_len", "language", "keep_kinds", "min_prefix_dist", "min_edit_dist"}
    | {"rollback_prefix"}
)

REQUIRED = ["code", "filename"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """A request's body, checked."""

    model: str | None
    filename: str
    left: str
    """Text before what the user has typed of a word."""
    right: str
    """Text behind the cursor."""
    params: CompletionParams
    started_ts: int | None
    detailed: bool | None
    """Whether to tell scores; None: as the server is set."""


class Issue(ApiError):
    """A body that is not as this surface wants it.

    Parameters
    ----------
    message
        What is wrong, in words.
    kind
        Class of the error.
    validator, value
        Keyword of the schema that fails, and what the schema has there.
    """

    def __init__(
        self, message: str, kind: str = "ValidationError", validator: str = "", value: object = ""
    ) -> None:
        super().__init__(400, message)
        self.kind = kind
        self.validator = validator
        self.value = str(value)


def read_call(body: Json) -> Call:
    """Check a body and sort out its fields.

    Raises
    ------
    Issue
        With the field's name, and the schema's keyword that it fails.
    """
    for name in REQUIRED:
        if name not in body:
            message = f"{name!r} is a required property"
            raise Issue(message, validator="required", value=REQUIRED)
    for name, schema in FIELDS.items():
        if name == "code" or body.get(name) is not None:
            _check(name, body[name], schema)
    given = {name: body[name] for name in FIELDS if body.get(name) is not None}
    for name, value in given.items():
        if isinstance(value, float) and value.is_integer():
            given[name] = int(value)  # 10.0 is an integer, too
    prefix = given.get("prefix") or given.get("token") or ""
    if not _is_whole(prefix):
        raise Issue(f"'prefix': {shown(prefix)} has half a character")
    left, right = split_code(given["code"], given.get("offset"), prefix)
    fields = _DEFAULTS | {PARAM_NAMES[name]: given[name] for name in PARAM_NAMES if name in given}
    for name in ("top_n", "group_top_n"):
        if name in body and body[name] is None:
            fields[name] = None
    if given.get("use_top_n") is False:
        fields["top_n"] = None
    try:
        params = CompletionParams(**fields, prefix=prefix, token_healing=True)
    except (ValueError, TypeError, OverflowError) as error:
        raise from_value_error(error) from error
    model = given.get("model") or "best"
    return Call(
        model=None if model.startswith("best") else model,
        filename=given.get("filename", ""),
        left=left,
        right=right,
        params=params,
        started_ts=given.get("started_ts"),
        detailed=given.get("detailed", True if DETAIL_KEYS & body.keys() else None),
    )


def request_schema() -> Json:
    """Return what the OpenAPI document says about the request."""
    properties: Json = {}
    for name, schema in FIELDS.items():
        notes = {key: schema[key] for key in ("default", "description") if key in schema}
        rest = {key: value for key, value in schema.items() if key not in notes}
        properties[name] = {"anyOf": [*rest.get("anyOf", [rest]), {"type": "null"}], **notes}
    properties["code"] = FIELDS["code"]
    body = {"type": "object", "properties": properties, "required": REQUIRED}
    example = {"code": "import num", "filename": "a.py", "offset": 10, "prefix": "num"}
    content = {"application/json": {"schema": body, "example": example}}
    return {"requestBody": {"required": True, "content": content}}


def split_code(code: str, offset: int | None, prefix: str) -> tuple[str, str]:
    """Return the text before what the user has typed of a word, and the text behind the cursor.

    Some clients send the cursor, some where the prefix starts; those that change the text first
    may send more than its length. All count UTF-16 units, or else characters where only that makes
    the prefix fit. A prefix that is not there is taken as typed at the offset. Half a character,
    where the offset falls into one, is left out.
    """
    parts, is_found = _split(code, offset, prefix, "utf-16-le", 2)
    if not is_found:
        by_characters, is_found = _split(code, offset, prefix, "utf-32-le", 4)
        if is_found:
            return by_characters
    return parts


def _split(
    code: str, offset: int | None, prefix: str, encoding: str, size: int
) -> tuple[tuple[str, str], bool]:
    data = code.encode(encoding, "surrogatepass")
    typed = prefix.encode(encoding)
    start = len(data) if offset is None else min(max(0, size * offset), len(data))
    end = start
    is_found = True
    if data[:start].endswith(typed):
        start -= len(typed)
    elif data.startswith(typed, start):
        end += len(typed)
    else:
        is_found = False
    left, right = data[:start], data[end:]
    return (left.decode(encoding, "ignore"), right.decode(encoding, "ignore")), is_found


def from_value_error(error: Exception) -> Issue:
    """Return what `CompletionParams` or the engine refuses, with the field's name here."""
    message = re.sub(r"^\w+: ", "", str(error))
    message = re.sub(r"\bmax_tokens\b", "num_iterations", message)
    return Issue(message, type(error).__name__)


def _is_whole(text: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _has_type(value: object, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if isinstance(value, float) and value.is_integer():
        return kind in ("integer", "number")
    return isinstance(value, _TYPES[kind])


_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
}

# What JSON Schema means by the keywords that the fields use, and how it says that one fails.
_KEYWORDS: Mapping[str, tuple[Callable[[Any, Any], bool], str]] = {
    "type": (_has_type, "is not of type"),
    "enum": (lambda value, known: value in known, "is not one of"),
    "const": (operator.eq, "is not"),
    "minimum": (operator.ge, "is less than the minimum of"),
    "maximum": (operator.le, "is greater than the maximum of"),
    "exclusiveMinimum": (operator.gt, "is not greater than"),
    "minItems": (lambda value, count: len(value) >= count, "has fewer items than"),
    "anyOf": (
        lambda value, schemas: any(_fits(value, schema) for schema in schemas),
        "is not valid under any of",
    ),
}


def _check(name: str, value: object, schema: Json) -> None:
    for keyword, wanted in schema.items():
        is_met, words = _KEYWORDS.get(keyword, (None, ""))
        if is_met is not None and not is_met(value, wanted):
            message = f"{name!r}: {shown(value)} {words} {wanted!r}"
            raise Issue(message, validator=keyword, value=wanted)
    if isinstance(value, list):
        for idx, item in enumerate(value):
            _check(f"{name}[{idx}]", item, schema["items"])


def _fits(value: object, schema: Json) -> bool:
    try:
        _check("", value, schema)
    except Issue:
        return False
    return True


def _param(name: str, **changes: object) -> Json:
    """Return the schema of a field of `CompletionParams`, but for null, which goes without."""
    schema = field_schema(name)
    schema["description"] = schema["description"].replace("None", "null").replace("False", "false")
    options = [option for option in schema.pop("anyOf", []) if option != {"type": "null"}]
    assert len(options) <= 1
    return {key: value for option in options for key, value in option.items()} | schema | changes


_TEXT: Json = {"type": "string"}
FIELDS: Mapping[str, Json] = {
    "code": _TEXT | {"description": "The text, that right of the cursor included."},
    "filename": _TEXT | {"description": "A newer request for the same file ends this one."},
    "offset": {
        "type": "integer",
        "description": "The cursor, or the start of `prefix`, in UTF-16 units. Absent: the end.",
    },
    "prefix": _TEXT | {"default": "", "description": "Typed of a word: suggestions start with it."},
    "token": _TEXT | {"description": "Older name of `prefix`."},
    "model": _TEXT | {"default": "best", "description": "This server's model, or `best`."},
    "mode": _param("mode", default="FULL_LINE", description="Suggest that much, or a word."),
    "num_iterations": _param(
        "max_tokens", minimum=1, default=10, description="Most tokens of a suggestion."
    ),
    "beam_size": _param("beam_size", default=3, description="Hypotheses in each group."),
    "diversity_groups": _param("diversity_groups"),
    "diversity_strength": _param("diversity_strength"),
    "len_norm_base": _param("len_norm_base", default=0.3),
    "len_norm_pow": _param("len_norm_pow", default=2),
    "group_answers": _param("group_answers"),
    "top_n": _param("top_n", description="Most suggestions; null: no limit."),
    "group_top_n": _param("group_top_n", description="The same for each group."),
    "only_full_lines": _param("only_full_lines"),
    "started_ts": {"type": "integer", "description": "When it was sent, ms since 1970."},
    "language": _TEXT,
    "context_len": _param("context_len", default=-1, description="Most tokens of context."),
    "min_prefix_dist": _param("min_prefix_dist"),
    "min_edit_dist": _param("min_edit_dist"),
    "keep_kinds": _param("keep_kinds"),
    "rollback_prefix": {"type": "array", "items": _TEXT, "description": "Has no effect."},
    "use_top_n": {"type": "boolean", "description": "false: `top_n` is null."},
    "detailed": {
        "type": "boolean",
        "description": "Tell scores; absent: where one of these is there: "
        + ", ".join(sorted(DETAIL_KEYS)),
    },
}
