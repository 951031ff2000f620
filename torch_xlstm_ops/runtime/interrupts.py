"""Hold Ctrl-C back where it would leave the process broken, as in the middle of an import."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def deferred() -> Iterator[None]:
    """Handle the first SIGINT of a ``with`` block at its end; a second one at once.

    Does nothing on other threads than the main one, which get no signals, or without a handler of Python's.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    received: list[FrameType | None] = []

    def wait(number: int, frame: FrameType | None) -> None:
        received.append(frame)
        if len(received) > 1:
            before(number, frame)

    signal.signal(signal.SIGINT, wait)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if len(received) == 1:
            before(signal.SIGINT, received[0])
