"""Snapshots in a folder that many processes share: every file whole and checked, and never more bytes than allowed.

A file is named after what it holds (tokens read, their digest, the size of the pieces) and never changes, so whoever
lists the folder has the index, and reading takes no lock. Writers take turns behind one lock, which the system lets
go of when a process dies: what such a process left unfinished is removed by the next one.
"""

from __future__ import annotations

import os
import time
import warnings
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

from torch_xlstm_ops.context import codec
from torch_xlstm_ops.context.codec import Damaged, Packed
from torch_xlstm_ops.context.pool.file_names import Name, check_name, name_of, parse
from torch_xlstm_ops.context.pool.memory import Usage
from torch_xlstm_ops.context.tokens import Digest

PATIENCE = 30.0  # seconds that a writer waits for the others


class Entry(NamedTuple):
    """A file in the folder."""

    name: Name
    size: int
    used: float  # when it was last written or read, in seconds since 1970
    pinned: bool

    @property
    def identity(self) -> str:
        """Return the identity of the model whose state this is."""
        return self.name.path.parent.name


class _NoRoom(Exception):
    """What may go is not enough."""


class Disk:
    """A folder of snapshots of any models, at most `budget` bytes of them; None leaves it as it is."""

    def __init__(self, folder: Path, budget: int | None = None) -> None:
        self.folder, self.budget = folder, budget

    def names(self, identity: str) -> list[Name]:
        """Return what is there of a model."""
        try:
            found = [parse(Path(entry.path)) for entry in os.scandir(self.folder / identity)]
        except OSError:  # nothing yet, or nothing that we may see
            return []
        return [name for name in found if name is not None]

    def matching(self, identity: str, tokens: array[int]) -> list[Name]:
        """Return what was read of beginnings of `tokens`, the longest first."""
        by_position: dict[int, list[Name]] = {}
        for name in self.names(identity):
            by_position.setdefault(name.position, []).append(name)
        found, seen, at = [], Digest(), 0
        for position in sorted(position for position in by_position if position <= len(tokens)):
            seen.add(tokens[at:position])
            at, digest = position, seen.hex()
            found += [name for name in by_position[position] if name.digest == digest]
        return found[::-1]

    def get(self, name: Name) -> Packed | None:
        """Return what a file holds; None if it is gone, or damaged, which a warning says before it is removed."""
        try:
            packed = codec.from_file(name.path)
            check_name(packed, name)
        except Damaged as error:
            warnings.warn(f"a state is read again from its tokens: {error}", RuntimeWarning, stacklevel=4)
            self.remove(name)
            return None
        except OSError:
            return None
        _touched(name)
        return packed

    def put(self, packed: Packed, *, pin: bool = False) -> bool:
        """Write a snapshot, and remove the least recently used to make room; return whether it is there.

        Where that is impossible a warning says why.
        """
        name = name_of(self.folder, packed)
        if not pin and _touched(name):
            return True
        try:
            self._write(name, codec.to_file(packed), pin)
        except _NoRoom as error:
            _say(str(error), self.folder)
            return False
        except OSError as error:
            _say(error.strerror or str(error), self.folder)
            return False
        return True

    def _write(self, name: Name, content: bytes, pin: bool) -> None:
        with self._lock():
            if not _touched(name):
                self._make_room(len(content))
                name.path.parent.mkdir(exist_ok=True)
                codec.write_whole(name.path, content)
            if pin:
                name.set_pin(True)

    def _make_room(self, size: int) -> None:
        if self.budget is not None:
            self._shrink(self.budget - size)
            if self.usage().bytes + size > self.budget:
                raise _NoRoom(f"its {size} bytes and what is pinned are more than {self.budget}")

    def entries(self) -> list[Entry]:
        """Return all files, the least recently used first."""
        found = []
        for folder in self._folders():
            for name in self.names(folder.name):
                with suppress(FileNotFoundError):  # another process was faster
                    about = name.path.stat()
                    found.append(Entry(name, about.st_size, about.st_mtime, name.pin.exists()))
        return sorted(found, key=lambda entry: entry.used)

    def usage(self) -> Usage:
        """Return what is there."""
        entries = self.entries()
        return Usage(len(entries), sum(entry.pinned for entry in entries), sum(entry.size for entry in entries),
                     self.budget or 0)

    def prune(self, budget: int) -> list[Entry]:
        """Remove the least recently used that are not pinned until `budget` bytes are left; return them.

        Raises OSError when the folder cannot be written.
        """
        with self._lock():
            return self._shrink(budget)

    def verify(self) -> Iterator[tuple[Entry, str | None]]:
        """Yield every file with what is wrong with it; nothing is removed."""
        for entry in self.entries():
            try:
                check_name(codec.from_file(entry.name.path), entry.name)
            except FileNotFoundError:
                continue
            except (Damaged, OSError) as error:
                yield entry, str(error)
            else:
                yield entry, None

    def _shrink(self, budget: int) -> list[Entry]:
        """Do what `prune` does, behind the lock, and sweep up what dead writers left."""
        for folder in self._folders():
            for partial in folder.glob(".*.partial"):
                partial.unlink(missing_ok=True)
        entries = self.entries()
        total, removed = sum(entry.size for entry in entries), []
        for entry in entries:
            if total <= budget:
                break
            if not entry.pinned:
                self.remove(entry.name)
                removed.append(entry)
                total -= entry.size
        return removed

    def remove(self, name: Name) -> None:
        """Remove a file and its pin, where that is allowed."""
        with suppress(OSError):
            name.path.unlink(missing_ok=True)
            name.pin.unlink(missing_ok=True)

    def _folders(self) -> list[Path]:
        try:
            return [path for path in self.folder.iterdir() if path.is_dir()]
        except OSError:
            return []

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Be the only writer, in all processes and threads. Raises OSError, TimeoutError when others do not let go."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "ab") as file:
            end = time.monotonic() + PATIENCE
            while not _try_lock(file):
                if time.monotonic() > end:
                    raise TimeoutError(f"another process has been writing for {PATIENCE:.0f} s")
                time.sleep(0.002)
            yield  # closing the file unlocks it


def _touched(name: Name) -> bool:
    """Make a file the most recently used, where that is allowed, and return whether it is there."""
    try:
        os.utime(name.path)
    except OSError:  # gone, or in a folder that we may only read
        return name.path.exists()
    return True


def _try_lock(file: IO[bytes]) -> bool:
    try:
        if os.name == "posix":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except (BlockingIOError, PermissionError):
        return False
    return True


def _say(reason: str, folder: Path) -> None:
    warnings.warn(f"a state must be kept in {folder}, and is not: {reason}", RuntimeWarning, stacklevel=4)
