# SPDX-License-Identifier: Apache-2.0
"""The `fullbeam` command: complete, serve, models, pull, info, bench.

Everything heavy is imported by the command that needs it, so that `--help` is quick.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from types import ModuleType

    from rich.console import Console

    from fullbeam.model import Model
    from fullbeam.params import CompletionParams
    from fullbeam.results import Choice, Completion

F = TypeVar("F", bound=Callable[..., Any])

MAX_TOKENS = 128
"""More than the 16 of the API: whoever types a command wants to see something."""

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
    # No garbage comes about until a model is loaded: a tenth of the start goes into looking for it.
    gc.disable()
    ctx.call_on_close(gc.enable)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's threads would only be in the way


def _model_options(command: F) -> F:
    """Add the options that say how a model is loaded."""
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


@main.command(cls=Command)
@click.argument("words", nargs=-1, required=True, metavar="[MODEL] PROMPT")
@click.option(
    "--max-tokens",
    type=int,
    help=f"Most tokens to add; default: {MAX_TOKENS}, 16 with --mode, or what fits.",
)
@click.option("--min-tokens", type=int, help="No end before this many tokens.")
@click.option("--temperature", type=float, help="Sharpness of the draw; 0: the likeliest token.")
@click.option("--top-p", type=float, help="Draw from the likeliest tokens with this mass.")
@click.option("--top-k", type=int, help="Draw from this many likeliest tokens.")
@click.option("--min-p", type=float, help="Draw from tokens this likely, relative to the first.")
@click.option("--presence-penalty", type=float, help="Off the logits of tokens that were there.")
@click.option("--frequency-penalty", type=float, help="The same, times how often.")
@click.option(
    "--repetition-penalty", type=float, help="Divides logits of tokens so far, or prompt."
)
@click.option("--bad-word", "bad_words", multiple=True, help="Never write this; may be repeated.")
@click.option("--seed", type=int, help="The same seed gives the same text.")
@click.option("--stop", multiple=True, help="End before this text; may be repeated.")
@click.option("--ignore-eos", is_flag=True, default=None, help="Go on past the end of the text.")
@click.option("--n", type=int, help="Number of choices.")
@click.option("--best-of", type=int, help="Draw this many texts and show the likeliest.")
@click.option("--logprobs", type=int, help="Show log-probabilities, of this many tokens each.")
@click.option("--echo", is_flag=True, default=None, help="Put the prompt before the completion.")
@click.option("--suffix", help="Text after the completion: fill in the middle.")
@click.option("--prefix", help="What the completion starts with.")
@click.option("--token-healing", is_flag=True, default=None, help="Choose half a token anew.")
@click.option("--context-len", type=int, help="Most tokens of the prompt to keep; -1: what fits.")
@click.option("--beam-size", type=int, help="Search instead of drawing, with this many hypotheses.")
@click.option("--diversity-groups", type=int, help="Groups of hypotheses with different tokens.")
@click.option("--diversity-strength", type=float, help="How different.")
@click.option("--length-penalty", type=float, help="Rank by log-probability / tokens ** this.")
@click.option("--len-norm-base", type=float, help="Rank by a normalised probability; see README.")
@click.option("--len-norm-pow", type=float, help="Its power; 0: the bare probability.")
@click.option(
    "--mode",
    type=click.Choice(["FULL_LINE", "ONE_TOKEN"], case_sensitive=False),
    help="Suggest code to the end of the line, or one word of it; with --beam-size.",
)
@click.option("--top-n", type=int, help="Most suggestions of --mode.")
@click.option("--only-full-lines/--no-only-full-lines", default=None, help="Finished lines only.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@_model_options
def complete(
    words: tuple[str, ...],
    as_json: bool,
    device: str,
    threads: int | None,
    context: int | None,
    draft_tokens: int | None,
    quantize: str | None,
    **given: Any,
) -> None:
    """Complete PROMPT and show the text as it comes.

    PROMPT is "-" to read it from standard input. MODEL is a name of the catalogue or a .gguf
    file; without it the catalogue's default is taken.
    """
    from fullbeam.params import CompletionParams

    if len(words) > 2:
        raise click.UsageError("more than MODEL and PROMPT were given: put the prompt in quotes")
    fields = {name: value for name, value in given.items() if value not in (None, ())}
    params = CompletionParams(**fields)
    name = words[0] if len(words) == 2 else None
    prompt = sys.stdin.read() if words[-1] == "-" else words[-1]
    options = {
        "device": device,
        "threads": threads,
        "context": context,
        "draft_tokens": draft_tokens,
        "quantize": quantize,
    }
    with _loaded(name, **options) as model:
        if params.max_tokens is None and params.mode is None:
            room = _room(model, prompt, params)
            params = dataclasses.replace(params, max_tokens=max(1, min(MAX_TOKENS, room)))
        is_list = params.is_search or params.num_candidates > 1
        if as_json:
            click.echo(_as_json(model.complete(prompt, params=params)))
        elif is_list or params.logprobs is not None:
            _show_choices(model.complete(prompt, params=params), is_list)
        else:
            _show_stream(model, prompt, params)


@main.command(cls=Command)
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
@_model_options
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
    device: str,
    threads: int | None,
    context: int | None,
    draft_tokens: int | None,
    quantize: str | None,
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
    if api_key_file is not None:
        from fullbeam.server.auth import read_keys

        api_key += read_keys(api_key_file)

    def load() -> Model:
        loaded = _load(
            model,
            device=device,
            threads=threads,
            context=context,
            max_rows=max_rows,
            draft_tokens=draft_tokens,
            quantize=quantize,
        )
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


@main.command(cls=Command)
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
    _console().print(table)


@main.command(cls=Command)
@click.argument("name")
def pull(name: str) -> None:
    """Fetch model NAME of the catalogue, or compare the checksum of the one that is here."""
    from fullbeam.models import catalog

    with _progress() as progress:
        path = catalog.pull(name, progress=progress)
    click.echo(path)


@main.command(cls=Command)
def info() -> None:
    """Show what this installation is, what it runs on, and why a device is not used."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from rich.table import Table

    from fullbeam import __version__
    from fullbeam.models.catalog import cache_folder

    facts: dict[str, object] = {
        "fullbeam": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "numpy": version("numpy"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} logical cores",
        "model folder": cache_folder(),
    }
    try:
        facts["torch"] = version("torch")
    except PackageNotFoundError:
        facts["torch"] = "not installed; only CUDA devices need it"
    try:
        from fullbeam import _core
    except ImportError as error:
        facts["native module"] = f"missing ({error}): install fullbeam again"
    else:
        built = _core.build_info()
        facts["compiler"] = built["compiler"]
        chosen = "FULLBEAM_CPU_ISA says" if os.environ.get("FULLBEAM_CPU_ISA") else "the best here"
        isas = ", ".join(built["cpu_isas"])
        facts["CPU kernels"] = f"{isas}; in use: {_core.cpu_isa()}, {chosen}"
        facts["threads"] = f"{_core.num_physical_cores()} unless --threads is given"
        cuda = built["cuda"]
        facts["CUDA kernels"] = "none: built without nvcc" if cuda == "off" else f"by nvcc {cuda}"
        facts["CUDA devices"] = _cuda_devices(_core)
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name, str(value))
    _console().print(table)


