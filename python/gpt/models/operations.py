# SPDX-License-Identifier: Apache-2.0
"""What the operations take and return; payloads are None unless the status is 200."""

from __future__ import annotations

from dataclasses import dataclass

import requests

from gpt.models import components


@dataclass
class CreateCompletionResponse:
    """The answer to `completions.create_completion`."""

    content_type: str
    status_code: int
    raw_response: requests.Response
    create_completion_response: components.CreateCompletionResponse | None = None


@dataclass
class ListModelsResponse:
    """The answer to `models.list_models`."""

    content_type: str
    status_code: int
    raw_response: requests.Response
    list_models_response: components.ListModelsResponse | None = None


@dataclass
class RetrieveModelRequest:
    """Which model `models.retrieve_model` describes."""

    model: str


@dataclass
class RetrieveModelResponse:
    """The answer to `models.retrieve_model`."""

    content_type: str
    status_code: int
    raw_response: requests.Response
    model: components.Model | None = None


@dataclass
class DeleteModelRequest:
    """Which model `models.delete_model` deletes."""

    model: str


@dataclass
class DeleteModelResponse:
    """The answer to `models.delete_model`."""

    content_type: str
    status_code: int
    raw_response: requests.Response
    delete_model_response: components.DeleteModelResponse | None = None
