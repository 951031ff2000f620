"""Snapshots in a folder that many processes share: complete, checked files within a budget of bytes.

A file is named after what it holds (tokens read, their digest, tokens per piece) and never changes, so a listing of
the folder is the index, and reading takes no lock. Writers hold one lock, which the system releases when a process
dies; the next writer removes what such a process left unfinished. Links are never followed out of the folder.
"""

from __future__ import annotations

import os
import stat
import warnings
from array import array
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import NamedTuple

from torch_xlstm_ops.context import codec, state_file
from torch_xlstm_ops.context.codec import EncodedSnapshot
from torch_xlstm_ops.context.pool.file_names import StateName, check_name, name_of, parse
from torch_xlstm_ops.context.pool.memory import Usage
from torch_xlstm_ops.context.state_file import DamagedFile
from torch_xlstm_ops.context.states import Snapshot
from torch_xlstm_ops.context.tokens import TokenDigest
from torch_xlstm_ops.runtime.files import PARTIAL, locked

LOCK_TIMEOUT_SECONDS = 30.0


class DiskEntry(NamedTuple):
    """A file in the folder."""

    name: StateName
    size: int
    used: float  # when it was last written or read, in seconds since 1970
    pinned: bool

    @property
    def identity(self) -> str:
        """Return the identity of the model whose state this is."""
        return self.name.path.parent.name


class _NoRoom(Exception):
    """Pinned states and the new one are more than the budget."""


