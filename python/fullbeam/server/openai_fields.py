# SPDX-License-Identifier: Apache-2.0
"""The fields of `POST /v1/completions`: how they become `CompletionParams`, what is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fullbeam import checks
from fullbeam.params import DRAW_FIELDS, MAX_WIDTH, CompletionParams, ContextLengthError
from fullbeam.server.errors import ApiError, Json

if TYPE_CHECKING:
    from fullbeam.server.settings import Settings

Prompt = str | list[str] | list[int] | list[list[int]]

MAX_BEST_OF = 20

# Fields of `CompletionParams` that this surface has under the same name. It has others under names
# of its own, see `_as_search`; the rest belongs to other surfaces.
PARAM_NAMES = frozenset(
    {"max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty"}
    | {"frequency_penalty", "repetition_penalty", "logit_bias", "allowed_token_ids", "bad_words"}
    | {"seed", "n", "best_of", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos"}
    | {"skip_special_tokens", "add_special_tokens", "logprobs", "prompt_logprobs", "echo", "suffix"}
    | {"return_tokens_as_token_ids", "token_healing", "truncate_prompt_tokens"}
)

# Fields of a search, with the values that change nothing without one.
SEARCH_NAMES: Mapping[str, tuple[object, ...]] = {
    "beam_width": (),
    "length_penalty": (1,),
    "diversity_groups": (1,),
    "diversity_strength": (0,),
}

ALIASES = {"num_beam_groups": "diversity_groups", "diversity_penalty": "diversity_strength"}

# Constrained decoding, with the values that ask for none. To ignore it would be to answer with
# text that is not what was asked for.
NOT_SUPPORTED: Mapping[str, tuple[object, ...]] = {
    "response_format": ({"type": "text"},),
    "structured_outputs": ({},),
    "grammar": ("",),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
}

WITHOUT_EFFECT = ("user", "priority", "cache_salt", "cache_prompt")

# What fields of `CompletionParams` are called here, where the name is another one.
_WIRE_NAMES = {"beam_size": "beam_width", "context_len": "truncate_prompt_tokens"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """A request's body, checked."""

    model: str | None
    prompt: Prompt
    params: CompletionParams
    stream: bool
    include_usage: bool
    return_token_ids: bool
    request_id: str | None

    @property
    def num_choices(self) -> int:
        """Texts that are computed at once, in all prompts."""
        return max(self.params.num_candidates, self.params.width) * num_prompts(self.prompt)


def read_call(body: Json, settings: Settings) -> Call:
    """Check a body and sort out its fields.

    Raises
    ------
    ApiError
        400, with the field's name.
    """
    given = {name: value for name, value in body.items() if value is not None}
    for name, neutral in NOT_SUPPORTED.items():
        if name in given and given[name] not in neutral:
            raise bad_value(name, "left out: constrained decoding is not supported", given[name])
    stream = _flag(given, "stream")
    options = given.get("stream_options", {})
    if not isinstance(options, dict):
        raise bad_value("stream_options", "an object", options)
    if "stream_options" in given and not stream:
        raise bad_value("stream_options", "left out unless stream is true", options)
    try:
        params = _params(given)
        if stream:
            params.check_stream()
    except (ValueError, TypeError, OverflowError) as error:
        raise from_value_error(error) from error
    call = Call(
        model=_name(given, "model"),
        prompt=_prompt(given.get("prompt", "")),
        params=params,
        stream=stream,
        include_usage=_flag(options, "include_usage"),
        return_token_ids=_flag(given, "return_token_ids"),
        request_id=_name(given, "request_id"),
    )
    _check_caps(call, settings)
    return call


def _params(given: Json) -> CompletionParams:
    chosen = {name: value for name, value in given.items() if name in PARAM_NAMES}
    if isinstance(logprobs := chosen.get("logprobs"), bool):
        chosen["logprobs"] = 1 if logprobs else None
    if "logit_bias" in chosen:
        chosen["logit_bias"] = _biases(chosen["logit_bias"])
    if "best_of" in chosen:
        checks.integer(0, MAX_BEST_OF)("best_of", chosen["best_of"])
    params = CompletionParams(**chosen)
    for texts, name in ((params.stop_strings, "stop"), (params.bad_strings, "bad_words")):
        for text in texts:
            _check_text(name, text)
    _check_text("suffix", params.suffix or "")
    search = {name: given[name] for name in SEARCH_NAMES if name in given}
    for alias, name in ALIASES.items():
        if alias in given and search.setdefault(name, given[alias]) != given[alias]:
            raise bad_value(alias, f"the same as {name}, or left out", given[alias])
    if not _flag(given, "use_beam_search"):
        for name, value in search.items():
            if value not in SEARCH_NAMES[name]:
                raise bad_value(name, "left out unless use_beam_search is true", value)
        return params
    if _flag(given, "stream"):
        raise bad_value("use_beam_search", "left out of a streamed completion", True)
    return _as_search(params, **search)


