"""Patch packages when a program imports them, and none that it does not.

    watch = patch_on_import()           # or patch_on_import("tirex", "xlstm")

`XLSTM_OPS_PATCH` does this when torch_xlstm_ops is imported: ``auto`` for every package we know, or names with commas
between. ``xlstm-ops run`` does it for a script that does not import us. A package that cannot be patched is left as it
is, with a warning: the program must run all the same.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import threading
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch_xlstm_ops.patch import Handle, patch, peers

VARIABLE = "XLSTM_OPS_PATCH"


def patch_on_import(*names: str, compat: bool = False) -> Watch:
    """Patch the named packages, default all that we know, at once where they are imported, else as soon as they are.

    compat: as of `patch`. Raises ValueError for a name we do not know.
    """
    watch = Watch([peers.row(name) for name in names] or list(peers.PEERS), compat)
    sys.meta_path.insert(0, watch)
    for name, peer in peers.PEERS.items():
        if name in watch.waiting and peer.seam in sys.modules:
            watch.met(name)
    return watch


def patch_from_environment() -> Watch | None:
    """Do what `XLSTM_OPS_PATCH` says: nothing where it is not set or empty. Raises ValueError for an unknown name."""
    value = os.environ.get(VARIABLE, "").strip()
    if not value:
        return None
    try:
        return patch_on_import(*([] if value == "auto" else [name.strip() for name in value.split(",")]))
    except ValueError:
        expected = f"auto or names of {', '.join(peers.PEERS)}"
        raise ValueError(f"environment variable {VARIABLE} must be {expected}, got {value!r}") from None


class Watch(importlib.abc.MetaPathFinder):
    """Waits for the imports after which packages can be patched, and holds what came of it."""

    def __init__(self, names: Sequence[str], compat: bool) -> None:
        self.waiting = set(names)
        self._compat = compat
        self._handles: list[Handle] = []
        self._searching = threading.local()

    def report(self) -> tuple[str, ...]:
        """Return the lines of every package patched so far."""
        return tuple(dict.fromkeys(line for handle in self._handles for line in handle.report()))

    def remove(self) -> None:
        """Watch no more, and put back what was replaced. Raises as `Handle.remove`."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        self.waiting.clear()
        for handle in self._handles:
            handle.remove()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find a module that we wait for as everybody else would, to be told when it has been executed."""
        names = [name for name in tuple(self.waiting) if peers.PEERS[name].seam == fullname]
        if not names or getattr(self._searching, "now", False):
            return None
        self._searching.now = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching.now = False
        if spec is not None and spec.loader is not None:
            self._tell_when_executed(spec.loader, names[0])
        return spec

    def met(self, name: str) -> None:
        """Patch a package that has been imported, or warn why not."""
        self.waiting.discard(name)
        try:
            self._handles.append(patch(name, compat=self._compat))
        except (ImportError, RuntimeError) as error:
            warnings.warn(f"{name} is left as it is: {error}", RuntimeWarning, stacklevel=2)

    def _tell_when_executed(self, loader: Any, name: str) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module
            execute(module)
            self.met(name)

        loader.exec_module = exec_module