class DiskTier:
    """A folder of snapshots of any models, evicted to `budget` bytes, the least recently used first.

    budget: default None, no limit and no eviction.
    """

    def __init__(self, folder: Path, budget: int | None = None) -> None:
        self.folder, self.budget = folder, budget

    def names(self, identity: str) -> list[StateName]:
        """Return the states of a model."""
        folder = self.folder / identity
        if folder.is_symlink():
            return []
        try:
            found = [parse(Path(entry.path)) for entry in os.scandir(folder)]
        except OSError:  # not there, or not readable
            return []
        return [name for name in found if name is not None]

    def matching(self, identity: str, tokens: array[int]) -> list[StateName]:
        """Return the states of prefixes of `tokens`, the longest first."""
        by_position: dict[int, list[StateName]] = {}
        for name in self.names(identity):
            by_position.setdefault(name.position, []).append(name)
        found, seen, at = [], TokenDigest(), 0
        for position in sorted(position for position in by_position if position <= len(tokens)):
            seen.add(tokens[at:position])
            at, digest = position, seen.hex()
            found += [name for name in by_position[position] if name.digest == digest]
        return found[::-1]

    def get(self, name: StateName, outline: Snapshot | None = None) -> EncodedSnapshot | None:
        """Return the snapshot in a file, None if it is gone; a damaged file is removed, with a warning.

        outline: of the model whose states the snapshot must fit; default any model.
        """
        try:
            most = state_file.MAX_BYTES if outline is None else state_file.max_bytes(outline)
            encoded = state_file.read(name.path, most, follow_links=False)
            check_name(encoded, name)
            if outline is not None and (wrong := codec.mismatch(encoded, outline)) is not None:
                raise DamagedFile(f"{name.path} does not fit the model: {wrong}")
        except DamagedFile as error:
            warnings.warn(f"removed a damaged state, its tokens are read again: {error}", RuntimeWarning, stacklevel=4)
            self.remove(name)
            return None
        except FileNotFoundError:  # another process removed it
            return None
        except OSError as error:
            warnings.warn(f"could not read the state {name.path}, its tokens are read again: {error.strerror}",
                          RuntimeWarning, stacklevel=4)
            return None
        _mark_used(name)
        return encoded

    def put(self, encoded: EncodedSnapshot, *, pin: bool = False) -> bool:
        """Write a snapshot, and evict the least recently used to make room; return whether it is there.

        A warning says why it is not.
        """
        name = name_of(self.folder, encoded)
        if not pin and _mark_used(name):
            return True
        try:
            self._write(name, state_file.to_bytes(encoded), pin)
        except (_NoRoom, OSError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            warnings.warn(f"could not save a state to {self.folder}: {reason}", RuntimeWarning, stacklevel=3)
            return False
        return True

    def _write(self, name: StateName, content: bytes, pin: bool) -> None:
        with self.lock():
            if not _mark_used(name):
                self._make_room(len(content))
                name.path.parent.mkdir(exist_ok=True)
                if name.path.parent.is_symlink():
                    raise NotADirectoryError(f"{name.path.parent} is a link")
                if name.path.is_symlink():  # else the file that it names would be replaced
                    name.path.unlink()
                state_file.write(name.path, content)
            if pin:
                name.set_pin(True)

    def _make_room(self, size: int) -> None:
        if self.budget is not None:
            self._evict(self.budget - size)
            if self.usage().bytes + size > self.budget:
                raise _NoRoom(f"its {size} bytes and the pinned states are more than the budget of {self.budget}; "
                              "unpin some, or give the pool more")

    def entries(self) -> list[DiskEntry]:
        """Return all files, the least recently used first."""
        found = []
        for folder in self._folders():
            for name in self.names(folder.name):
                with suppress(FileNotFoundError):  # another process removed it
                    about = name.path.lstat()
                    found.append(DiskEntry(name, about.st_size, about.st_mtime, name.pin.exists()))
        return sorted(found, key=lambda entry: entry.used)

    def usage(self) -> Usage:
        """Return what the folder holds."""
        entries = self.entries()
        return Usage(len(entries), sum(entry.pinned for entry in entries), sum(entry.size for entry in entries),
                     self.budget or 0)

    def prune(self, budget: int) -> list[DiskEntry]:
        """Remove the least recently used that are not pinned until `budget` bytes are left; return them.

        Raises OSError if the folder cannot be written.
        """
        with self.lock():
            return self._evict(budget)

    def verify(self) -> Iterator[tuple[DiskEntry, str | None]]:
        """Yield every file and what is wrong with it, or None; nothing is removed."""
        for entry in self.entries():
            try:
                check_name(state_file.read(entry.name.path, follow_links=False), entry.name)
            except FileNotFoundError:
                continue
            except (DamagedFile, OSError) as error:
                yield entry, str(error)
            else:
                yield entry, None

    def _evict(self, budget: int) -> list[DiskEntry]:
        """Do what `prune` does, with the lock held, and remove what dead writers left unfinished."""
        for folder in self._folders():
            for partial in folder.glob(f".*{PARTIAL}"):
                if partial.is_symlink() or not partial.is_dir():
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

    def remove(self, name: StateName) -> None:
        """Remove a file and its pin, if permissions allow it; a folder of that name is renamed, with its content."""
        with suppress(OSError):
            if name.path.is_dir() and not name.path.is_symlink():
                name.path.rename(name.path.with_name(f".{name.path.name}.{os.urandom(8).hex()}.aside"))
            name.path.unlink(missing_ok=True)
            name.pin.unlink(missing_ok=True)

    def _folders(self) -> list[Path]:
        try:
            return [path for path in self.folder.iterdir() if path.is_dir() and not path.is_symlink()]
        except OSError:
            return []

    def lock(self) -> AbstractContextManager[None]:
        """Return a context manager that makes this the only writer, in all processes and threads.

        Raises OSError, TimeoutError if others hold the lock for LOCK_TIMEOUT_SECONDS.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        return locked(self.folder / ".lock", LOCK_TIMEOUT_SECONDS)


def _mark_used(name: StateName) -> bool:
    """Make a file the most recently used, if permissions allow it, and return whether it is there."""
    try:
        if name.path.parent.is_symlink() or not stat.S_ISREG(name.path.lstat().st_mode):
            return False
    except OSError:  # gone
        return False
    with suppress(OSError):
        os.utime(name.path)
    return True
