"""Watch the GCS, the process that a Ray cluster cannot do without.

A minute after the GCS has gone, Ray ends the processes that are connected to it, the caller's too. The watch tells
before, so that calls raise an error, and the process disconnects and lives.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PROBE_SECONDS = 2.0  # between probes, and the timeout of one
PATIENCE_SECONDS = 6.0  # without an answer, after which the GCS is lost: one that restarts is back sooner
DISCONNECT_SECONDS = 30.0  # for which the connection waits for calls to end
NAME = "xlstm-ops-ray-watch"

_log = logging.getLogger("torch_xlstm_ops.ray")


class GcsWatch:
    """A thread that probes the GCS of the process's connection; starts it."""

    def __init__(self, address: str, disconnect: Callable[[], None]) -> None:
        """address: host:port of the GCS. disconnect: called on the thread once the GCS is lost and no call waits."""
        self._address, self._disconnect = address, disconnect
        self._calls = 0
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self.lost = False
        self._thread = threading.Thread(target=self._run, name=NAME, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join(2 * PROBE_SECONDS)

    @contextmanager
    def call(self) -> Iterator[None]:
        """Have `disconnect` wait, for a while, for a ``with`` block that uses the connection.

        Raises RuntimeError if the GCS is lost, also in place of an error of Ray's that comes of it.
        """
        with self._changed:
            self.check()
            self._calls += 1
        try:
            yield
        except Exception:
            self.check()
            raise
        finally:
            with self._changed:
                self._calls -= 1
                self._changed.notify_all()

    def check(self) -> None:
        """Raise RuntimeError if the GCS is lost."""
        if self.lost:
            raise RuntimeError(f"Ray's GCS at {self._address} has not answered for {PATIENCE_SECONDS:g} s: start Ray "
                               "again; the next call connects anew")

    def wait_for_answer(self) -> None:
        """Return once the GCS answers: a request would block for a minute. Raises RuntimeError if it is lost.

        Returns at once after `stop`.
        """
        while not self._stop.is_set() and not self._answers():
            self.check()
            time.sleep(0.1)
        self.check()

    def _run(self) -> None:
        answered = time.monotonic()
        while not self._stop.wait(PROBE_SECONDS):
            if self._answers():
                answered = time.monotonic()
            elif time.monotonic() - answered > PATIENCE_SECONDS:
                break
        else:
            return
        _log.warning("Ray's GCS at %s does not answer: disconnecting", self._address)
        with self._changed:
            self.lost = True
            self._changed.wait_for(lambda: not self._calls, DISCONNECT_SECONDS)
        if not self._stop.is_set():
            self._disconnect()

    def _answers(self) -> bool:
        host, _, port = self._address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=PROBE_SECONDS).close()
        except OSError:
            return False
        return True
