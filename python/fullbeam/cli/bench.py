# SPDX-License-Identifier: Apache-2.0
"""`fullbeam bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fullbeam.cli.command import Command, open_console, show_progress

if TYPE_CHECKING:
    from rich.console import JustifyMethod


@click.command(cls=Command)
@click.argument("model", required=False)
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the figures as JSON.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--threads", type=int, help="Threads to compute with; default: the cores.")
def bench(model: str | None, file: Path | None, rounds: int, threads: int | None) -> None:
    """Measure MODEL on this machine: throughput, latency, and the share of what is possible.

    Nothing else should compute meanwhile. Figures are medians with their spread. %read and %int8
    say how much of the measured memory bandwidth and int8 rate the weights alone account for.
    """
    import json

    from rich.table import Table

    from fullbeam import __version__, _core
    from fullbeam.bench import Bench
    from fullbeam.models import open_model
    from fullbeam.models.catalog import resolve

    if file is not None and not file.parent.is_dir():
        raise ValueError(f"bench: json must be in a folder that exists, got {str(file)!r}")
    with show_progress() as progress:
        opened = open_model(resolve(model, progress=progress), threads=threads, progress=progress)
        found = Bench(opened).measure(rounds=rounds, progress=progress)
    head: dict[str, Any] = {
        "fullbeam": __version__,
        "model": opened.name,
        "instruction set": _core.cpu_isa(),
        "threads": opened.decoder.device.threads,
        "rounds": rounds,
    }
    if file is not None:
        file.write_text(json.dumps(head | found, indent=2) + "\n")
    rows = found.pop("rows")
    facts = Table(show_header=False, box=None)
    for name, value in (head | found).items():
        facts.add_row(name, _figure(value))
    names = dict.fromkeys(name for row in rows for name in row)
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for name in (*names, "spread %"):  # titles over several lines, so that 80 columns are enough
        side: JustifyMethod = "left" if name == "task" else "right"
        table.add_column(name.replace(" ", "\n"), justify=side, no_wrap=True, vertical="bottom")
    for row in rows:
        total = row["total s"]
        spread = 100 * (total["max"] - total["min"]) / total["median"]
        table.add_row(*(_figure(row.get(name, "")) for name in names), _figure(spread))
    console = open_console()
    console.print(facts)
    console.print(table)


def _figure(value: Any) -> str:
    value = value["median"] if isinstance(value, dict) else value
    return (
        f"{value:.3g}"
        if isinstance(value, float) and value < 1000
        else (f"{value:.0f}" if isinstance(value, float) else str(value))
    )
