# SPDX-License-Identifier: Apache-2.0
"""The thread that steps an engine."""

from __future__ import annotations

import os
import threading

from fullbeam.engine.engine import Engine


class EngineLoop:
    """Steps an engine in a thread of its own, asleep while there is nothing to do."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._thread: threading.Thread | None = None
        self._pid = 0  # of the process that has the thread
        self._stopping = False
        self._lock = threading.Lock()

    def check_process(self) -> None:
        """Refuse work in a child forked while the thread ran: it has no such thread."""
        if self._thread is not None and self._pid != os.getpid():
            raise RuntimeError("submit: the model was used before this process was forked: load it")

    def start(self) -> None:
        """Start the thread, if it is not running."""
        with self._lock:
            if self._thread is None and not self._stopping:
                self._thread = threading.Thread(
                    target=self._loop, name="fullbeam-engine", daemon=True
                )
                self._pid = os.getpid()
                self._thread.start()

    def stop(self) -> None:
        """Let the step under way end, cancel what is left, and end the thread."""
        with self._lock:
            self._stopping = True
            thread = self._thread
        self._engine.wake.set()
        if thread is None:
            self._engine.close()
        elif thread is not threading.current_thread():
            thread.join()

    def _loop(self) -> None:
        engine = self._engine
        while not self._stopping:
            engine.wake.clear()
            if not engine.step():
                engine.wake.wait()
        engine.close()
