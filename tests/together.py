"""Threads that a test waits for, with a limit: one that is stuck fails its test and holds up nothing else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

SECONDS = 120.0


def start(work: Callable[[], object], seconds: float = SECONDS) -> Callable[[], None]:
    """Run `work` in a thread; return what waits for its end and raises what it raised."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def wait() -> None:
        thread.join(seconds)
        if errors:
            raise errors[0]
        if thread.is_alive():
            raise TimeoutError(f"a thread must end within {seconds:g} s, {thread.name} has not")

    return wait


def run(works: Sequence[Callable[[], object]], seconds: float = SECONDS) -> None:
    """Run works in a thread each, and wait for all of them."""
    for wait in [start(work, seconds) for work in works]:
        wait()


def until(law: Callable[[], Any], seconds: float = SECONDS) -> None:
    """Return when a law holds; raise TimeoutError if it does not within the limit."""
    end = time.monotonic() + seconds
    while not law():
        if time.monotonic() > end:
            raise TimeoutError(f"a law must hold within {seconds:g} s, it does not")
        time.sleep(0.05)
