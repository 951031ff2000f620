"""Compiled functions on disk: a process that finds one there imports neither Dynamo nor Inductor, and traces nothing.

A package is what Inductor compiled for one function: the Python that calls the kernels, and the kernels' machine code.
Its name is a hash of everything that decides it. Loading a package runs it: see docs/security.md.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch_xlstm_ops.runtime.kernel_store import archive
from torch_xlstm_ops.runtime.kernel_store.background import Background, background
from torch_xlstm_ops.runtime.kernel_store.identity import Request, here, request, unsupported
from torch_xlstm_ops.runtime.kernel_store.package import Damaged, Package
from torch_xlstm_ops.runtime.kernel_store.store import CAPACITY, Entry, Found, Store
from torch_xlstm_ops.runtime.kernel_store.trust import Untrusted

__all__ = [
    "CAPACITY",
    "Background",
    "Damaged",
    "Entry",
    "Found",
    "Package",
    "Request",
    "Store",
    "Untrusted",
    "archive",
    "background",
    "chosen",
    "follow",
    "here",
    "request",
    "unsupported",
]

Choice = tuple[Path, bool]  # the folder, and whether the user named it
_choices: list[Callable[[], Choice | None]] = []  # at most one, given by registrations/


def follow(choose: Callable[[], Choice | None]) -> None:
    """Ask a function for the folder from now on; None means that kernels are not kept."""
    _choices[:] = [choose]


def chosen() -> Store | None:
    """Return the store that the configuration names in this context, or None."""
    choice = _choices[0]() if _choices else None
    return None if choice is None else Store(choice[0], told=choice[1])
