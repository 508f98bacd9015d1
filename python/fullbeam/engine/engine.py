# SPDX-License-Identifier: Apache-2.0
"""The engine: requests come in from any thread, one thread steps, results go to callbacks."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fullbeam._core import Stop
from fullbeam.checks import shown
from fullbeam.engine.decoder import Choice, Selector
from fullbeam.engine.drafts import DEFAULT_DRAFT_TOKENS
from fullbeam.engine.intake import Intake
from fullbeam.engine.pages import PagePool
from fullbeam.engine.rules import TokenIndex
from fullbeam.engine.runner import Decoder, Interrupted, Runner
from fullbeam.engine.scheduler import Scheduler, Work
from fullbeam.engine.sequence import Event, Finished, Request, RequestCancelled, Row
from fullbeam.engine.sequence import Sequence as TokenSequence
from fullbeam.engine.text import Piece, Tokenizer
from fullbeam.ops import Array
from fullbeam.params import CompletionParams

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What the engine is doing, and has done since its start."""

    num_waiting: int  # sequences that wait for rows or pages
    num_running: int  # sequences that have them
    num_rows: int  # choices that the running sequences decode
    num_pages: int
    num_used_pages: int
    num_cached_pages: int  # held by nobody, kept for prefix reuse
    num_computed_tokens: int
    num_reused_tokens: int  # prompt tokens spared by prefix reuse
    num_generated_tokens: int
    num_drafted_tokens: int  # guessed and computed ahead
    num_accepted_tokens: int  # of those: that held, each sparing its row a step
    num_preemptions: int
    num_prompt_tokens: int  # of all prompts that were queued
    num_cancelled: int  # prompts that were cancelled before they were done


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step under way."""

    works: list[Work]
    choice: Choice


class Engine:
    """Completes many prompts at once.

    Parameters
    ----------
    decoder, tokenizer
        The model; see `fullbeam.engine.runner.Decoder` and `fullbeam.engine.text.Tokenizer`.
    context
        Most tokens of a prompt and its completion together; None: what the model was made for.
    max_rows
        Most choices decoded at once.
    num_pages, page_size
        KV cache: pages, and tokens in each; `num_pages` None: enough for `max_rows` full contexts.
    token_budget
        Most tokens computed in a step, at least `max_rows`: prompts are cut into chunks.
    max_scored_tokens
        Most prompt tokens in a step whose logits are kept to be scored.
    draft_tokens
        Most tokens of a row that a step computes ahead, as guessed from what its prompt and text
        repeat; 0: none; None: 15 on the CPU, 0 on a GPU, where steps are started before the tokens
        of the one before are known, which drafts would need. Answers don't change; fewer are
        guessed, or none, where it would not pay.

    Notes
    -----
    `submit` and `cancel` may be called from any thread, `step` from one at a time. Callbacks are
    called by the thread that steps, or that submits or cancels, and must not block.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        *,
        context: int | None = None,
        max_rows: int = 16,
        num_pages: int | None = None,
        page_size: int = 16,
        token_budget: int = 512,
        max_scored_tokens: int = 64,
        draft_tokens: int | None = None,
    ) -> None:
        if draft_tokens is None:
            draft_tokens = 0 if decoder.device.runs_ahead else DEFAULT_DRAFT_TOKENS
        context = decoder.config.context_len if context is None else context
        _at_least("context", context, 1)
        _at_least("max_rows", max_rows, 1)
        _at_least("page_size", page_size, 1)
        _at_least("token_budget", token_budget, max_rows)
        _at_least("max_scored_tokens", max_scored_tokens, 1)
        _at_least("draft_tokens", draft_tokens, 0)
        max_pages_per_seq = -(-context // page_size)
        num_pages = max_rows * max_pages_per_seq if num_pages is None else num_pages
        _at_least("num_pages", num_pages, 1)
        self.context = context
        self.max_rows = max_rows
        self.is_prepared = False  # whether a search has nothing to wait for
        self.wake = threading.Event()  # set when there may be something to do
        self.tokenizer = tokenizer
        self._index = TokenIndex(tokenizer, decoder.config.vocab_size)
        self._device = decoder.device
        with self._device.active():
            kv = decoder.allocate_kv(num_pages, page_size)
        pool = PagePool(num_pages, page_size)
        self._intake = Intake(self._index, pool, context=context, max_rows=max_rows)
        self._scheduler = Scheduler(
            pool,
            copy_page=kv.copy_page,
            max_pages_per_seq=max_pages_per_seq,
            max_rows=max_rows,
            token_budget=token_budget,
            max_scored_tokens=max_scored_tokens,
            draft_tokens=draft_tokens,
            row_cost=decoder.row_cost,
        )
        self._runner = Runner(
            decoder,
            kv,
            page_size=page_size,
            max_pages_per_seq=max_pages_per_seq,
            max_seqs=max_rows,
            max_tokens=token_budget,
        )
        self._selector = Selector(decoder.device)
        self._runs_ahead = decoder.device.runs_ahead and draft_tokens == 0
        self._flight: _Flight | None = None
        self._requests: weakref.WeakSet[Request] = weakref.WeakSet()  # its own
        self._inbox: deque[tuple[Callable[[Request], None], Request]] = deque()
        self._lock = threading.Lock()  # held while the state below the inbox changes
        self._computing: set[Request] = set()  # what a step is for, without what was cancelled
        self._stop = Stop()  # of that step
        self._computing_lock = threading.Lock()
        self._is_closed = False
        self._num_computed_tokens = 0
        self._num_prompt_tokens = 0
        self._num_cancelled = 0

    def submit(
        self,
        prompt: str | Sequence[int] | None,
        params: CompletionParams | None = None,
        *,
        on_event: Callable[[Event], None],
        prompt_index: int = 0,
        stream: bool = False,
    ) -> Request:
        """Queue one prompt.

        Parameters
        ----------
        prompt
            Text, or token ids (taken as they are); "" and None: the start of a document.
        params
            How to complete it; None: the defaults.
        on_event
            Called with each `Piece`: one for each choice, or as text comes where `stream` is
            given (of a search, or with `best_of`, when all is done). A choice ends with the piece
            that has a `finish_reason`. The last event is `Finished`, or the exception with which
            the request failed or was cancelled.
        prompt_index
            Which of the caller's prompts this is: a key of the random draws, and part of
            `Piece.index`.

        Raises
        ------
        TypeError
            For an `on_event` that can't be called, or a prompt or params of another kind.
        ValueError
            For ids outside the vocabulary, a prompt that does not fit into the context
            (`ContextLengthError`), or a request that does not fit into the KV cache.
        RuntimeError
            When the engine is closed.
        """
        params = CompletionParams() if params is None else params
        if self._is_closed:
            raise RuntimeError("submit: the engine is closed")
        request = self._intake.request(
            prompt, params, on_event=on_event, prompt_index=prompt_index, stream=stream
        )
        self._requests.add(request)
        self._post(self._enter, request)
        return request

    def prepare(self) -> None:
        """Build what the first search would have to wait for; any thread may."""
        self._index.build()
        self.is_prepared = True

    def cancel(self, request: Request) -> None:
        """Stop a request and free its rows and pages, at once or when the step under way ends.

        A step that computes nothing for other requests ends after the op under way.

        Raises
        ------
        ValueError
            For what `submit` of this engine did not return.
        """
        if request not in self._requests:
            kind = type(request).__name__
            raise ValueError(f"cancel: request must be one of this engine's own, got {kind}")
        self._post(self._drop, request)
        with self._computing_lock:
            if request in self._computing:
                self._computing.discard(request)
                if not self._computing:
                    self._stop.set()

    def step(self) -> bool:
        """Compute the next tokens of whatever is running; return whether there was work."""
        with self._lock, self._device.active():
            busy = self._read_inbox()
            flight, self._flight = self._flight, None
            if flight is None:
                try:
                    works = self._scheduler.plan()
                except Exception as cause:
                    scheduler = self._scheduler
                    self._fail_all([*scheduler.running, *scheduler.waiting], cause)
                    return True
                if not works:
                    return busy
                flight = self._launch(works)
            if flight is not None:
                if self._runs_ahead and (ahead := self._scheduler.plan_ahead(flight.works)):
                    self._flight = self._launch(ahead, flight.choice.token_ids)
                self._land(flight)
            return True

    def generate(
        self, prompt: str | Sequence[int] | None, params: CompletionParams | None = None
    ) -> list[Piece]:
        """Complete one prompt by stepping here until it is done; return its choices in order."""
        events: list[Event] = []
        request = self.submit(prompt, params, on_event=events.append)
        try:
            while not request.closed:
                self.step()
        except BaseException:  # an interrupt, say
            self.cancel(request)
            raise
        pieces = []
        for event in events:
            if isinstance(event, Exception):
                raise event
            if isinstance(event, Piece):
                pieces.append(event)
        return sorted(pieces, key=lambda piece: piece.index)

    def close(self) -> None:
        """Cancel every request and accept no more."""
        self._is_closed = True
        with self._lock:
            self._flight = None
            self._read_inbox()
            scheduler = self._scheduler
            for sequence in [*scheduler.running, *scheduler.waiting]:
                self._drop(sequence.request)

    @property
    def device_name(self) -> str:
        """What computes: "cpu" or "cuda"."""
        return self._device.name

    @property
    def num_waiting(self) -> int:
        """Requests and sequences that are not running yet."""
        return len(self._inbox) + len(self._scheduler.waiting)

    def stats(self) -> EngineStats:
        """Return counts for monitoring; taken without stopping the engine."""
        scheduler = self._scheduler
        pool = scheduler.pool
        running = list(scheduler.running)
        return EngineStats(
            num_waiting=self.num_waiting,
            num_running=len(running),
            num_rows=sum(sequence.num_rows for sequence in running),
            num_pages=pool.num_pages,
            num_used_pages=pool.num_pages - pool.num_available,
            num_cached_pages=pool.num_cached,
            num_computed_tokens=self._num_computed_tokens,
            num_reused_tokens=scheduler.num_reused_tokens,
            num_generated_tokens=scheduler.num_generated_tokens,
            num_drafted_tokens=scheduler.num_drafted_tokens,
            num_accepted_tokens=scheduler.num_accepted_tokens,
            num_preemptions=scheduler.num_preemptions,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cancelled=self._num_cancelled,
        )

    def check(self) -> None:
        """Assert that pages and their references balance (for tests)."""
        scheduler = self._scheduler
        pages = [page for sequence in scheduler.running for page in sequence.held_pages()]
        scheduler.pool.check(pages)
        for sequence in scheduler.waiting:
            assert not sequence.held_pages(), "a waiting sequence holds pages"
        num_rows = sum(sequence.num_rows for sequence in scheduler.running)
        assert num_rows <= self.max_rows, "more rows run than allowed"

    def _post(self, action: Callable[[Request], None], request: Request) -> None:
        """Apply a change now if no step is under way, else before the next one."""
        self._inbox.append((action, request))
        if self._lock.acquire(blocking=False):
            try:
                self._read_inbox()
            finally:
                self._lock.release()
        self.wake.set()

    def _read_inbox(self) -> bool:
        busy = False
        while self._inbox:
            action, request = self._inbox.popleft()
            action(request)
            busy = True
        return busy

    def _enter(self, request: Request) -> None:
        self._num_prompt_tokens += request.num_prompt_tokens
        for sequence in request.sequences:
            if sequence.num_trunk_tokens == 0:  # nothing to compute
                sequence.finish_without_token()
                for row in sequence.rows:
                    self._report(row)
            else:
                self._scheduler.waiting.append(sequence)
        self._conclude(request)

    def _drop(self, request: Request) -> None:
        if not request.closed:
            self._num_cancelled += 1
            self._fail(request, RequestCancelled("the request was cancelled"))

    def _fail(self, request: Request, error: Exception) -> None:
        for sequence in request.sequences:
            self._scheduler.remove(sequence)
        if not request.closed:
            request.closed = True
            self._deliver(request, error)

    def _fail_all(self, sequences: list[TokenSequence], cause: Exception) -> None:
        _log.error("a step failed", exc_info=cause)
        for sequence in sequences:
            self._fail(sequence.request, _fault("the step failed", cause))

    def _launch(self, works: list[Work], drawn: Array | None = None) -> _Flight | None:
        """Start a step; `drawn` are the tokens of the step under way that this one goes on from."""
        stop = Stop()
        with self._computing_lock:
            self._stop = stop
            self._computing = {work.sequence.request for work in works}
        try:
            logits = self._runner.forward(works, stop, drawn)
            return _Flight(works, self._selector.start(works, logits, drawn))
        except Interrupted:
            return None  # all that was computed is about to be dropped
        except Exception as cause:
            self._fail_all([work.sequence for work in works], cause)
            return None

    def _land(self, flight: _Flight) -> None:
        """Wait for a step and take what came of it."""
        works = flight.works
        try:
            changed, done, failed = self._scheduler.commit(works, flight.choice.finish())
        except Exception as cause:
            self._fail_all([work.sequence for work in works], cause)
            return
        now = time.monotonic()
        most: dict[Request, int] = {}
        for work in works:
            request = work.sequence.request
            most[request] = max(most.get(request, 0), work.num_taken)
        for request, count in most.items():
            if count:
                request.note_tokens(now, count)
        self._num_computed_tokens += sum(work.count for work in works)
        for sequence in failed:
            self._fail(sequence.request, _no_token(sequence))
        for row in changed:
            if row.finish_reason is not None or row.sequence.request.stream:
                self._report(row)
        for request in dict.fromkeys(sequence.request for sequence in done):
            self._conclude(request)

    def _report(self, row: Row) -> None:
        """Deliver what is new of a choice; those that are chosen at the end wait for it."""
        request = row.sequence.request
        if request.closed or request.chooses_at_end:
            return
        try:
            piece = row.take_piece()
        except Exception as cause:
            self._fail(request, _fault("a result could not be put into text", cause))
            return
        if piece is not None:
            self._deliver(request, piece)

    def _conclude(self, request: Request) -> None:
        """Deliver the last of a request once all its sequences are done."""
        if request.closed or not all(sequence.is_done for sequence in request.sequences):
            return
        try:
            pieces = request.chosen_pieces() if request.chooses_at_end else []
        except Exception as cause:
            self._fail(request, _fault("a result could not be put into text", cause))
            return
        for piece in pieces:
            self._deliver(request, piece)
        if not request.closed:
            request.closed = True
            self._deliver(request, Finished(request.indices, request.num_generated))

    def _deliver(self, request: Request, event: Event) -> None:
        try:
            request.on_event(event)
        except Exception:
            _log.warning("a request is dropped: its receiver failed", exc_info=True)
            request.closed = True
            for sequence in request.sequences:
                self._scheduler.remove(sequence)


def _fault(what: str, cause: Exception) -> RuntimeError:
    error = RuntimeError(f"engine: {what}: {type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error


def _no_token(sequence: TokenSequence) -> Exception:
    """Return why none could be drawn: what the caller asked for leaves none, or a fault."""
    request = sequence.request
    masks = [row.masks([])[0] for row in sequence.rows]
    if all(mask is None or mask.any() for mask in masks):
        return RuntimeError("engine: no token can follow: the model gave no finite logit")
    names = ("allowed_token_ids", "bad_words", "prefix", "token_healing", "min_tokens")
    first, *others = [name for name in names if getattr(request.params, name)]
    beside = f" beside {', '.join(others)}" if others else ""
    return ValueError(f"complete: {first} must leave a token that can follow{beside}")


def _at_least(name: str, value: Any, bound: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"Engine: {name} must be an integer, got {type(value).__name__}")
    if value < bound:
        raise ValueError(f"Engine: {name} must be at least {bound}, got {shown(value)}")
