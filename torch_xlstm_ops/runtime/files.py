"""Replace files atomically, and lock them between processes and threads."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal, TextIO, overload

LOCK_WAIT_S = 30.0
PARTIAL = ".partial"  # how the hidden files that are being written end
_LOCK_FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


@overload
def replacing(
    path: str | Path, mode: Literal["w"] = "w", *, durable: bool = False
) -> AbstractContextManager[TextIO]: ...


@overload
def replacing(path: str | Path, mode: Literal["wb"], *, durable: bool = False) -> AbstractContextManager[BinaryIO]: ...


@contextmanager
def replacing(path: str | Path, mode: str = "w", *, durable: bool = False) -> Iterator[Any]:
    """Open a file that takes the place of `path` when the block ends; if the block raises, `path` keeps its content.

    A `path` that is a link stays one: the file that it names is replaced. The content is written to a hidden file in
    the same folder, under a random name.

    mode: "w" for UTF-8 text with line ends as written, "wb" for bytes.
    durable: also flush the file and its folder to the disk, so that the content survives a power cut.

    Raises OSError if the file cannot be written.
    """
    target = os.path.realpath(path)
    folder, name = os.path.split(target)
    partial = os.path.join(folder, f".{name[:100]}.{os.urandom(8).hex()}{PARTIAL}")
    encoding, newline = (None, None) if "b" in mode else ("utf-8", "")
    # Mode "x" fails for a file or link that is already there.
    with open(partial, mode.replace("w", "x"), encoding=encoding, newline=newline) as file:
        try:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
            file.close()
            os.replace(partial, target)
        except BaseException as error:
            with suppress(OSError):
                file.close()  # Windows does not delete an open file
            with suppress(FileNotFoundError):
                os.remove(partial)
            if isinstance(error, OSError) and error.filename is None:
                error.filename = os.fspath(path)  # a full disk is told without
            raise
    if durable:
        _flush_folder(folder)


def check_file(name: str, path: str) -> None:
    """Raise ValueError, naming the argument `name`, unless the file at `path` can be written."""
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path):
        raise ValueError(f"{name} must be a file that can be written, got {path!r}, which is a directory")
    if not os.path.isdir(folder):
        raise ValueError(f"{name} must be a file that can be written, got {path!r}, whose directory is not there")
    if not all(os.access(place, os.W_OK) for place in (folder, path) if os.path.exists(place)):
        raise ValueError(f"{name} must be a file that can be written, got {path!r}, which permissions forbid")


def _flush_folder(folder: str) -> None:
    """Make a folder's names survive a power cut, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def locked(lock: str | Path, seconds: float = LOCK_WAIT_S) -> Iterator[None]:
    """Hold a lock file inside a ``with`` block; the system releases it when the process ends in any way.

    Raises OSError if the file cannot be created, TimeoutError if another holds the lock for `seconds`.
    """
    end = time.monotonic() + seconds
    while (handle := _try_lock(lock)) is None:
        if time.monotonic() > end:
            raise TimeoutError(f"{lock} is still locked by another process after {seconds:g} s: wait until it ends")
        time.sleep(0.002)
    try:
        yield
    finally:
        with suppress(OSError):  # Windows does not delete an open file
            os.remove(lock)
        os.close(handle)


def _try_lock(lock: str | Path) -> int | None:
    """Return the handle of the lock file, locked, or None if another holds it."""
    handle = os.open(lock, _LOCK_FLAGS, 0o666)
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
