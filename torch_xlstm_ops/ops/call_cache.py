"""What was found out about a call, kept for the next one like it: checks and plans cost more than a step."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from torch_xlstm_ops.runtime import compiler, torch_internals

_Found = TypeVar("_Found")
_Arguments = Sequence[Tensor | None]


@dataclass(frozen=True, slots=True)
class _Entry(Generic[_Found]):
    """One kind of call, known in 1 us when a model's layers repeat it, by comparing its tensors in C++."""

    kind: tuple[Hashable, ...]
    like: Callable[..., bool]  # whether tensors are as those of the first such call, strides and autograd's use too
    found: _Found


class CallCache(Generic[_Found]):
    """A bounded memory of `find(tensors, *how)`, by the tensors' shapes, dtypes and devices, and by `how`.

    What `find` raises is not remembered.
    """

    def __init__(self, find: Callable[..., _Found]) -> None:
        self._find = find
        self._entries: dict[Hashable, _Entry[_Found]] = {}
        self._latest: _Entry[_Found] | None = None
        compiler.forget_with(self.clear)

    def clear(self) -> None:
        """Forget everything that was found."""
        self._entries.clear()
        self._latest = None

    def hit(self, tensors: _Arguments, *how: Hashable) -> _Found | None:
        """Return what was found for the latest kind of call if this one is like its first, strides and all."""
        latest = self._latest
        if latest is not None and latest.kind == _kind(tensors, how) and latest.like(*tensors):
            return latest.found
        return None

    def __call__(self, tensors: _Arguments, *how: Hashable) -> _Found:
        """Return what was found for a call like this one, finding it if there was none."""
        found = self.hit(tensors, *how)
        if found is not None:
            return found
        kind = _kind(tensors, how)
        key = (kind, *[t if t is None else (t.shape, t.dtype, t.device) for t in tensors])
        entry = self._entries.get(key)
        if entry is None:
            entry = _Entry(kind, _guards(tensors), self._find(tensors, *how))
            if len(self._entries) >= compiler.CAPACITY:
                self._entries.clear()
            self._entries[key] = entry
        self._latest = entry
        return entry.found


def _kind(tensors: _Arguments, how: tuple[Hashable, ...]) -> tuple[Hashable, ...]:
    return how, len(tensors), torch.get_num_threads()  # a CPU kernel is compiled for so many threads


def _guards(tensors: _Arguments) -> Callable[..., bool]:
    given = [t for t in tensors if t is not None]  # the guards know tensors only
    like = torch_internals.like(given)
    if len(given) == len(tensors):
        return like
    absent = [t is None for t in tensors]
    return lambda *tensors: [t is None for t in tensors] == absent and like(*[t for t in tensors if t is not None])
