"""An exclusive lock between processes and threads, by a file that is there while the lock is held."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

WAIT_S = 30.0
_FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


@contextmanager
def locked(lock: str | Path, seconds: float = WAIT_S) -> Iterator[None]:
    """Hold a lock file inside a ``with`` block; the system releases it when the process ends in any way.

    Raises OSError if the file cannot be created, TimeoutError if another holds the lock for `seconds`.
    """
    end = time.monotonic() + seconds
    while (handle := _try_lock(lock)) is None:
        if time.monotonic() > end:
            raise TimeoutError(f"{lock} is still locked by another process after {seconds:g} s")
        time.sleep(0.002)
    try:
        yield
    finally:
        with suppress(OSError):  # Windows does not delete an open file
            os.remove(lock)
        os.close(handle)


def _try_lock(lock: str | Path) -> int | None:
    """Return the handle of the lock file, locked, or None if another holds it."""
    handle = os.open(lock, _FLAGS, 0o666)
    held = False
    try:
        with suppress(BlockingIOError, PermissionError, FileNotFoundError):
            _lock_now(handle)
            held = os.path.samestat(os.fstat(handle), os.stat(lock))  # else the last holder deleted it meanwhile
    finally:
        if not held:
            os.close(handle)
    return handle if held else None


def _lock_now(handle: int) -> None:
    if os.name == "posix":
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        import msvcrt

        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
