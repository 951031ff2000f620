"""Whether tensors share memory: an operator that writes in place must not write what it still reads."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

CAPACITY = 1024  # pointers of calls that are remembered


class OverlapCheck:
    """Says whether the written arguments of a call are apart from all others, and remembers it by their addresses."""

    def __init__(self, written: slice) -> None:
        self._written = written
        self._apart: set[Hashable] = set()

    def apart(self, kind: Hashable, tensors: Sequence[Tensor]) -> bool:
        """Return whether no written tensor shares memory with another. kind: decides the sizes. All are contiguous."""
        addresses = [*map(Tensor.data_ptr, tensors)]
        key = (kind, *addresses)
        if key in self._apart:
            return True
        spans = [(start, start + t.numel() * t.element_size()) for start, t in zip(addresses, tensors, strict=True)]
        for at in range(*self._written.indices(len(tensors))):
            if any(_meet(spans[at], other) for place, other in enumerate(spans) if place != at):
                return False
        if len(self._apart) >= CAPACITY:
            self._apart.clear()
        self._apart.add(key)
        return True


def check_writable(**tensors: Tensor) -> None:
    """Raise ValueError for tensors that share memory, with each other or within, so that a write is not defined."""
    for name, t in tensors.items():
        if _overlaps_itself(t):
            raise ValueError(f"{name} must have memory of its own for each element to be written in place, got strides "
                             f"{tuple(t.stride())} for {tuple(t.shape)}")
    for (name, t), (other, u) in itertools.combinations(tensors.items(), 2):
        if _share(t, u):
            raise ValueError(f"{name} must not share memory with {other} to be written in place, got tensors that do")


def _span(t: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size() if t.numel() else t.data_ptr()


def _meet(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _overlaps_itself(t: Tensor) -> bool:
    reach = 0
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return len({*_offsets(t)}) < t.numel()
            reach += (size - 1) * stride
    return False


def _share(t: Tensor, u: Tensor) -> bool:
    """Return whether two tensors share an element: of spans that meet, the elements may still lie between each other.
    """
    if t.numel() == 0 or u.numel() == 0 or not _meet(_span(t), _span(u)):
        return False
    apart = (u.data_ptr() - t.data_ptr()) // t.element_size()
    return not {*_offsets(t)}.isdisjoint(offset + apart for offset in _offsets(u))


def _offsets(t: Tensor) -> Iterator[int]:
    """Yield how many elements behind a tensor's first each of its elements lies."""
    offsets = torch.zeros((), dtype=torch.int64)
    for axis, (size, stride) in enumerate(zip(t.shape, t.stride(), strict=True)):
        offsets = offsets + (torch.arange(size) * stride).view(-1, *[1] * (t.dim() - 1 - axis))
    return iter(offsets.flatten().tolist())
