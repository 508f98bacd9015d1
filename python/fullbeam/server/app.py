# SPDX-License-Identifier: Apache-2.0
"""The routes, the life of the model behind them, and errors in the surface's shape."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import socket
import time
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from fullbeam.server import openai, schema
from fullbeam.server.openai import ApiError, Json
from fullbeam.server.stream import ClientGone

if TYPE_CHECKING:
    from fullbeam.model import Model


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How a server behaves."""

    name: str
    """The model's id on the wire."""
    api_keys: tuple[str, ...] = ()
    """One of them must be sent; none: no key is asked for."""
    max_requests: int = 256
    """Requests at once, waiting ones included; more are answered 429."""
    max_body_bytes: int = 16 << 20
    max_choices: int = 2048
    """Prompts of one request times `n`."""
    max_logprobs: int = 5
    max_stop: int = 4


class Service:
    """The model behind the routes: loading, ready, or failed."""

    def __init__(self, load: Callable[[], Model], settings: Settings) -> None:
        self.settings = settings
        self.created = int(time.time())
        self.failure: Exception | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self.num_requests = 0
        self.fingerprint = ""
        self._load = load
        self._model: Model | None = None

    @asynccontextmanager
    async def running(self, _app: FastAPI) -> AsyncGenerator[None, None]:
        """Load the model while the server already answers; close it at the end."""
        loading = asyncio.create_task(self._load_model())
        try:
            yield
        finally:
            await loading
            if self._model is not None:
                await asyncio.to_thread(self._model.close)

    async def _load_model(self) -> None:
        try:
            model = await asyncio.to_thread(self._load)
            self.fingerprint = await asyncio.to_thread(fingerprint, model)
            self._model = model
        except Exception as error:
            self.failure = error
            self.on_failure()

    @property
    def is_ready(self) -> bool:
        """Whether it can complete."""
        return self._model is not None

    def model_for(self, name: str | None) -> Model:
        """Return the model that a request asks for; None: the default."""
        self.check_name(name)
        if self._model is None:
            raise ApiError(503, "the model is loading", code="overloaded", retry_after=1)
        return self._model

    def check_name(self, name: str | None) -> None:
        """Refuse a name that is not the model's."""
        if name is not None and name != self.settings.name:
            message = f"model {name!r} does not exist, this server has {self.settings.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def card(self) -> Json:
        """Return the model object."""
        return {
            "id": self.settings.name,
            "object": "model",
            "created": self.created,
            "owned_by": "fullbeam",
        }

    @contextmanager
    def slot(self) -> Generator[None, None, None]:
        """Count a request while it is being answered; refuse it when there are too many."""
        if self.num_requests >= self.settings.max_requests:
            message = f"{self.num_requests} requests are waiting already, try again later"
            raise ApiError(429, message, code="rate_limit_exceeded", retry_after=1)
        self.num_requests += 1
        try:
            yield
        finally:
            self.num_requests -= 1


def fingerprint(model: Model) -> str:
    """Return what changes with a model's weights and with this package's version."""
    from fullbeam import __version__

    digest = hashlib.sha256(f"{__version__} {model.name}".encode())
    if model.path is not None:
        num_bytes = model.path.stat().st_size
        digest.update(str(num_bytes).encode())
        with model.path.open("rb") as file:
            for idx in range(64):  # samples spread over the file stand for the whole
                file.seek(idx * num_bytes // 64)
                digest.update(file.read(4096))
    return f"fp_{digest.hexdigest()[:12]}"


def serve(
    load: Callable[[], Model],
    settings: Settings,
    *,
    host: str,
    port: int,
    on_listen: Callable[[str], None] = lambda url: None,
) -> None:
    """Answer HTTP until interrupted.

    Parameters
    ----------
    load, settings
        As for `create_app`. Whatever `load` raises ends the server and is raised here.
    host, port
        Where to listen; port 0: any free one.
    on_listen
        Told the server's address once it is reachable.

    Raises
    ------
    OSError
        When the port is in use or may not be opened; nothing is loaded then.
    """
    with _listen(host, port) as listener:
        name = f"[{host}]" if ":" in host else host
        on_listen(f"http://{name}:{listener.getsockname()[1]}")
        app = create_app(load, settings)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=10
        )
        server = uvicorn.Server(config)
        service: Service = app.state.service
        service.on_failure = lambda: setattr(server, "should_exit", True)
        server.run(sockets=[listener])
    if service.failure is not None:
        raise service.failure


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"serve: cannot listen on port {port} of {host}: {reason}") from error


def create_app(load: Callable[[], Model], settings: Settings) -> FastAPI:
    """Return the ASGI application.

    Parameters
    ----------
    load
        Called once, in a thread, when the application starts; returns what answers requests.
    settings
        How the server behaves.
    """
    from fullbeam import __version__

    service = Service(load, settings)
    app = FastAPI(
        title="fullbeam",
        version=__version__,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=service.running,
    )
    app.state.service = service
    guarded = [Depends(_require_key)]
    for path in ("/v1/completions", "/completions", "/v1/engines/{model:path}/completions"):
        app.post(
            path,
            summary="Complete prompts",
            dependencies=guarded,
            openapi_extra=schema.completion_request() | schema.path_parameter(path),
            responses=schema.completion_responses(),
        )(openai.completions)
    for path, answer in (("/v1/models", _list_models), ("/v1/models/{model:path}", _get_model)):
        app.get(
            path,
            dependencies=guarded,
            openapi_extra=schema.path_parameter(path),
            responses=schema.error_responses(401, 404),
        )(answer)
    app.get("/health", responses={503: {"description": "It cannot complete (yet)."}})(_health)
    app.add_exception_handler(ClientGone, _on_client_gone)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_routing_error)
    app.add_exception_handler(Exception, _on_fault)
    return app


async def _require_key(
    request: Request,
    given: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
) -> None:
    keys = request.app.state.service.settings.api_keys
    sent = b"" if given is None else given.credentials.encode("latin-1", "replace")
    # Every key is compared in full, so that the time taken says nothing about them.
    matches = [hmac.compare_digest(sent, key.encode()) for key in keys]
    if keys and (given is None or not any(matches)):
        what = "no API key was sent" if given is None else "the API key is wrong"
        raise ApiError(401, f"{what}: send 'Authorization: Bearer KEY'", code="invalid_api_key")


async def _list_models(request: Request) -> Response:
    """List the models of this server."""
    return JSONResponse({"object": "list", "data": [request.app.state.service.card()]})


async def _get_model(request: Request) -> Response:
    """Describe one model."""
    service: Service = request.app.state.service
    service.check_name(request.path_params["model"])
    return JSONResponse(service.card())


async def _health(request: Request) -> Response:
    """Tell whether the server can complete."""
    service: Service = request.app.state.service
    if service.is_ready:
        return JSONResponse({"status": "ok"})
    status = "loading" if service.failure is None else "failed"
    return JSONResponse({"status": status}, 503)


async def _on_client_gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _on_api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _on_routing_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    codes = {404: "unknown_url", 405: "method_not_allowed"}
    message = f"{request.method} {request.url.path}: {error.detail}"
    answer = ApiError(error.status_code, message, code=codes.get(error.status_code))
    answer.headers.update(error.headers or {})
    return answer.response()


async def _on_fault(_request: Request, error: Exception) -> Response:
    return openai.internal_error(error).response()
