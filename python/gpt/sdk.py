# SPDX-License-Identifier: Apache-2.0
"""`Gpt`: where the server is, what opens it, and its operations."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import quote

import requests
from requests.auth import AuthBase

from gpt import utils
from gpt.models import components, errors, operations

T = TypeVar("T")

SERVERS = [os.environ.get("FULLBEAM_URL", "http://127.0.0.1:8000/v1")]
"""Addresses to choose from by `server_idx`."""


@dataclass
class SDKConfiguration:
    """What all operations of a client have in common."""

    client: requests.Session
    security: components.Security | Callable[[], components.Security]
    server_url: str | None = None
    server_idx: int | None = None
    retry_config: utils.RetryConfig | None = None

    def get_server_details(self) -> tuple[str, dict[str, str]]:
        """Return the base address, and its variables: none are left to fill in."""
        return self.server_url or SERVERS[self.server_idx or 0], {}


class Gpt:
    """A client.

    Parameters
    ----------
    api_key_auth
        The key, or what returns it; called for each operation.
    server_idx
        Index into `SERVERS`.
    server_url, url_params
        Where the server is instead, up to and including `/v1`; values for `{name}` in it.
    client
        What sends the requests: timeouts, proxies and headers are set there.
    retry_config
        Whether to try again; None: never.
    """

    def __init__(
        self,
        api_key_auth: str | Callable[[], str],
        server_idx: int | None = None,
        server_url: str | None = None,
        url_params: Mapping[str, str] | None = None,
        client: requests.Session | None = None,
        retry_config: utils.RetryConfig | None = None,
    ) -> None:
        if server_url is not None:
            server_url = utils.template_url(server_url, url_params or {}).removesuffix("/")

        def security() -> components.Security:
            return components.Security(api_key_auth() if callable(api_key_auth) else api_key_auth)

        self.sdk_configuration = SDKConfiguration(
            client=requests.Session() if client is None else client,
            security=security,
            server_url=server_url,
            server_idx=server_idx,
            retry_config=retry_config,
        )
        self.completions = Completions(self.sdk_configuration)
        self.models = Models(self.sdk_configuration)


class Completions:
    """Operations on `/completions`."""

    def __init__(self, sdk_config: SDKConfiguration) -> None:
        self.sdk_configuration = sdk_config

    def create_completion(
        self, request: components.CreateCompletionRequest
    ) -> operations.CreateCompletionResponse:
        """Complete a prompt or several.

        Raises
        ------
        SDKError
            For status 4xx and 5xx, and for events: with `stream`, their text is in `.body`.
        """
        kind, body = components.CreateCompletionResponse, utils.encode(request)
        answer = _call(self.sdk_configuration, "POST", "/completions", kind, body)
        return operations.CreateCompletionResponse(*answer)


class Models:
    """Operations on `/models`. They raise `SDKError` for status 4xx and 5xx."""

    def __init__(self, sdk_config: SDKConfiguration) -> None:
        self.sdk_configuration = sdk_config

    def list_models(self) -> operations.ListModelsResponse:
        """List the models of the server."""
        answer = _call(self.sdk_configuration, "GET", "/models", components.ListModelsResponse)
        return operations.ListModelsResponse(*answer)

    def retrieve_model(self, model: str) -> operations.RetrieveModelResponse:
        """Describe a model."""
        answer = _call(self.sdk_configuration, "GET", _path_of(model), components.Model)
        return operations.RetrieveModelResponse(*answer)

    def delete_model(self, model: str) -> operations.DeleteModelResponse:
        """Delete a model, where the server can."""
        kind = components.DeleteModelResponse
        answer = _call(self.sdk_configuration, "DELETE", _path_of(model), kind)
        return operations.DeleteModelResponse(*answer)


class _Bearer(AuthBase):
    """Sends a key; as `auth` of a request, no .netrc file overrides it."""

    def __init__(self, security: components.Security) -> None:
        key = security.api_key_auth
        self._header = key if key.lower().startswith("bearer ") else f"Bearer {key}"

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        # Headers go out in Latin-1, which leaves these bytes of UTF-8 as they are.
        request.headers["Authorization"] = self._header.encode().decode("latin-1")
        return request


def _path_of(model: str) -> str:
    return "/models/" + quote(model, safe="/:")


def _call(
    config: SDKConfiguration, method: str, path: str, kind: type[T], body: bytes | None = None
) -> tuple[str, int, requests.Response, T | None]:
    """Return content type, status, response and, if the status is 200, what the body says."""
    security = config.security() if callable(config.security) else config.security
    url = config.get_server_details()[0] + path
    headers = {"Accept": "application/json"}
    if body is not None:
        headers["content-type"] = "application/json"

    def send() -> requests.Response:
        return config.client.request(
            method, url, data=body, headers=headers, auth=_Bearer(security)
        )

    response = utils.retry(send, config.retry_config)
    content_type = response.headers.get("Content-Type", "")
    if "charset" not in content_type:
        response.encoding = "utf-8"
    head = (content_type, response.status_code, response)
    if 400 <= response.status_code < 600:
        raise _error("API error occurred", response)
    if response.status_code != 200:
        return *head, None
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise _error(f"unknown content-type received: {content_type}", response)
    try:
        return *head, utils.decode(kind, response.json())
    except (TypeError, ValueError) as error:
        raise _error(f"unknown form of {kind.__name__}: {error}", response) from error


def _error(message: str, response: requests.Response) -> errors.SDKError:
    return errors.SDKError(message, response.status_code, response.text, response)
