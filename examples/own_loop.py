# SPDX-License-Identifier: Apache-2.0
"""A server that owns its loop: it decides what runs and when, and the engine computes it.

    python examples/own_loop.py [MODEL]

Requests have a time to arrive and a deadline. One that finds no rows or pages is held, in order;
where too many are held already it is refused. Texts stream into queues, which never make a step
wait for a client. Ctrl-C lets what was accepted end within `grace_s`.
"""

import queue
import signal
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from functools import partial

from fullbeam import CompletionParams, Engine, Piece
from fullbeam.models import open_model
from fullbeam.models.catalog import resolve


@dataclass(eq=False)
class Job:
    """A request. `state` becomes "done", "late", "refused" or "failed"."""

    prompt: str
    params: CompletionParams
    arrives_at: float  # in seconds of the loop's clock, as are the others
    deadline: float
    events: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)  # None comes last
    prompt_ids: list[int] | None = None
    state: str = "held"
    started_at: float | None = None
    first_text_at: float | None = None
    ended_at: float | None = None
    num_pages: int = 0  # that it may come to hold
    request: object = None


class Loop:
    """Drives an engine by a clock of its own.

    Parameters
    ----------
    page_size : the engine's
    max_held : most jobs that wait for rows or pages
    grace_s : how long jobs may go on after `stop`
    """

    def __init__(
        self, engine, *, page_size=16, max_held=4, grace_s=5.0, clock=time.monotonic, sleep=None
    ):
        self.engine, self.page_size, self.max_held = engine, page_size, max_held
        self.grace_s, self.clock = grace_s, clock
        self.wake = threading.Event()
        self.sleep = sleep or self.wake.wait
        self.held, self.running = deque(), set()
        self.stops_at = float("inf")

    def stop(self):
        """Accept no more; any thread may, or a signal handler."""
        self.stops_at = min(self.stops_at, self.clock() + self.grace_s)
        self.wake.set()

    def run(self, jobs):
        """Serve jobs until all have ended, then close the engine."""
        coming = deque(sorted(jobs, key=lambda job: job.arrives_at))
        try:
            while coming or self.held or self.running:
                now = self.clock()
                self.drop_late(now)
                self.look_for_room()
                self.admit()
                while coming and (coming[0].arrives_at <= now or self.stops_at < float("inf")):
                    self.accept(coming.popleft())
                    self.admit()
                if not self.engine.step() and coming:  # nothing is held or running either
                    self.sleep(max(0.0, coming[0].arrives_at - self.clock()))
        finally:
            self.engine.close()  # whatever happened, no client waits for ever
            for job in [*self.held, *coming]:
                self.refuse(job)

    def drop_late(self, now):
        for job in [*self.held, *self.running]:
            if min(job.deadline, self.stops_at) <= now:
                job.state = "late"
                if job.request is not None:
                    self.engine.cancel(job.request)  # its last event comes to on_event
                else:
                    self.held.remove(job)
                    self.end(job)

    def look_for_room(self):
        """Rows and pages to give away in this turn: none while somebody waits in the engine."""
        stats = self.engine.stats()
        promised = sum(job.num_pages for job in self.running)
        self.free_pages = stats.num_pages - max(promised, stats.num_used_pages)
        self.free_rows = 0 if stats.num_waiting else self.engine.max_rows - stats.num_rows

    def accept(self, job):
        if self.stops_at < float("inf") or len(self.held) >= self.max_held:
            self.refuse(job)
        else:
            job.prompt_ids = self.engine.tokenizer.encode(job.prompt)
            self.held.append(job)

    def refuse(self, job):
        job.state = "refused"
        self.end(job)

    def admit(self):
        """Submit held jobs, in order, for as long as there is room."""
        while self.held:
            job, params = self.held[0], self.held[0].params
            num_rows = params.width or params.num_candidates
            job.num_pages = -(-len(job.prompt_ids) // self.page_size)
            job.num_pages += num_rows * (-(-(params.max_tokens or 16) // self.page_size) + 1)
            has_room = num_rows <= self.free_rows and job.num_pages <= self.free_pages
            if not has_room and self.running:
                return
            self.held.popleft()  # an empty engine serves what is too large bit by bit, or refuses
            self.submit(job)
            self.free_rows -= num_rows
            self.free_pages -= job.num_pages

    def submit(self, job):
        job.state, job.started_at = "running", self.clock()
        self.running.add(job)
        ids, on_event = job.prompt_ids, partial(self.on_event, job)
        try:
            job.request = self.engine.submit(ids, job.params, on_event=on_event, stream=True)
        except ValueError as error:
            self.on_event(job, error)

    def on_event(self, job, event):
        """Called within a step: takes note, hands the text on, returns."""
        if isinstance(event, Piece):
            if job.first_text_at is None:
                job.first_text_at = self.clock()
            job.events.put(event)
            return
        if job.state == "running":
            job.state = "failed" if isinstance(event, Exception) else "done"
        self.running.discard(job)
        self.end(job)

    def end(self, job):
        job.ended_at = self.clock()
        job.events.put(None)


def read_slowly(job, texts):
    """A client, of the first choice."""
    for piece in iter(job.events.get, None):
        if piece.index == 0:
            texts[job] = texts.get(job, "") + piece.text
        time.sleep(0.01)


def main(model=None):
    opened = open_model(resolve(model))
    engine = Engine(opened.decoder, opened.tokenizer, context=256, max_rows=4, num_pages=32)
    loop = Loop(engine)
    signal.signal(signal.SIGINT, lambda *_: loop.stop())
    prompts = ["def add(a, b):", "SELECT name FROM", "Once upon a time", "The capital of France is"]
    start, jobs, texts = time.monotonic(), [], {}
    for idx in range(16):
        params = CompletionParams(max_tokens=32, seed=idx, n=1 + idx % 2)
        arrives_at = start + 0.1 * idx
        deadline = arrives_at + (0.4 if idx % 5 == 4 else 20)
        jobs.append(Job(prompts[idx % len(prompts)], params, arrives_at, deadline))
    clients = [threading.Thread(target=read_slowly, args=(job, texts)) for job in jobs]
    for client in clients:
        client.start()
    loop.run(jobs)
    for client in clients:
        client.join()
    print("arrived  state     held  first text  whole   text")
    for job in jobs:
        times = (job.started_at, job.first_text_at, job.ended_at)
        held, first, whole = (f"{t - job.arrives_at:.2f}" if t else "-" for t in times)
        line = f"{job.arrives_at - start:7.2f}  {job.state:8} {held:>5} {first:>11} {whole:>6}"
        print(line, " ", repr(texts.get(job, ""))[:40])


if __name__ == "__main__":
    main(*sys.argv[1:])
