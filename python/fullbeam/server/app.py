# SPDX-License-Identifier: Apache-2.0
"""The routes, the surfaces they belong to, and the server that answers."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import uvicorn
from fastapi import Depends, FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from fullbeam.server import fullline, gateway, openai, schema
from fullbeam.server.auth import require_key
from fullbeam.server.conduct import Conduct
from fullbeam.server.errors import ApiError
from fullbeam.server.metrics import Metrics
from fullbeam.server.record import CLIENT_GONE, record_of, requests_log
from fullbeam.server.service import Service
from fullbeam.server.settings import Settings
from fullbeam.server.stream import ClientGone

if TYPE_CHECKING:
    from fullbeam.model import Model

# Editors ask for the models, too, with bare keys.
_MODELS = replace(openai.SURFACE, roots=("/v1/models",), has_bare_keys=True)

# The first one that owns a path has its errors; the last one owns all.
SURFACES = (fullline.SURFACE, gateway.SURFACE, _MODELS, openai.SURFACE)

_KEEP_ALIVE_S = 75  # longer than proxies keep an idle connection, so that they close it first
_LAST_WORDS_S = 3  # beyond the grace period, to tell clients that it is over


def run(load: Callable[[], Model], settings: Settings, listener: socket.socket) -> None:
    """Answer what comes in at a socket until interrupted; see `fullbeam.server.serve`."""
    _log_requests()
    app = create_app(load, settings)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=settings.grace_s + _LAST_WORDS_S,
    )
    service: Service = app.state.service
    server = _Server(config, service)
    service.on_failure = lambda: setattr(server, "should_exit", True)
    server.run(sockets=[listener])
    if service.failure is not None:
        raise service.failure


class _Server(uvicorn.Server):
    """Ends by itself what is being answered still at the end of the grace period."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for the answers under way."""
        grace_s = self._service.settings.grace_s
        asyncio.get_running_loop().call_later(grace_s, self._service.stop)
        await super().shutdown(sockets)


def _log_requests() -> None:
    """Send the log line of each request to standard error, as it is."""
    if not requests_log.handlers:
        requests_log.addHandler(logging.StreamHandler())
        requests_log.setLevel(logging.INFO)
        requests_log.propagate = False


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
    metrics = Metrics(service)
    app = FastAPI(
        title="fullbeam",
        version=__version__,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=service.running,
    )
    app.state.service = service
    app.state.metrics = metrics
    guarded = [Depends(require_key)]
    for path in ("/v1/completions", "/completions", "/v1/engines/{model:path}/completions"):
        app.post(
            path,
            summary="Complete prompts",
            dependencies=guarded,
            openapi_extra=schema.completion_request(settings) | schema.path_parameter(path),
            responses=schema.completion_responses(),
        )(openai.completions)
    for path, answer in (("/v1/models", _list_models), ("/v1/models/{model:path}", _get_model)):
        app.get(
            path,
            dependencies=guarded,
            openapi_extra=schema.path_parameter(path),
            responses=schema.error_responses(401, 404),
        )(answer)
    fullline.add_routes(app)
    gateway.add_routes(app)
    app.get("/health", responses={503: {"description": "It cannot complete (yet)."}})(_health)
    app.get("/metrics", response_class=Response)(_metrics)
    app.add_exception_handler(ClientGone, _on_client_gone)
    app.add_exception_handler(HTTPException, _on_refusal)
    app.add_middleware(Conduct, service=service, surfaces=SURFACES, metrics=metrics)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    return app


async def _list_models(request: Request) -> Response:
    """List the models of this server."""
    service: Service = request.app.state.service
    lists = fullline.model_lists(service.settings.name)
    return JSONResponse({"object": "list", "data": [service.card()], **lists})


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


async def _metrics(request: Request) -> Response:
    """Count requests, tokens, rows, pages and times, for Prometheus."""
    metrics: Metrics = request.app.state.metrics
    return metrics.response()


async def _on_client_gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


async def _on_refusal(request: Request, error: Exception) -> Response:
    """Give an error, the router's included, the shape of its path's surface."""
    assert isinstance(error, HTTPException)
    if not isinstance(error, ApiError):
        codes = {404: "unknown_url", 405: "method_not_allowed"}
        message = f"{request.method} {request.url.path}: {error.detail}"
        headers = error.headers
        error = ApiError(error.status_code, message, code=codes.get(error.status_code))
        error.headers.update(headers or {})
    return record_of(request.scope).surface.render(error)
