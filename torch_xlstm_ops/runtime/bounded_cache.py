"""The one bounded cache: an ordered dict that drops its first entries when it is full."""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeVar

from torch_xlstm_ops.runtime import forks

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class BoundedCache(OrderedDict[_Key, _Value]):
    """A dict of at most `capacity` entries, for several threads.

    The oldest entry leaves first; with `move_to_end` at each hit, the least recently used does.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self._lock = forks.new_lock()

    def keep(self, key: _Key, value: _Value) -> _Value:
        """Add an entry unless another thread was first; return the value that is kept."""
        with self._lock:
            value = self.setdefault(key, value)
            while len(self) > self.capacity:
                self.popitem(last=False)
            return value
