# SPDX-License-Identifier: Apache-2.0
"""What the commands share: failures, the options of a model, progress, tables."""

from __future__ import annotations

import gc
import io
import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from rich.console import Console

    from fullbeam.model import Model

F = TypeVar("F", bound=Callable[..., Any])

EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


class Failure(click.ClickException):
    """One line on standard error."""

    exit_code = 1


class BadInput(Failure):
    """One line about what was asked for."""

    exit_code = 2


class Command(click.Command):
    """A command whose failures are one line each, never a traceback."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words; what is wrong with a long one is said without its middle."""
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            text = error.format_message()
            if len(text) <= 200:
                raise
            raise click.UsageError(f"{text[:100]}...{text[-90:]}", error.ctx) from None

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except BrokenPipeError:
            # Nobody reads on: let the interpreter's last flush go nowhere, too.
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(EXIT_BROKEN_PIPE)
        except KeyboardInterrupt:
            click.echo(err=True)
            ctx.exit(EXIT_INTERRUPTED)
        except Exception as error:
            text = " ".join(str(error).removeprefix("CompletionParams: ").split())
            is_input = isinstance(error, (ValueError, TypeError, NotImplementedError))
            kind = BadInput if is_input else Failure
            raise kind(text or type(error).__name__) from error


def open_streams() -> None:
    """Make the standard streams ones that can be used: closed ones nobody's, stdout any text's."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


MODEL_OPTIONS = ("device", "threads", "context", "draft_tokens", "quantize")


def model_options(command: F) -> F:
    """Add MODEL_OPTIONS, which say how a model is loaded."""
    for option in (
        click.option(
            "--quantize",
            type=click.Choice(["q8", "q4"]),
            help="Make blocks of 8 or 4 bits of a safetensors folder's matrices, once.",
        ),
        click.option("--context", type=int, help="Most tokens of prompt and completion together."),
        click.option(
            "--draft-tokens",
            type=click.IntRange(0),
            help="Most tokens computed ahead where a text repeats itself; default: 15, cuda: 0.",
        ),
        click.option("--threads", type=int, help="Threads to compute with; default: the cores."),
        click.option(
            "--device",
            type=click.Choice(["auto", "cpu", "cuda"]),
            default="auto",
            help="What computes; auto: the CPU.",
        ),
    ):
        command = option(command)
    return command


def open_console() -> Console:
    """Return what writes tables."""
    from rich.console import Console

    return Console(highlight=False)


@contextmanager
def show_progress() -> Generator[Callable[[float, str], None] | None, None, None]:
    """Show progress on standard error, where that is a terminal and once there is some."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True), transient=True)
    task = bar.add_task("", total=1.0)

    def update(share: float, what: str) -> None:
        bar.start()
        bar.update(task, completed=share, description=what)

    try:
        yield update
    finally:
        bar.stop()


def load_model(model: str | None, **options: Any) -> Model:
    """Load a model, showing progress; garbage is collected from here on."""
    import fullbeam

    with show_progress() as progress:
        loaded = fullbeam.load(model, progress=progress, **options)
    gc.freeze()
    gc.enable()
    return loaded
