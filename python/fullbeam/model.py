# SPDX-License-Identifier: Apache-2.0
"""A loaded model: complete, stream and score, from threads and from asyncio."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from fullbeam.engine.device import choose_device
from fullbeam.engine.engine import Engine
from fullbeam.engine.loop import EngineLoop
from fullbeam.engine.memory import PAGE_SIZE, check_positive, plan_kv, return_free_memory
from fullbeam.engine.sequence import Event, Request
from fullbeam.engine.text import Piece, Tokenizer
from fullbeam.params import CompletionParams
from fullbeam.results import Completion, Score, as_choice
from fullbeam.stream import Call, CompletionStream

if TYPE_CHECKING:
    from fullbeam.async_stream import AsyncCompletionStream

Prompt = str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]] | None


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    device: str = "auto",
    threads: int | None = None,
    context: int | None = None,
    max_rows: int | None = None,
    draft_tokens: int | None = None,
    quantize: str | None = None,
    progress: Callable[[float, str], None] | None = None,
) -> Model:
    """Load a model.

    Parameters
    ----------
    model
        Catalogue name, path of a `.gguf` file or a folder, or hub id; None: the catalogue's
        default.
    device
        "cpu", or "cuda": the GPU that torch takes by default (CUDA_VISIBLE_DEVICES says which);
        several are not used together. "auto" is the CPU, until the engine has been run on a GPU.
    threads
        Threads to compute with; None: one for each physical core.
    context
        Most tokens of a prompt and its completion; None: what the model was made for, at most
        4096 and what memory holds.
    max_rows
        Most choices decoded at once, 16 unless given.
    draft_tokens
        Most tokens of a choice that a step computes ahead, where its text repeats itself or the
        prompt; 0: none; None: 15 on the CPU, 0 on a GPU, whose steps overlap instead. Answers are
        the same, only sooner.
    quantize
        "q8" or "q4" makes blocks of 8 or 4 bits of the matrices of a safetensors folder, once: the
        result is kept in the cache folder. None: as stored.
    progress
        Called with a share in 0..1 and what is being done.

    Raises
    ------
    TypeError
        For a model that is no name or path, or a number that is no integer.
    ValueError
        For an unknown model, a number out of range, a device that can't be used, a damaged file, or
        when there is no room for the weights or the KV cache.
    """
    for name, value in (("context", context), ("max_rows", max_rows), ("threads", threads)):
        if value is not None:
            check_positive(name, value)
    computes = choose_device(device, threads)
    from fullbeam.models import open_model
    from fullbeam.models.catalog import resolve

    path = resolve(model, progress=progress)
    opened = open_model(
        path, device=computes, context=context, quantize=quantize, progress=progress
    )
    return_free_memory()
    decoder = opened.decoder
    plan = plan_kv(
        bytes_per_token=decoder.kv_bytes_per_token(),
        model_context=decoder.config.context_len,
        context=context,
        max_rows=max_rows,
        available_bytes=computes.available_bytes(),
        kv_share=computes.kv_share,
    )
    engine = Engine(
        decoder,
        opened.tokenizer,
        context=plan.context,
        max_rows=plan.max_rows,
        num_pages=plan.num_pages,
        page_size=PAGE_SIZE,
        token_budget=max(512, plan.max_rows),
        draft_tokens=draft_tokens,
    )
    return Model(engine, name=opened.name, path=path)


class Model:
    """Completes text; all calls from all threads share one batch.

    A thread that computes is started by the first call and ended by `close`, which a `with`
    statement does too. `prompt` is a text, several texts, token ids, or several lists of them;
    `fields` are those of `CompletionParams`, which `params` gives as a whole instead.
    """

    def __init__(self, engine: Engine, *, name: str, path: Path | None = None) -> None:
        self.name = name
        self.path = path
        self.device = engine.device_name
        self.engine = engine
        self.on_submit: Callable[[list[Request]], None] = lambda requests: None
        """Told of the requests of each call, in the thread that makes the call."""
        self._loop = EngineLoop(engine)
        self._finalizer = weakref.finalize(self, self._loop.stop)

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to token ids and back."""
        return self.engine.tokenizer

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its completion together."""
        return self.engine.context

    def complete(
        self, prompt: Prompt = None, *, params: CompletionParams | None = None, **fields: Any
    ) -> Completion:
        """Complete one or several prompts and wait for the result.

        Raises
        ------
        TypeError
            For an unknown field or a value of the wrong kind.
        ValueError
            For a value out of range, an empty list, or a prompt that does not fit.
        RuntimeError
            When the model is closed or the engine fails.
        """
        with CompletionStream(self, prompt, _params(params, fields), stream=False) as stream:
            pieces = list(stream)
        return _completion(pieces, stream)

    def stream(
        self, prompt: Prompt = None, *, params: CompletionParams | None = None, **fields: Any
    ) -> CompletionStream:
        """Return an iterator over pieces of text as they come; closing it stops the work.

        Raises as `complete`, at once for bad arguments.
        """
        return CompletionStream(self, prompt, _params(params, fields), stream=True)

    async def acomplete(
        self, prompt: Prompt = None, *, params: CompletionParams | None = None, **fields: Any
    ) -> Completion:
        """Complete like `complete`; cancelling the task stops the work."""
        from fullbeam.async_stream import AsyncCompletionStream

        stream = AsyncCompletionStream(self, prompt, _params(params, fields), stream=False)
        try:
            pieces = [piece async for piece in stream]
        finally:
            stream.close()
        return _completion(pieces, stream)

    def astream(
        self, prompt: Prompt = None, *, params: CompletionParams | None = None, **fields: Any
    ) -> AsyncCompletionStream:
        """Return an asynchronous iterator over pieces; to be called inside a running event loop."""
        from fullbeam.async_stream import AsyncCompletionStream

        return AsyncCompletionStream(self, prompt, _params(params, fields), stream=True)

    def score(self, prompt: Prompt) -> Score | list[Score]:
        """Return the log-probability of each token of a text: a list of them for several prompts.

        Raises as `complete`.
        """
        params = CompletionParams(max_tokens=0, echo=True, logprobs=1)
        with CompletionStream(self, prompt, params, stream=False) as stream:
            pieces = sorted(stream, key=lambda piece: piece.index)
        scores = [
            _score(request.prompt_ids.tolist(), piece)
            for request, piece in zip(stream.requests, pieces, strict=True)
        ]
        return scores if _is_several(prompt) else scores[0]

    def prepare(self) -> None:
        """Build now what the first search would have to wait for: some 0.5 s."""
        self.engine.prepare()

    def close(self) -> None:
        """End the thread; calls under way raise RuntimeError."""
        self._finalizer()

    def __enter__(self) -> Model:
        """Return the model itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the model."""
        self.close()

    def submit(
        self,
        prompt: Prompt,
        params: CompletionParams,
        *,
        stream: bool,
        on_event: Callable[[Event], None],
    ) -> list[Request]:
        """Queue all prompts of a call, or none if one is refused."""
        self._loop.check_process()
        requests: list[Request] = []
        try:
            for idx, item in enumerate(split_prompt(prompt)):
                requests.append(
                    self.engine.submit(
                        item, params, on_event=on_event, prompt_index=idx, stream=stream
                    )
                )
        except BaseException:
            for request in requests:
                self.engine.cancel(request)
            raise
        self._loop.start()
        self.on_submit(requests)
        return requests


def split_prompt(prompt: Prompt) -> list[str | list[int]]:
    """Return the prompts that an argument stands for; "" and None stand for one empty text."""
    if prompt is None or isinstance(prompt, str):
        return [prompt or ""]
    items: Any = prompt.tolist() if isinstance(prompt, np.ndarray) else prompt
    if not isinstance(items, Sequence) or isinstance(items, (bytes, bytearray)):
        raise _wrong_kind("prompt", items)
    if not items:
        raise ValueError("complete: prompt must hold at least one prompt or token id, got []")
    if isinstance(items[0], str):
        for idx, item in enumerate(items):
            if not isinstance(item, str):
                raise _wrong_kind(f"prompt[{idx}]", item)
        return list(items)
    if not _is_list(items[0]):
        return [list(items)]
    for idx, item in enumerate(items):
        if not _is_list(item):
            raise _wrong_kind(f"prompt[{idx}]", item)
    return [item.tolist() if isinstance(item, np.ndarray) else list(item) for item in items]


def _is_list(item: object) -> bool:
    return isinstance(item, (Sequence, np.ndarray)) and not isinstance(item, (str, bytes))


def _is_several(prompt: Prompt) -> bool:
    if prompt is None or isinstance(prompt, str):
        return False
    return isinstance(prompt[0], str) or _is_list(prompt[0])


def _wrong_kind(where: str, value: object) -> TypeError:
    kind = type(value).__name__
    return TypeError(f"complete: {where} must be text, token ids, or a list of either, got {kind}")


def _params(params: CompletionParams | None, fields: dict[str, Any]) -> CompletionParams:
    if params is None:
        return CompletionParams(**fields)
    if not isinstance(params, CompletionParams):
        kind = type(params).__name__
        raise TypeError(f"complete: params must be CompletionParams, got {kind}")
    if fields:
        raise TypeError(f"complete: params must be given alone, got {', '.join(fields)} as well")
    return params


def _completion(pieces: list[Piece], call: Call) -> Completion:
    choices = [as_choice(piece) for piece in sorted(pieces, key=lambda piece: piece.index)]
    return Completion(choices, call.usage, call.prompt_token_ids)


def _score(token_ids: list[int], piece: Piece) -> Score:
    logprobs = piece.logprobs
    assert logprobs is not None
    is_greedy = [
        None if value is None or top is None else value >= max(top.values())
        for value, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True)
    ]
    return Score(
        token_ids, logprobs.tokens, logprobs.token_logprobs, is_greedy, logprobs.text_offset
    )
