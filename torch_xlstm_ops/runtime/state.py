"""Reset the package's mutable module globals: caches, pools, counters, routes, graphs, folders, warnings issued.

A module that keeps state in a global registers the function that clears it, so that one call reaches all of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import TypeVar

_Reset = TypeVar("_Reset", bound=Callable[[], object])
_resets: list[Callable[[], object]] = []
_told: set[Hashable] = set()


def on_reset(clear: _Reset) -> _Reset:
    """Have `reset` call a function without arguments; return it, so that this is a decorator too."""
    _resets.append(clear)
    return clear


def reset() -> None:
    """Clear all registered state, the last registered first; the process then behaves as after import.

    Patches, registrations with torch, and what callers hold (handles, pools of states, recordings) stay.
    """
    for clear in reversed(_resets):
        clear()


def warn_once(message: str, *, stacklevel: int = 2) -> None:
    """Issue a RuntimeWarning unless this process has issued the same one since the last `reset`.

    stacklevel: as of `warnings.warn`, seen from the caller.
    """
    if message not in _told:
        _told.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=stacklevel + 1)


on_reset(_told.clear)
