# SPDX-License-Identifier: Apache-2.0
"""`fullbeam models` and `fullbeam pull`."""

from __future__ import annotations

import click

from fullbeam.cli.command import Command, open_console, show_progress


@click.command(cls=Command)
def models() -> None:
    """List the catalogue."""
    from rich.table import Table

    from fullbeam.models.catalog import CATALOG, DEFAULT_MODEL

    table = Table("name", "size", "infill", "here", "licence")
    table.columns[0].no_wrap = True
    for entry in CATALOG.values():
        table.add_row(
            entry.name + (" (default)" if entry.name == DEFAULT_MODEL else ""),
            f"{entry.size_bytes / 1e6:,.0f} MB",
            "yes" if entry.infill else "no",
            "yes" if entry.is_local else "no",
            entry.licence,
        )
    open_console().print(table)


@click.command(cls=Command)
@click.argument("name")
def pull(name: str) -> None:
    """Fetch model NAME of the catalogue, or compare the checksum of the one that is here."""
    from fullbeam.models import catalog

    with show_progress() as progress:
        path = catalog.pull(name, progress=progress)
    click.echo(path)
