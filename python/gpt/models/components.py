# SPDX-License-Identifier: Apache-2.0
"""The objects within requests and responses."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar


class _Unset(Enum):
    UNSET = "UNSET"  # an enum, so that copies of a request are still recognised


class CreateCompletionRequest2(str, Enum):  # noqa: UP042  # its str() is that of the SDK
    """Names of hosted models."""

    GPT_3_5_TURBO_INSTRUCT = "gpt-3.5-turbo-instruct"
    DAVINCI_002 = "davinci-002"
    BABBAGE_002 = "babbage-002"


class CreateCompletionResponseFinishReason(str, Enum):  # noqa: UP042
    """Why a choice ended."""

    STOP = "stop"
    LENGTH = "length"
    CONTENT_FILTER = "content_filter"


class CreateCompletionResponseObject(str, Enum):  # noqa: UP042
    """What a completion says it is."""

    TEXT_COMPLETION = "text_completion"


class ListModelsResponseObject(str, Enum):  # noqa: UP042
    """What a list of models says it is."""

    LIST = "list"


class ModelObject(str, Enum):  # noqa: UP042
    """What a model says it is."""

    MODEL = "model"


@dataclass
class Security:
    """What a client proves its right with."""

    api_key_auth: str


@dataclass
class CreateCompletionRequest:
    """What to complete, and how. Fields left at `UNSET` are not sent, nor is a `user` of None."""

    UNSET: ClassVar[Any] = _Unset.UNSET

    model: str | CreateCompletionRequest2
    prompt: str | list[str] | list[int] | list[list[int]] | None
    best_of: int | None = 1
    echo: bool | None = False
    frequency_penalty: float | None = 0
    logit_bias: dict[str, int] | None = UNSET
    logprobs: int | None = None
    max_tokens: int | None = 16
    n: int | None = 1
    presence_penalty: float | None = 0
    seed: int | None = UNSET
    stop: str | list[str] | None = UNSET
    stream: bool | None = False
    suffix: str | None = None
    temperature: float | None = 1
    top_p: float | None = 1
    user: str | None = None


@dataclass
class CreateCompletionResponseLogprobs:
    """Parallel lists, one entry per token."""

    text_offset: list[int] | None = None
    token_logprobs: list[float | None] | None = None
    tokens: list[str] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None


@dataclass
class CreateCompletionResponseChoices:
    """One completion of one prompt."""

    finish_reason: CreateCompletionResponseFinishReason
    index: int
    logprobs: CreateCompletionResponseLogprobs | None
    text: str


@dataclass
class CompletionUsage:
    """Tokens that a request cost."""

    completion_tokens: int
    prompt_tokens: int
    total_tokens: int


@dataclass
class CreateCompletionResponse:
    """All choices of a request."""

    choices: list[CreateCompletionResponseChoices]
    created: int
    id: str
    model: str
    object: CreateCompletionResponseObject
    system_fingerprint: str | None = None
    usage: CompletionUsage | None = None


@dataclass
class Model:
    """A model of the server."""

    created: int
    id: str
    object: ModelObject
    owned_by: str


@dataclass
class ListModelsResponse:
    """All models of the server."""

    data: list[Model]
    object: ListModelsResponseObject


@dataclass
class DeleteModelResponse:
    """What became of a model to be deleted."""

    deleted: bool
    id: str
    object: str
