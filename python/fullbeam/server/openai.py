# SPDX-License-Identifier: Apache-2.0
"""`POST /v1/completions`: the route, and results to JSON or events."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from fullbeam.server.errors import ApiError, Json, Surface, internal_error
from fullbeam.server.openai_fields import Call, from_value_error, read_call
from fullbeam.server.stream import DONE, ClientGone, EventStream, event, until_disconnect

if TYPE_CHECKING:
    from fullbeam.async_stream import AsyncCompletionStream
    from fullbeam.engine.text import Logprobs, Piece, RankedLogprob
    from fullbeam.model import Model
    from fullbeam.results import Choice, Completion, Usage
    from fullbeam.server.service import Service


def error_body(error: ApiError) -> Json:
    """Return an error in the shape of this surface."""
    kind = "invalid_request_error"
    if error.status == 429:
        kind = "rate_limit_error"
    elif error.status >= 500:
        kind = "server_error"
    body = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    return {"error": body}


def _render(error: ApiError) -> Response:
    return JSONResponse(error_body(error), error.status, error.headers)


# Paths that are nobody else's are this surface's, too.
SURFACE = Surface(roots=("/",), render=_render, has_bare_keys=False)


@dataclass(frozen=True, slots=True)
class Envelope:
    """What all objects of one answer have in common."""

    model: str
    fingerprint: str
    id: str
    created: int

    @classmethod
    def new(cls, model: str, fingerprint: str, request_id: str | None = None) -> Envelope:
        """Return the envelope of a new answer; None: an id of ours."""
        request_id = uuid.uuid4().hex if request_id is None else request_id
        return cls(model, fingerprint, f"cmpl-{request_id}", int(time.time()))

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
    call = read_call(await read_json(request), service.settings)
    model = service.model_for(request.path_params.get("model", call.model))
    return await answer(request, call, model)


async def answer(request: Request, call: Call, model: Model) -> Response:
    """Answer a request whose body has been checked."""
    service: Service = request.app.state.service
    envelope = Envelope.new(service.settings.name, service.fingerprint, call.request_id)
    n = call.params.n if call.return_token_ids else None
    async with AsyncExitStack() as resources:
        resources.enter_context(service.slot(call.num_choices))
        try:
            if not call.stream:
                work = model.acomplete(call.prompt, params=call.params)
                result = await until_disconnect(request.receive, work)
                return JSONResponse(completion_body(result, envelope, n=n))
            pieces = model.astream(call.prompt, params=call.params)
            resources.callback(pieces.close)
            first = await until_disconnect(request.receive, _next(pieces))
        except ClientGone:
            raise
        except ValueError as error:
            raise from_value_error(error) from error
        except Exception as error:
            raise internal_error(error) from error
        events = completion_events(first, pieces, envelope, call.include_usage, n=n)
        return EventStream(events, resources.pop_all())
    raise AssertionError("unreachable: nothing above swallows an exception")


async def _next(pieces: AsyncCompletionStream) -> Piece | None:
    return await anext(pieces, None)


async def read_json(request: Request) -> Json:
    """Return the body of a request, a JSON object."""
    try:
        data = await request.body()
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


def completion_body(result: Completion, envelope: Envelope, *, n: int | None = None) -> Json:
    """Return the answer that is not streamed; `n`, the choices of a prompt, to show token ids."""
    choices = [_choice(choice, result.prompt_token_ids, n) for choice in result.choices]
    return envelope.wrap(choices) | {"usage": _usage(result.usage)}


async def completion_events(
    first: Piece | None,
    rest: AsyncCompletionStream,
    envelope: Envelope,
    include_usage: bool,
    *,
    n: int | None = None,
) -> AsyncGenerator[bytes, None]:
    """Yield the events of a streamed answer; `n` as for `completion_body`."""
    no_usage: Json = {"usage": None} if include_usage else {}
    prompts = [] if n is None else rest.prompt_token_ids
    begun: set[int] = set()
    piece = first
    try:
        while piece is not None:
            choice = _choice(piece, None if piece.index in begun else prompts, n)
            begun.add(piece.index)
            yield event(envelope.wrap([choice]) | no_usage)
            piece = await _next(rest)
    except ValueError as error:  # the status line is gone: tell the client within the stream
        yield event(error_body(from_value_error(error)))
        return
    except Exception as error:
        yield event(error_body(internal_error(error)))
        return
    if include_usage:
        yield event(envelope.wrap([]) | {"usage": _usage(rest.usage)})
    yield DONE


def _choice(part: Choice | Piece, prompts: list[list[int]] | None, n: int | None) -> Json:
    body = {
        "text": part.text,
        "index": part.index,
        "logprobs": None if part.logprobs is None else _logprobs(part.logprobs),
        "finish_reason": part.finish_reason,
        "stop_reason": part.stop_reason,
    }
    if part.prompt_logprobs is not None:
        body["prompt_logprobs"] = [_ranked(entry) for entry in part.prompt_logprobs]
    if n is not None:
        body["token_ids"] = part.token_ids
        body["prompt_token_ids"] = None if prompts is None else prompts[part.index // n]
    return body


def _ranked(entry: dict[int, RankedLogprob] | None) -> Json | None:
    if entry is None:
        return None
    return {
        str(token_id): {
            "logprob": _finite(value.logprob),
            "rank": value.rank,
            "decoded_token": value.decoded_token,
        }
        for token_id, value in entry.items()
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
