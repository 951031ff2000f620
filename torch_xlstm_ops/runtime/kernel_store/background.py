"""Work that follows a call and that no call waits for: one thread does it, in order, and ends when nothing is left.

The thread has the priority of its process. It computes Python for a few tens of milliseconds, under the GIL, and a
caller that waits for the GIL would wait longer for a thread of low priority.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from torch_xlstm_ops.runtime import forks
from torch_xlstm_ops.runtime.state import on_reset

MOST = 64  # jobs that wait; the caller does a further one itself
AT_EXIT_S = 10.0  # that the end of the process waits for jobs

Job = Callable[[], object]


class Background:
    """Jobs, and the thread that does them; a forked child begins with neither.

    most: number of jobs that wait at the same time.
    """

    def __init__(self, most: int = MOST) -> None:
        self._most, self._lock = most, forks.new_lock()
        self.forget()

    def forget(self) -> None:
        """Begin anew, in a forked child: the parent does its jobs itself."""
        self._waiting: deque[Job] = deque()
        self._thread: threading.Thread | None = None

    def later(self, job: Job) -> None:
        """Do a job soon; at once if too many wait, or if the process is about to end."""
        with self._lock:
            taken = len(self._waiting) < self._most and (self._thread is not None or self._start())
            if taken:
                self._waiting.append(job)
        if not taken:
            job()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until every job is done, at most for some seconds; return whether that is so."""
        end = None if seconds is None else time.monotonic() + seconds
        while (thread := self._running()) is not None:
            thread.join(None if end is None else max(0.0, end - time.monotonic()))
            if thread.is_alive():
                return False
        return True

    def drop(self) -> None:
        """Drop the jobs that have not begun, and wait for the one that has."""
        with self._lock:
            self._waiting.clear()
        self.wait(AT_EXIT_S)

    def _running(self) -> threading.Thread | None:
        with self._lock:
            return None if self._thread is threading.current_thread() else self._thread

    def _start(self) -> bool:
        """Start the thread, with `_lock` held; return whether that was possible."""
        thread = threading.Thread(target=self._work, name="xlstm-ops-background", daemon=True)
        self._thread = thread
        try:
            thread.start()
        except RuntimeError:  # the interpreter shuts down, or there are too many threads
            self._thread = None
        return self._thread is not None

    def _work(self) -> None:
        """Do jobs until none waits; after an error, which is reported as of any thread, another thread goes on."""
        try:
            while (job := self._next()) is not None:
                job()
        except BaseException:
            with self._lock:
                self._thread = None
                if self._waiting:
                    self._start()
            raise

    def _next(self) -> Job | None:
        with self._lock:
            if self._waiting:
                return self._waiting.popleft()
            self._thread = None
            return None


background = Background()
forks.in_child(background.forget)
on_reset(background.drop)


@atexit.register
def _finish() -> None:
    with suppress(KeyboardInterrupt):
        background.wait(AT_EXIT_S)
