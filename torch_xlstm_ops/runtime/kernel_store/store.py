"""A folder of packages: find one, keep one within a bound of bytes, list and check them."""

from __future__ import annotations

import functools
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from torch_xlstm_ops.runtime import torch_internals
from torch_xlstm_ops.runtime.files import PARTIAL
from torch_xlstm_ops.runtime.kernel_store import conditions, identity, package, trust
from torch_xlstm_ops.runtime.kernel_store.after_call import AfterCall
from torch_xlstm_ops.runtime.kernel_store.background import background
from torch_xlstm_ops.runtime.kernel_store.identity import Request
from torch_xlstm_ops.runtime.kernel_store.package import Damaged, Package
from torch_xlstm_ops.runtime.state import warn_once

CAPACITY = 512 << 20  # bytes that a store may have
ABANDONED_S = 3600.0  # age of a partial package whose writer must have ended
_KEY = re.compile(r"[0-9a-f]{40}")


class Found(NamedTuple):
    """A kept function, and a test for sizes of its free axes."""

    call: torch_internals.Raw
    admits: torch_internals.Admits


class Entry(NamedTuple):
    """One package in the folder."""

    key: str
    size: int  # bytes
    used: float  # seconds since the epoch


class Store:
    """A folder of packages, shared by processes.

    folder: made at the first package, for this user alone.
    capacity: most bytes; what was not used for longest leaves first.
    told: whether to warn where the folder cannot be written.
    """

    def __init__(self, folder: Path, capacity: int = CAPACITY, *, told: bool = True) -> None:
        self.folder, self.capacity, self._told = folder, capacity, told

    def refused(self) -> str | None:
        """Return why the folder is not used, or None if it is, or does not exist yet."""
        try:
            trust.check(Path(os.path.realpath(self.folder)))
        except FileNotFoundError:
            return None
        except (trust.Untrusted, OSError) as error:
            return str(error)
        return None

    def find(self, request: Request) -> Found | None:
        """Return a kept function, or None. Warns of a package, or a folder, that is refused."""
        if self._is_refused():
            return None
        folder = self.folder / request.key
        try:
            kept = package.read(folder)
            if kept.properties != request.properties or not usable(kept):
                return None
            package.check_kernels(folder, kept)
            call = package.load(folder, kept)
            admits = conditions.read(kept.conditions)
        except FileNotFoundError:  # not kept, or removed meanwhile
            return None
        except (trust.Untrusted, Damaged, OSError) as error:
            warn_once(f"the kernel {folder} is not used: {error}; it is compiled again")
            return None
        with suppress(OSError):
            os.utime(folder / package.MANIFEST)
        return None if call is None else Found(call, admits)

    def keep(
        self, request: Request, call: torch_internals.Raw, admits: torch_internals.Admits
    ) -> torch_internals.Raw:
        """Keep a compiled function for other processes, if it can be; no call waits for that, see `background`.

        Returns the function to call instead: for a GPU, its first call is what lets it be kept.
        """
        on_gpu = identity.device_of(request.properties).type == "cuda"
        compiler = None if on_gpu else identity.compiler()
        job = functools.partial(background.later, functools.partial(self._pack, request, call, admits, compiler))
        if on_gpu:
            return AfterCall(call, job)
        job()
        return call

    def _pack(
        self, request: Request, call: torch_internals.Raw, admits: torch_internals.Admits, compiler: str | None
    ) -> bool:
        """Add the package of a compiled function, if it can be made; return whether it was added."""
        if self._is_refused():
            return False
        generated, text = torch_internals.taken_apart(call), conditions.write(admits)
        if generated is None or text is None:
            return False
        try:
            return self._add(request.key, *package.pack(generated, request.properties, compiler, text))
        except (OSError, ValueError) as error:
            if self._told:
                warn_once(f"kernels are not kept in {self.folder} ({error}): free space there, or name another folder "
                          "in XLSTM_OPS_KERNELS")
            return False

    def add(self, key: str, kept: Package, contents: Mapping[str, bytes]) -> bool:
        """Add a package unless a good one is there. Raises OSError, and trust.Untrusted for a refused folder."""
        refused = self.refused()
        if refused is not None:
            raise trust.Untrusted(refused)
        return self._add(key, kept, contents)

    def _add(self, key: str, kept: Package, contents: Mapping[str, bytes]) -> bool:
        os.makedirs(self.folder.parent, exist_ok=True)
        with suppress(FileExistsError):
            os.mkdir(self.folder, 0o700)
        size = sum(map(len, contents.values()))
        if size > self.capacity:
            return False
        if (self.folder / key).is_dir():
            if self.wrong(key) is None and usable(package.read(self.folder / key)):
                return False
            package.remove(self.folder / key)
        self.prune(self.capacity - size)
        return package.write(self.folder / key, kept, contents)

    def entries(self) -> list[Entry]:
        """Return the packages, the least recently used first."""
        found = []
        for name in self._names():
            with suppress(OSError):
                with os.scandir(self.folder / name) as files:
                    size = sum(file.stat(follow_symlinks=False).st_size for file in files)
                try:
                    used = os.stat(self.folder / name / package.MANIFEST).st_mtime
                except FileNotFoundError:
                    used = 0.0
                found.append(Entry(name, size, used))
        return sorted(found, key=lambda entry: entry.used)

    def prune(self, budget: int) -> list[Entry]:
        """Remove what was not used for longest until `budget` bytes are left, and what killed writers left."""
        self._remove_abandoned()
        entries, removed = self.entries(), []
        left = sum(entry.size for entry in entries)
        for entry in entries:
            if left <= budget:
                break
            package.remove(self.folder / entry.key)
            removed.append(entry)
            left -= entry.size
        return removed

    def read(self, key: str) -> Package:
        """Return a package's manifest. Raises Damaged, trust.Untrusted and OSError."""
        return package.read(self.folder / key)

    def contents(self, key: str) -> dict[str, bytes]:
        """Return a package's files by name. Raises as `read` does."""
        return package.check_kernels(self.folder / key, self.read(key))

    def wrong(self, key: str) -> str | None:
        """Return what is wrong with a package, or None: its hashes fit, and nobody else can write it."""
        try:
            kept = self.read(key)
            package.check_kernels(self.folder / key, kept)
        except (Damaged, trust.Untrusted, OSError) as error:
            return str(error)
        return None if Request(kept.properties).key == key else "its name is not that of its properties"

    def remove(self, key: str) -> None:
        """Remove a package."""
        package.remove(self.folder / key)

    def _names(self) -> Iterator[str]:
        with suppress(FileNotFoundError):
            yield from (name for name in os.listdir(self.folder) if _KEY.fullmatch(name))

    def _remove_abandoned(self) -> None:
        with suppress(FileNotFoundError):
            for name in os.listdir(self.folder):
                path = self.folder / name
                if name.startswith(".") and name.endswith(PARTIAL):
                    with suppress(OSError):
                        if time.time() - os.lstat(path).st_mtime > ABANDONED_S:
                            shutil.rmtree(path)

    def _is_refused(self) -> bool:
        reason = self.refused()
        if reason is not None:
            warn_once(f"kernels kept in {self.folder} are not used: {reason}; or name another folder in "
                      "XLSTM_OPS_KERNELS")
        return reason is not None


def usable(kept: Package) -> bool:
    """Return whether the compiler that made a package is the one here, or nothing can be compiled here anyway."""
    here = identity.compiler()
    return kept.compiler is None or here is None or kept.compiler == here