def _cuda_devices(core: ModuleType) -> str:
    num_devices = core.num_cuda_devices()
    if num_devices == 0:
        return f"none: {core.why_no_cuda_device()}"
    from fullbeam.engine.device import why_no_cuda

    if reason := why_no_cuda():
        return f"{num_devices}, not used: {reason}"
    import torch

    names = ", ".join(map(torch.cuda.get_device_name, range(num_devices)))
    return f"{names}; --device cuda uses the first, CUDA_VISIBLE_DEVICES says which that is"


@main.command(cls=Command)
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

    with _progress() as progress:
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
    table = Table(*names, "spread %")
    table.columns[0].no_wrap = True
    for row in rows:
        total = row["total s"]
        spread = 100 * (total["max"] - total["min"]) / total["median"]
        table.add_row(*(_figure(row.get(name, "")) for name in names), _figure(spread))
    console = _console()
    console.print(facts)
    console.print(table)


def _figure(value: Any) -> str:
    value = value["median"] if isinstance(value, dict) else value
    return (
        f"{value:.3g}"
        if isinstance(value, float) and value < 1000
        else (f"{value:.0f}" if isinstance(value, float) else str(value))
    )


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


@contextmanager
def _progress() -> Generator[Callable[[float, str], None] | None, None, None]:
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


def _load(model: str | None, **options: Any) -> Model:
    import fullbeam

    with _progress() as progress:
        loaded = fullbeam.load(model, progress=progress, **options)
    gc.freeze()
    gc.enable()
    return loaded


@contextmanager
def _loaded(model: str | None, **options: Any) -> Generator[Model, None, None]:
    loaded = _load(model, **options)
    try:
        yield loaded
    finally:
        loaded.close()


def _show_stream(model: Model, prompt: str, params: CompletionParams) -> None:
    last = ""
    with model.stream(prompt, params=params) as pieces:
        for piece in pieces:
            click.echo(piece.text, nl=False)
            last = piece.text or last
    if not last.endswith("\n"):
        click.echo()


def _room(model: Model, prompt: str, params: CompletionParams) -> int:
    """Return how many tokens the prompt leaves of the context."""
    if params.context_len == -1:  # as many as that takes
        return model.context - 1
    num_tokens = len(model.tokenizer.encode(prompt))
    if params.suffix is not None:
        num_tokens += len(model.tokenizer.encode(params.suffix)) + 3  # what marks the parts
    return model.context - min(num_tokens, params.context_len or num_tokens)


def _show_choices(result: Completion, is_list: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    console = _console()
    if is_list:
        table = Table("", "score", "text", "end", show_lines=True)
        for choice in result.choices:
            score = "" if choice.score is None else f"{choice.score:.3f}"
            table.add_row(str(choice.index), score, Text(choice.text), choice.finish_reason)
        console.print(table)
    for choice in result.choices:
        if not is_list:
            click.echo(choice.text)
        if choice.logprobs is not None:
            _show_logprobs(console, choice)


def _show_logprobs(console: Console, choice: Choice) -> None:
    from rich.table import Table
    from rich.text import Text

    assert choice.logprobs is not None
    table = Table("token", "logprob", "most likely")
    rows = zip(
        choice.logprobs.tokens,
        choice.logprobs.token_logprobs,
        choice.logprobs.top_logprobs,
        strict=True,
    )
    for token, value, top in rows:
        best = ", ".join(f"{name!r} {other:.3f}" for name, other in (top or {}).items())
        shown = "" if value is None else f"{value:.3f}"
        table.add_row(Text(repr(token)), shown, Text(best))
    console.print(table)


def _as_json(result: Completion) -> str:
    """Return the result object as JSON; -inf is written as -9999.0, as over HTTP."""
    import json
    import math

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return -9999.0 if isinstance(value, float) and not math.isfinite(value) else value

    body = plain(dataclasses.asdict(result))
    body["usage"]["total_tokens"] = result.usage.total_tokens
    return json.dumps(body, ensure_ascii=False, indent=2)
