# SPDX-License-Identifier: Apache-2.0
"""`POST /v1/completions`: wire fields to `CompletionParams`, results to JSON or events."""

from __future__ import annotations

import json
import logging
import math
import re
import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from fullbeam.params import CompletionParams, ContextLengthError
from fullbeam.server.stream import DONE, ClientGone, EventStream, event, until_disconnect

if TYPE_CHECKING:
    from fullbeam.engine.text import Logprobs, Piece
    from fullbeam.model import AsyncCompletionStream
    from fullbeam.results import Choice, Completion, Usage
    from fullbeam.server.app import Service, Settings

Json = dict[str, Any]
Prompt = str | list[str] | list[int] | list[list[int]]

_log = logging.getLogger(__name__)

# Fields of `CompletionParams` that this surface has; of the others it knows those below.
PARAM_NAMES = frozenset(
    {"max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "n", "stop", "stop_token_ids"}
    | {"ignore_eos", "logprobs", "echo"}
)

# Known fields that are not honoured yet, with the values (besides null) that change nothing.
_NOT_HONOURED: Mapping[str, tuple[object, ...]] = {
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "min_tokens": (0,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "add_special_tokens": (True,),
    "use_beam_search": (False,),
    "beam_width": (),
    "length_penalty": (1,),
    "diversity_groups": (1,),
    "num_beam_groups": (1,),
    "diversity_strength": (0,),
    "diversity_penalty": (0,),
    "token_healing": (False,),
    "prompt_logprobs": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "grammar": ("",),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "truncate_prompt_tokens": (),
}


class ApiError(Exception):
    """An answer other than 200, in the shape of this surface."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

    @property
    def body(self) -> Json:
        """The error object."""
        kind = "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        elif self.status >= 500:
            kind = "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> Response:
        """The error as a response."""
        return JSONResponse(self.body, self.status, self.headers)


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """A request's body, checked."""

    model: str | None
    prompt: Prompt
    params: CompletionParams
    stream: bool
    include_usage: bool


@dataclass(frozen=True, slots=True)
class Envelope:
    """What all objects of one answer have in common."""

    model: str
    fingerprint: str
    id: str
    created: int

    @classmethod
    def new(cls, model: str, fingerprint: str) -> Envelope:
        """Return the envelope of a new answer."""
        return cls(model, fingerprint, f"cmpl-{uuid.uuid4().hex}", int(time.time()))

    def wrap(self, choices: list[Json]) -> Json:
        """Return the completion object around some choices."""
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }


async def completions(request: Request) -> Response:
    """Answer `POST /v1/completions` and its aliases."""
    service: Service = request.app.state.service
    call = read_call(await read_json(request, service.settings.max_body_bytes), service.settings)
    model = service.model_for(request.path_params.get("model", call.model))
    envelope = Envelope.new(service.settings.name, service.fingerprint)
    async with AsyncExitStack() as resources:
        resources.enter_context(service.slot())
        try:
            if not call.stream:
                work = model.acomplete(call.prompt, params=call.params)
                result = await until_disconnect(request.receive, work)
                return JSONResponse(completion_body(result, envelope))
            pieces = model.astream(call.prompt, params=call.params)
            resources.callback(pieces.close)
            first = await until_disconnect(request.receive, _next(pieces))
        except ClientGone:
            raise
        except ValueError as error:
            raise _from_value_error(error) from error
        except Exception as error:
            raise internal_error(error) from error
        events = completion_events(first, pieces, envelope, call.include_usage)
        return EventStream(events, resources.pop_all())
    raise AssertionError("unreachable: nothing above swallows an exception")


async def _next(pieces: AsyncCompletionStream) -> Piece | None:
    return await anext(pieces, None)


async def read_json(request: Request, max_bytes: int) -> Json:
    """Return the body of a request, a JSON object."""
    data = bytearray()
    try:
        async for chunk in request.stream():
            data += chunk
            if len(data) > max_bytes:
                message = f"the body must be at most {max_bytes} bytes"
                raise ApiError(413, message, code="request_too_large")
    except ClientDisconnect as error:
        raise ClientGone from error
    try:
        body = json.loads(data.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body must be JSON in UTF-8: {error}") from error
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    return body


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def read_call(body: Json, settings: Settings) -> Call:
    """Check a body and sort out its fields.

    Raises
    ------
    ApiError
        400, with the field's name.
    """
    given = {name: value for name, value in body.items() if value is not None}
    for name, neutral in _NOT_HONOURED.items():
        if name in given and given[name] not in neutral:
            raise _bad(name, "left out: this server cannot honour it", given[name])
    stream = _flag(given, "stream")
    options = given.get("stream_options", {})
    if not isinstance(options, dict):
        raise _bad("stream_options", "an object", options)
    if "stream_options" in given and not stream:
        raise _bad("stream_options", "left out unless stream is true", options)
    model = given.get("model")
    if model is not None and not isinstance(model, str):
        raise _bad("model", "a string", model)
    chosen = {name: value for name, value in given.items() if name in PARAM_NAMES}
    if isinstance(logprobs := chosen.get("logprobs"), bool):
        chosen["logprobs"] = 1 if logprobs else None
    try:
        params = CompletionParams(**chosen)
    except (ValueError, TypeError, OverflowError) as error:
        raise _from_value_error(error) from error
    prompt = _prompt(given.get("prompt", ""))
    _check_caps(params, prompt, settings)
    _check_best_of(given.get("best_of", 0), params.n)
    return Call(
        model=model,
        prompt=prompt,
        params=params,
        stream=stream,
        include_usage=_flag(options, "include_usage"),
    )


def _check_caps(params: CompletionParams, prompt: Prompt, settings: Settings) -> None:
    """Refuse what the engine could do, but this surface does not offer."""
    is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
    num_choices = params.n * (1 if is_one else len(prompt))
    if num_choices > settings.max_choices:
        raise _bad("n", f"at most {settings.max_choices} choices in all prompts", num_choices)
    if params.logprobs is not None and params.logprobs > settings.max_logprobs:
        raise _bad("logprobs", f"at most {settings.max_logprobs}", params.logprobs)
    if len(params.stop_strings) > settings.max_stop:
        raise _bad("stop", f"at most {settings.max_stop} strings", len(params.stop_strings))
    for text in params.stop_strings:
        _check_text("stop", text)


def _check_best_of(best_of: object, n: int) -> None:
    """Accept what means "as many as n": 0, n, and 1 because one SDK always sends it."""
    if isinstance(best_of, bool) or not isinstance(best_of, int) or best_of < 0:
        raise _bad("best_of", "an integer, at least 0", best_of)
    if 2 <= best_of < n:
        raise _bad("best_of", f"at least n = {n}", best_of)
    if best_of > n:
        raise _bad("best_of", f"at most n = {n}: this server cannot rank more", best_of)


def _prompt(value: object) -> Prompt:
    """Check the form of a prompt; whether its ids exist is for the model to say."""
    form = "a string, strings, token ids, or lists of token ids"
    if isinstance(value, str):
        _check_text("prompt", value)
        return value
    if not isinstance(value, list):
        raise _bad("prompt", form, value)
    if not value:
        raise _bad("prompt", "not empty", value)
    if all(isinstance(item, str) for item in value):
        for item in value:
            _check_text("prompt", item)
    elif isinstance(value[0], list):
        if not all(isinstance(item, list) and _are_ids(item) for item in value):
            raise _bad("prompt", form, value)
        if not all(value):
            raise _bad("prompt", "without empty lists", value)
    elif not _are_ids(value):
        raise _bad("prompt", form, value)
    return value


def _are_ids(items: list[object]) -> bool:
    return all(type(item) is int for item in items)


def _check_text(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _bad(name, "valid Unicode without lone surrogates", text) from error


def _flag(source: Mapping[str, object], name: str) -> bool:
    value = source.get(name)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise _bad(name, "true or false", value)


def _bad(param: str, requirement: str, value: object) -> ApiError:
    got = repr(value)
    got = got if len(got) <= 100 else got[:97] + "..."
    return ApiError(400, f"{param} must be {requirement}, got {got}", param=param)


def _from_value_error(error: Exception) -> ApiError:
    """Name the field that an error of the engine is about."""
    message = str(error).removeprefix("CompletionParams: ")
    if isinstance(error, ContextLengthError):
        return ApiError(400, message, param=error.field, code="context_length_exceeded")
    named = re.match(r"(?:\w+: )?(\w+)(?:\[\d+\])* must ", message)
    return ApiError(400, message, param=getattr(error, "field", named and named[1]))


def internal_error(error: Exception) -> ApiError:
    """Log a fault of ours; return it as the client sees it, without its inner workings."""
    _log.error("a request failed", exc_info=error)
    return ApiError(500, f"the server failed to answer ({type(error).__name__})")


def completion_body(result: Completion, envelope: Envelope) -> Json:
    """Return the answer that is not streamed."""
    choices = [_choice(choice) for choice in result.choices]
    return envelope.wrap(choices) | {"usage": _usage(result.usage)}


async def completion_events(
    first: Piece | None,
    rest: AsyncCompletionStream,
    envelope: Envelope,
    include_usage: bool,
) -> AsyncGenerator[bytes, None]:
    """Yield the events of a streamed answer."""
    no_usage: Json = {"usage": None} if include_usage else {}
    piece = first
    try:
        while piece is not None:
            yield event(envelope.wrap([_choice(piece)]) | no_usage)
            piece = await _next(rest)
    except Exception as error:  # the status line is gone: tell the client within the stream
        yield event(internal_error(error).body)
        return
    if include_usage:
        yield event(envelope.wrap([]) | {"usage": _usage(rest.usage)})
    yield DONE


def _choice(part: Choice | Piece) -> Json:
    return {
        "text": part.text,
        "index": part.index,
        "logprobs": None if part.logprobs is None else _logprobs(part.logprobs),
        "finish_reason": part.finish_reason,
        "stop_reason": part.stop_reason,
    }


def _logprobs(values: Logprobs) -> Json:
    return {
        "tokens": values.tokens,
        "token_logprobs": [None if x is None else _finite(x) for x in values.token_logprobs],
        "top_logprobs": [
            None if top is None else {name: _finite(x) for name, x in top.items()}
            for top in values.top_logprobs
        ],
        "text_offset": values.text_offset,
    }


def _finite(value: float) -> float:
    return value if math.isfinite(value) else -9999.0


def _usage(usage: Usage) -> Json:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    }
