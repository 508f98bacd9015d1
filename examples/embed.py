# SPDX-License-Identifier: Apache-2.0
"""Drive the engine from a loop of one's own: submit, step, read the pieces."""

from functools import partial

from fullbeam import CompletionParams, Engine, Piece
from fullbeam.models import open_model
from fullbeam.models.catalog import resolve

opened = open_model(resolve(None))
engine = Engine(opened.decoder, opened.tokenizer, context=1024, max_rows=4)
texts: dict[str, str] = {}


def collect(prompt: str, event: object) -> None:
    if isinstance(event, Exception):
        raise event
    if isinstance(event, Piece):
        texts[prompt] = texts.get(prompt, "") + event.text


params = CompletionParams(max_tokens=12, temperature=0)
for prompt in ("def add(a, b):", "SELECT name FROM", "Once upon a time"):
    engine.submit(prompt, params, on_event=partial(collect, prompt), stream=True)
while engine.step():
    pass
for prompt, text in texts.items():
    print(f"{prompt!r} -> {text!r}")
