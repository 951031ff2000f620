"""Snapshots in the memory of the device and of the host, by the tokens that they were taken after."""

from __future__ import annotations

import warnings
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

import torch

from torch_xlstm_ops.context import codec
from torch_xlstm_ops.context.codec import Packed
from torch_xlstm_ops.context.pool.tree import Node, RadixTree
from torch_xlstm_ops.context.states import Snapshot


class Usage(NamedTuple):
    """What a tier holds."""

    states: int = 0
    pinned: int = 0
    bytes: int = 0
    budget: int = 0


class Kept:
    """A place for a snapshot, in either tier or both."""

    def __init__(self, node: Node[Kept], segment: int | None) -> None:
        self.node, self.segment = node, segment
        self.pinned = False

    @property
    def position(self) -> int:
        """Return the tokens before it."""
        return self.node.position


class Tier:
    """What one memory holds, at most `budget` bytes: the least recently used goes first, what is pinned never."""

    def __init__(self, budget: int) -> None:
        self.budget, self.used = budget, 0
        self._held: OrderedDict[Kept, Snapshot | Packed] = OrderedDict()

    def __contains__(self, kept: Kept) -> bool:
        return kept in self._held

    def __iter__(self) -> Iterator[Kept]:
        return iter(self._held)

    def get(self, kept: Kept) -> Snapshot | Packed | None:
        """Return what is held, now the most recently used, or None."""
        if kept in self._held:
            self._held.move_to_end(kept)
        return self._held.get(kept)

    def add(self, kept: Kept, value: Snapshot | Packed) -> list[Kept] | None:
        """Hold a value, and return what had to go for it; None, and nothing goes, where pins leave no room."""
        self.drop(kept)
        free, gone = self.budget - self.used, []
        for other, held in self._held.items():
            if free >= value.nbytes:
                break
            if not other.pinned:
                gone.append(other)
                free += held.nbytes
        if free < value.nbytes:
            return None
        for other in gone:
            self.drop(other)
        self._held[kept] = value
        self.used += value.nbytes
        return gone

    def drop(self, kept: Kept) -> None:
        """Let go of what is held, if anything is."""
        value = self._held.pop(kept, None)
        self.used -= 0 if value is None else value.nbytes

    def usage(self) -> Usage:
        """Return what is held."""
        return Usage(len(self._held), sum(kept.pinned for kept in self), self.used, self.budget)


class Memory:
    """Both tiers and the tree over them. Not for threads at once."""

    def __init__(self, device: torch.device, device_bytes: int, host_bytes: int) -> None:
        self.device, self.host = Tier(device_bytes), Tier(host_bytes)
        self._where = device
        self._tree: RadixTree[Kept] = RadixTree()

    @property
    def longest(self) -> int:
        """Return the tokens before the longest past that is held."""
        return max((kept.position for tier in (self.device, self.host) for kept in tier), default=0)

    def along(self, tokens: array[int]) -> Iterator[Kept]:
        """Yield what is held of beginnings of `tokens`, the shortest first."""
        for node in self._tree.path(tokens):
            yield from node.values.values()

    def get(self, kept: Kept) -> Snapshot:
        """Return a snapshot, which is then in the faster tier too, where there is room."""
        packed, snapshot = self.host.get(kept), self.device.get(kept)
        if isinstance(snapshot, Snapshot):
            return snapshot
        assert isinstance(packed, Packed)
        snapshot = codec.unpack(packed, self._where)
        self._add(self.device, kept, snapshot)
        return snapshot

    def put(self, tokens: array[int], snapshot: Snapshot, packed: Packed, *, pin: bool) -> None:
        """Hold a snapshot in every tier that is on; a warning says where pins leave no room."""
        node = self._tree.node(tokens)
        kept = node.values.setdefault(snapshot.segment, Kept(node, snapshot.segment))
        kept.pinned |= pin
        self._add(self.device, kept, snapshot)
        self._add(self.host, kept, packed)
        self._forget(kept)

    def _add(self, tier: Tier, kept: Kept, value: Snapshot | Packed) -> None:
        if tier.budget == 0:
            return
        gone = tier.add(kept, value)
        if gone is None:
            warnings.warn(f"a state of {value.nbytes} bytes must be kept, and is not: pins leave no room in "
                          f"{tier.budget}", RuntimeWarning, stacklevel=5)
        for other in gone or ():
            self._forget(other)

    def _forget(self, kept: Kept) -> None:
        """Take a place out of the tree if no tier holds it."""
        if kept not in self.device and kept not in self.host:
            kept.node.values.pop(kept.segment, None)
            self._tree.prune(kept.node)
