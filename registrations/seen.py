"""What was found out about a call, kept for the next one like it: checks and plans cost more than a step."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from torch_xlstm_ops import compiled

_Found = TypeVar("_Found")
_Arguments = Sequence[Tensor | None]


class Seen(Generic[_Found]):
    """A bounded memory of `find(tensors, *how)`, by the tensors' shapes, dtypes and devices, and by `how`.

    What `find` raises is not remembered.
    """

    def __init__(self, find: Callable[..., _Found]) -> None:
        self._find = find
        self._found: dict[Hashable, _Found] = {}

    def clear(self) -> None:
        """Forget everything that was found."""
        self._found.clear()

    def __call__(self, tensors: _Arguments, *how: Hashable) -> _Found:
        """Return what was found for a call like this one, finding it if there was none."""
        # Threads count because a CPU kernel is compiled for so many.
        key = (how, torch.get_num_threads(), *[t if t is None else (t.shape, t.dtype, t.device) for t in tensors])
        found = self._found.get(key)
        if found is None:
            found = self._find(tensors, *how)
            if len(self._found) >= compiled.CAPACITY:
                self._found.clear()
            self._found[key] = found
        return found
