# SPDX-License-Identifier: Apache-2.0
"""From a port to an answering server; the model is loaded while the rest is imported."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from fullbeam.model import Model
    from fullbeam.server.settings import Settings

T = TypeVar("T")


def serve(
    load: Callable[[], Model],
    settings: Settings,
    *,
    host: str,
    port: int,
    on_listen: Callable[[str], None] = lambda url: None,
) -> None:
    """Answer HTTP until interrupted, with a line on standard error for each request.

    On SIGTERM and SIGINT no more connections are taken, requests under way get
    `settings.grace_s` seconds to end, and what is left then is cancelled.

    Parameters
    ----------
    load
        Called once, in a thread; returns what answers requests. Whatever it raises ends the server
        and is raised here.
    settings
        How the server behaves.
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
        loading = in_background(load)
        from fullbeam.server import app  # a third of a second

        app.run(loading.result, settings, listener)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"serve: cannot listen on port {port} of {host}: {reason}") from error


def in_background(work: Callable[[], T]) -> Future[T]:
    """Run `work` in a thread of its own, which does not keep the process from ending."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="fullbeam-background", daemon=True).start()
    return future
