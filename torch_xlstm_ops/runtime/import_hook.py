"""Call back when a module has been imported: one meta path finder for all callbacks.

The finder asks the other finders for the module's spec and wraps the loader, which calls back after it executed the
module. A program may look for a module any number of times before it imports it, and may retry an import that failed.
"""

from __future__ import annotations

import importlib.abc
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, cast

from torch_xlstm_ops.runtime import forks

_lock = forks.new_lock()
_awaited: dict[str, list[Callable[[], None]]] = {}


def when_imported(module: str, callback: Callable[[], None]) -> Callable[[], None]:
    """Call `callback` once after a module was executed, at once if it is imported; return a function that cancels."""
    with _lock:
        imported = sys.modules.get(module) is not None
        if not imported:
            _awaited.setdefault(module, []).append(callback)
            if _finder not in sys.meta_path:
                sys.meta_path.insert(0, _finder)
    if imported:
        callback()

    def cancel() -> None:
        with _lock:
            waiting = _awaited.get(module, [])
            if callback in waiting:
                waiting.remove(callback)
            _remove_unused(module)

    return cancel


def _remove_unused(module: str) -> None:
    """Drop a module that no callback waits for, and the finder if there is no other."""
    if not _awaited.get(module, True):
        del _awaited[module]
    if not _awaited and _finder in sys.meta_path:
        sys.meta_path.remove(_finder)


def _executed(module: ModuleType) -> None:
    name = module.__name__
    if sys.modules.get(name) is not module:  # executed as a second module, not the one that programs import
        return
    with _lock:
        waiting = _awaited.pop(name, [])
        _remove_unused(name)
    for callback in waiting:
        callback()


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self) -> None:
        self._searching = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find an awaited module by the finders after this one, and wrap its loader."""
        if fullname not in _awaited or getattr(self._searching, "now", False):
            return None
        self._searching.now = True
        try:
            found = (_find(finder, fullname, path, target) for finder in list(sys.meta_path) if finder is not self)
            spec = next(filter(None, found), None)
        finally:
            self._searching.now = False
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = cast(Any, _NotifyingLoader(spec.loader))
        return spec


def _find(finder: Any, name: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
    find = getattr(finder, "find_spec", None)
    return None if find is None else find(name, path, target)


_finder = _Finder()


class _NotifyingLoader:
    """Wrap a module's loader: set the module's loader back to it before the execution, and call back after it."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":  # asked while a copy is made, before it has the attribute
            raise AttributeError(name)
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module as its loader does."""
        return cast("ModuleType | None", self._loader.create_module(spec))

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module, then run the callbacks that wait for it."""
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _executed(module)
