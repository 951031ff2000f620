"""Forked children: our operators run there on one thread, hold no lock, and own nothing of the parent's.

The threads of OpenMP do not survive a fork: a parallel loop in the child would wait for them forever, in plain torch
too. Whether there are such threads cannot be asked; the workers of a DataLoader compute on one thread for the same
reason. A child of a process that has kernels of ours is set to one thread at once, any other when it first calls an
operator, so that importing the package changes nothing. A lock that another thread of the parent held would never be
released in the child.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch

_locks: weakref.WeakSet[Any] = weakref.WeakSet()
_in_child: list[Callable[[], object]] = []
_has_kernels = False  # whether kernels of ours may have started threads in this process
unsettled = False  # whether this is a forked child that has not been set to one thread


def new_lock() -> threading.Lock:
    """Return a lock that is free in every forked child."""
    lock = threading.Lock()
    _locks.add(lock)
    return lock


def new_rlock() -> Any:
    """Return a reentrant lock that is free in every forked child."""
    lock = threading.RLock()
    _locks.add(lock)
    return lock


def in_child(call: Callable[[], object]) -> None:
    """Have a function be called in every forked child, after its locks are free."""
    _in_child.append(call)


def settle() -> None:
    """Set a forked child to one thread, before it runs kernels of ours."""
    global unsettled
    unsettled = False
    torch.set_num_threads(1)


def note_kernels() -> None:
    """Note that this process obtains kernels."""
    global _has_kernels
    if unsettled:
        settle()
    _has_kernels = True


def _after_in_child() -> None:
    global unsettled
    for lock in list(_locks):
        lock._at_fork_reinit()
    unsettled = True
    if _has_kernels:
        settle()
    for call in _in_child:
        call()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_in_child)
