# SPDX-License-Identifier: Apache-2.0
"""`fullbeam serve`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fullbeam.cli.command import Command, load_model, model_options

if TYPE_CHECKING:
    from fullbeam.model import Model


@click.command(cls=Command)
@click.argument("model", required=False)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option(
    "--max-rows",
    type=int,
    default=32,  # some editors search with 30 hypotheses
    show_default=True,
    help="Most choices decoded at once, and hypotheses of a search.",
)
@click.option(
    "--api-key",
    multiple=True,
    envvar="FULLBEAM_API_KEY",
    show_envvar=True,
    help="Key that clients must send; may be repeated, the variable may hold several.",
)
@click.option(
    "--api-key-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File with more keys, one in a line.",
)
@click.option(
    "--max-requests",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="Requests at once, waiting ones included; more are answered 429.",
)
@click.option(
    "--max-body-mib",
    type=click.FloatRange(0, min_open=True),
    default=4,
    show_default=True,
    help="Largest body of a request.",
)
@click.option(
    "--max-logprobs",
    type=click.IntRange(0),
    default=5,
    show_default=True,
    help="Most likeliest tokens that a request may ask for in each place.",
)
@click.option(
    "--max-stop", type=click.IntRange(0), default=4, show_default=True, help="Most stop strings."
)
@click.option(
    "--timeout",
    type=click.FloatRange(0),
    default=600,
    show_default=True,
    help="Seconds that an answer may take, then 503; 0: no limit.",
)
@click.option(
    "--grace",
    type=click.IntRange(0),
    default=10,
    show_default=True,
    help="Seconds that answers under way are given to end when the server is stopped.",
)
@click.option(
    "--cors-origin",
    "cors_origins",
    multiple=True,
    help="Origin whose pages may call the server, or *; may be repeated. Default: none.",
)
@click.option(
    "--infill/--no-infill",
    default=True,
    help="For editors: show the text right of the cursor to models that can use it.",
)
@click.option(
    "--supersede/--no-supersede",
    default=True,
    help="For editors: a request ends when its client sends a newer one for the same file.",
)
@click.option("--detailed", is_flag=True, help="For old editors: always send scores.")
@model_options
def serve(
    model: str | None,
    host: str,
    port: int,
    max_rows: int,
    api_key: tuple[str, ...],
    api_key_file: Path | None,
    max_requests: int,
    max_body_mib: float,
    max_logprobs: int,
    max_stop: int,
    timeout: float,
    grace: int,
    cors_origins: tuple[str, ...],
    infill: bool,
    supersede: bool,
    detailed: bool,
    **options: Any,
) -> None:
    """Serve MODEL over HTTP.

    /docs lists the routes, /health says whether it can complete, /metrics is for Prometheus. It
    speaks plain HTTP: leave TLS to a proxy before it, and give it keys before it is reachable from
    elsewhere. A line of JSON on standard error tells of each request, without its text.
    """
    from fullbeam.models.catalog import model_name
    from fullbeam.server import serve as server
    from fullbeam.server.settings import EditorOptions, Settings

    name = model_name(model)
    if not all(key.strip() for key in api_key):
        raise ValueError("serve: api_key must not be empty")
    if api_key_file is not None:
        from fullbeam.server.auth import read_keys

        api_key += read_keys(api_key_file)

    def load() -> Model:
        loaded = load_model(model, max_rows=max_rows, **options)
        click.echo(f"fullbeam: {name} is ready", err=True)
        return loaded

    def on_listen(url: str) -> None:
        click.echo(f"fullbeam: listening on {url}", err=True)

    settings = Settings(
        name=name,
        api_keys=api_key,
        max_requests=max_requests,
        max_body_bytes=int(max_body_mib * 2**20),
        max_logprobs=max_logprobs,
        max_stop=max_stop,
        timeout_s=timeout,
        grace_s=grace,
        cors_origins=cors_origins,
        editors=EditorOptions(infill=infill, supersede=supersede, detailed_default=detailed),
    )
    server.serve(load, settings, host=host, port=port, on_listen=on_listen)
