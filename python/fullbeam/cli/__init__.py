# SPDX-License-Identifier: Apache-2.0
"""The `fullbeam` command: complete, serve, models, pull, info, bench.

Everything heavy is imported by the command that needs it, so that `--help` is quick.
"""

from __future__ import annotations

import gc
import os

import click

from fullbeam.cli import bench, complete, info, models, serve
from fullbeam.cli.command import open_streams


def _show_cmake_dir(ctx: click.Context, _: click.Parameter, is_wanted: bool) -> None:
    if not is_wanted or ctx.resilient_parsing:
        return
    from fullbeam.headers import cmake_dir

    try:
        click.echo(cmake_dir())
    except FileNotFoundError as error:
        raise click.ClickException(str(error)) from None
    ctx.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="fullbeam", message="%(prog)s %(version)s")
@click.option(
    "--cmakedir",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_cmake_dir,
    help="Show the folder of fullbeamConfig.cmake and exit.",
)
@click.pass_context
def main(ctx: click.Context) -> None:
    """Complete text and code on this machine."""
    open_streams()
    # No garbage comes about until a model is loaded: a tenth of the start goes into looking for it.
    gc.disable()
    ctx.call_on_close(gc.enable)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's threads would only be in the way


for subcommand in (
    complete.complete,
    serve.serve,
    models.models,
    models.pull,
    info.info,
    bench.bench,
):
    main.add_command(subcommand)