def _as_search(
    params: CompletionParams,
    *,
    beam_width: object = None,
    length_penalty: Any = 1.0,
    diversity_groups: object = 1,
    diversity_strength: Any = 0.0,
) -> CompletionParams:
    """Return the parameters of a search; what shapes a draw has been checked, and is dropped."""
    width: int = params.num_candidates
    if beam_width is not None:
        width = checks.integer(1, MAX_WIDTH)("beam_width", beam_width)
    if params.best_of not in (None, width):
        raise bad_value("best_of", f"left out beside beam_width = {width}", params.best_of)
    if params.n > width:
        raise bad_value("n", f"at most beam_width = {width}", params.n)
    num_groups: int = checks.integer(1, MAX_WIDTH)("diversity_groups", diversity_groups)
    if width % num_groups:
        raise bad_value("diversity_groups", f"a divisor of beam_width = {width}", num_groups)
    defaults = CompletionParams()
    return replace(
        params,
        **{name: getattr(defaults, name) for name in DRAW_FIELDS},
        beam_size=width // num_groups,
        diversity_groups=num_groups,
        diversity_strength=diversity_strength,
        length_penalty=length_penalty,
    )


def _biases(value: object) -> dict[int, float]:
    """Return the ids of `logit_bias`, which are strings in JSON, as numbers."""
    if not isinstance(value, dict):
        raise bad_value("logit_bias", "an object from token ids to numbers", value)
    for name in value:
        if not (name.isascii() and name.isdigit() and len(name) <= 10):
            raise bad_value("logit_bias", "an object from token ids to numbers", name)
    return {int(name): number for name, number in value.items()}


def num_prompts(prompt: Prompt) -> int:
    """Return how many prompts a prompt in one of its forms stands for."""
    return 1 if isinstance(prompt, str) or isinstance(prompt[0], int) else len(prompt)


def _check_caps(call: Call, settings: Settings) -> None:
    """Refuse what the engine could do, but this surface does not offer."""
    params = call.params
    if call.num_choices > settings.max_choices:
        name = "n" if params.num_candidates == params.n else "best_of"
        name = "beam_width" if params.is_search else name
        bound = f"at most {settings.max_choices} choices in all prompts"
        raise bad_value(name, bound, call.num_choices)
    if params.logprobs is not None and params.logprobs > settings.max_logprobs:
        raise bad_value("logprobs", f"at most {settings.max_logprobs}", params.logprobs)
    if params.prompt_logprobs == -1 and num_prompts(call.prompt) * params.n > 1:
        raise bad_value("prompt_logprobs", "at least 0 where there are several choices", -1)
    if len(params.stop_strings) > settings.max_stop:
        bound = f"at most {settings.max_stop} strings"
        raise bad_value("stop", bound, len(params.stop_strings))


def _prompt(value: object) -> Prompt:
    """Check the form of a prompt; whether its ids exist is for the model to say."""
    form = "a string, strings, token ids, or lists of token ids"
    if isinstance(value, str):
        _check_text("prompt", value)
        return value
    if not isinstance(value, list):
        raise bad_value("prompt", form, value)
    if not value:
        raise bad_value("prompt", "not empty", value)
    if all(isinstance(item, str) for item in value):
        for item in value:
            _check_text("prompt", item)
    elif isinstance(value[0], list):
        if not all(isinstance(item, list) and _are_ids(item) for item in value):
            raise bad_value("prompt", form, value)
        if not all(value):
            raise bad_value("prompt", "without empty lists", value)
    elif not _are_ids(value):
        raise bad_value("prompt", form, value)
    return value


def _are_ids(items: list[object]) -> bool:
    return all(type(item) is int for item in items)


def _check_text(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise bad_value(name, "valid Unicode without lone surrogates", text) from error


def _name(source: Mapping[str, Any], name: str) -> str | None:
    value = source.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > 256:
        raise bad_value(name, "a string of at most 256 characters", value)
    _check_text(name, value)
    return value


def _flag(source: Mapping[str, object], name: str) -> bool:
    value = source.get(name)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise bad_value(name, "true or false", value)


def bad_value(param: str, requirement: str, value: object) -> ApiError:
    """Return the error that says what a field must be."""
    message = f"{param} must be {requirement}, got {checks.shown(value)}"
    return ApiError(400, message, param=param)


def from_value_error(error: Exception) -> ApiError:
    """Name the field that an error of the engine is about, as it is called here."""
    message = str(error).removeprefix("CompletionParams: ")
    if isinstance(error, ContextLengthError):
        return ApiError(400, message, param=error.field, code="context_length_exceeded")
    named = re.match(r"(?:\w+: )?(\w+)(?:\[\d+\])* must ", message)
    param = getattr(error, "field", named and named[1])
    if param in _WIRE_NAMES:
        message = message.replace(param, _WIRE_NAMES[param])
        param = _WIRE_NAMES[param]
    return ApiError(400, message, param=param)
