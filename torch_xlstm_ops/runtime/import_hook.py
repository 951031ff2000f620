"""Be told when a module has been imported: one finder for everybody who waits.

The finder finds a module as the others do, and has its loader tell when the module was executed. A program may look for
a module as often as it likes before it imports it, and an import that fails may be tried again.
"""

from __future__ import annotations

import importlib.abc
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, cast

_lock = threading.Lock()
_awaited: dict[str, list[Callable[[], None]]] = {}


def when_imported(module: str, tell: Callable[[], None]) -> Callable[[], None]:
    """Call `tell` once, when a module has been executed, at once if it is there; return what calls that off."""
    with _lock:
        there = sys.modules.get(module) is not None
        if not there:
            _awaited.setdefault(module, []).append(tell)
            if _finder not in sys.meta_path:
                sys.meta_path.insert(0, _finder)
    if there:
        tell()

    def call_off() -> None:
        with _lock:
            waiting = _awaited.get(module, [])
            if tell in waiting:
                waiting.remove(tell)
            _tidy(module)

    return call_off


def _tidy(module: str) -> None:
    if not _awaited.get(module, True):
        del _awaited[module]
    if not _awaited and _finder in sys.meta_path:
        sys.meta_path.remove(_finder)


def _arrived(module: ModuleType) -> None:
    name = module.__name__
    if sys.modules.get(name) is not module:  # executed beside the one that programs import
        return
    with _lock:
        waiting = _awaited.pop(name, [])
        _tidy(name)
    for tell in waiting:
        tell()


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self) -> None:
        self._searching = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find an awaited module as the finders after this one do."""
        if fullname not in _awaited or getattr(self._searching, "now", False):
            return None
        self._searching.now = True
        try:
            found = (_find(finder, fullname, path, target) for finder in list(sys.meta_path) if finder is not self)
            spec = next(filter(None, found), None)
        finally:
            self._searching.now = False
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = cast(Any, _Telling(spec.loader))
        return spec


def _find(finder: Any, name: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
    find = getattr(finder, "find_spec", None)
    return None if find is None else find(name, path, target)


_finder = _Finder()


class _Telling:
    """A module's own loader, which tells when it is done, and hands the module back to that loader before it begins."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":  # of a copy in the making
            raise AttributeError(name)
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Make the module as its loader does."""
        return cast("ModuleType | None", self._loader.create_module(spec))

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module, and tell who waits for it."""
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _arrived(module)
