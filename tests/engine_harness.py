# SPDX-License-Identifier: Apache-2.0
"""Drives an engine over the fake model and compares what comes out with the plain loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import fake_model
from fullbeam.engine.device import Device
from fullbeam.engine.engine import Engine
from fullbeam.engine.sequence import Event, Finished, Request
from fullbeam.engine.text import Logprobs, Piece
from fullbeam.params import CompletionParams


class Harness:
    """An engine, its fake decoder, and the events of every request."""

    def __init__(self, *, context: int = 256, device: Device | None = None, **options: Any) -> None:
        self.decoder = fake_model.FakeDecoder(context)
        if device is not None:
            self.decoder.device = device
        options.setdefault("page_size", 4)
        self.engine = Engine(self.decoder, fake_model.FakeTokenizer(), **options)
        self.events: dict[Request, list[Event]] = {}

    def submit(
        self,
        prompt: str | Sequence[int] | None,
        *,
        prompt_index: int = 0,
        stream: bool = False,
        **fields: Any,
    ) -> Request:
        events: list[Event] = []
        request = self.engine.submit(
            prompt,
            CompletionParams(**fields),
            on_event=events.append,
            prompt_index=prompt_index,
            stream=stream,
        )
        self.events[request] = events
        return request

    def run(self, max_steps: int = 5000) -> None:
        """Step until nothing is left to do."""
        for _ in range(max_steps):
            if not self.engine.step():
                return
            self.engine.check()
        raise AssertionError("the engine does not come to an end")

    def complete(self, prompt: str | Sequence[int] | None, **fields: Any) -> list[Piece]:
        request = self.submit(prompt, **fields)
        self.run()
        return self.choices(request)

    def choices(self, request: Request) -> list[Piece]:
        """All choices of a finished request, with the pieces of each put together."""
        by_index: dict[int, list[Piece]] = {}
        for event in self.events[request]:
            if isinstance(event, Exception):
                raise event
            if isinstance(event, Piece):
                by_index.setdefault(event.index, []).append(event)
        return [join(by_index[index]) for index in sorted(by_index)]

    def verify(self, request: Request) -> None:
        """Compare every choice with the plain loop."""
        params = request.params
        choices = self.choices(request)
        assert len(choices) == params.n
        ids = request.prompt_ids.tolist()
        answers = [
            fake_model.answer(ids, params, prompt_index=request.prompt_index, choice=number)
            for number in range(params.num_candidates)
        ]
        num_tokens = sum(wanted["num_tokens"] for wanted in answers)
        assert self.events[request][-1] == Finished(request.indices, num_tokens)
        if params.num_candidates > params.n:
            answers.sort(key=lambda wanted: -wanted["mean"])
        for number, (piece, wanted) in enumerate(zip(choices, answers, strict=False)):
            assert piece.index == request.prompt_index * params.n + number
            if piece.score is not None:
                assert piece.score == wanted["mean"]
            echoed = request.prompt_text if params.echo else ""
            assert piece.text == echoed + wanted["text"]
            for name in ("token_ids", "finish_reason", "stop_reason", "num_tokens"):
                assert getattr(piece, name) == wanted[name], name
            if params.logprobs is None:
                assert piece.logprobs is None
                continue
            assert piece.logprobs is not None
            first = len(ids) if params.echo else 0
            base = len(request.prompt_text)
            assert piece.logprobs.text_offset[first:] == [base + s for s in wanted["starts"]]
            assert piece.logprobs.token_logprobs[first:] == wanted["token_logprobs"]
            if params.echo:
                assert piece.logprobs.token_logprobs[:first] == prompt_logprobs(ids)


def join(pieces: list[Piece]) -> Piece:
    assert [piece.finish_reason is not None for piece in pieces] == [False] * (len(pieces) - 1) + [
        True
    ]
    last = pieces[-1]
    logprobs = None
    if last.logprobs is not None:
        logprobs = Logprobs()
        for piece in pieces:
            assert piece.logprobs is not None
            logprobs.extend(piece.logprobs)
    return Piece(
        index=last.index,
        text="".join(piece.text for piece in pieces),
        token_ids=[token_id for piece in pieces for token_id in piece.token_ids],
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        logprobs=logprobs,
        num_tokens=last.num_tokens,
        score=last.score,
        prompt_logprobs=last.prompt_logprobs,
    )


def prompt_logprobs(ids: list[int]) -> list[float | None]:
    import numpy as np

    from fullbeam import ops

    values: list[float | None] = [None]
    for end in range(1, len(ids)):
        logits = fake_model.history_logits(ids[:end])[None]
        values.append(float(ops.logprobs(logits, np.int32([ids[end]]))[0][0]))
    return values
