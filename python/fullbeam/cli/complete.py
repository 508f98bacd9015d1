# SPDX-License-Identifier: Apache-2.0
"""`fullbeam complete`."""

from __future__ import annotations

import dataclasses
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Any

import click

from fullbeam.cli.command import MODEL_OPTIONS, Command, load_model, model_options, open_console

if TYPE_CHECKING:
    from rich.console import Console

    from fullbeam.model import Model
    from fullbeam.params import CompletionParams
    from fullbeam.results import Choice, Completion

MAX_TOKENS = 128
"""More than the 16 of the API: whoever types a command wants to see something."""


@click.command(cls=Command)
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
@model_options
def complete(
    words: tuple[str, ...],
    as_json: bool,
    **given: Any,
) -> None:
    """Complete PROMPT and show the text as it comes.

    PROMPT is "-" to read it from standard input. MODEL is a name of the catalogue or a .gguf
    file; without it the catalogue's default is taken.
    """
    from fullbeam.params import CompletionParams

    if len(words) > 2:
        raise click.UsageError("more than MODEL and PROMPT were given: put the prompt in quotes")
    options = {name: given.pop(name) for name in MODEL_OPTIONS}
    fields = {name: value for name, value in given.items() if value not in (None, ())}
    params = CompletionParams(**fields)
    name = words[0] if len(words) == 2 else None
    prompt = sys.stdin.read() if words[-1] == "-" else words[-1]
    with closing(load_model(name, **options)) as model:
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

    console = open_console()
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
