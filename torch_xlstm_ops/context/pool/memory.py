"""Snapshots in device memory and in host memory, found by the tokens that they were taken after."""

from __future__ import annotations

import warnings
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

import torch

from torch_xlstm_ops.context import codec
from torch_xlstm_ops.context.codec import EncodedSnapshot
from torch_xlstm_ops.context.pool.tree import Node, RadixTree
from torch_xlstm_ops.context.states import Snapshot


class Usage(NamedTuple):
    """What a tier holds."""

    states: int = 0
    pinned: int = 0
    bytes: int = 0
    budget: int = 0


class MemoryEntry:
    """A snapshot that is held in one or both memory tiers."""

    def __init__(self, node: Node[MemoryEntry], segment: int | None, digest: str) -> None:
        self.node, self.segment, self.digest = node, segment, digest
        self.pinned = False

    @property
    def position(self) -> int:
        """Return the number of tokens that the snapshot was taken after."""
        return self.node.position


class MemoryTier:
    """An LRU cache of at most `budget` bytes; pinned entries are never evicted."""

    def __init__(self, budget: int) -> None:
        self.budget, self.used = budget, 0
        self._held: OrderedDict[MemoryEntry, Snapshot | EncodedSnapshot] = OrderedDict()

    def __contains__(self, entry: MemoryEntry) -> bool:
        return entry in self._held

    def __iter__(self) -> Iterator[MemoryEntry]:
        return iter(self._held)

    def get(self, entry: MemoryEntry) -> Snapshot | EncodedSnapshot | None:
        """Return the value of an entry, which becomes the most recently used, or None."""
        if entry in self._held:
            self._held.move_to_end(entry)
        return self._held.get(entry)

    def add(self, entry: MemoryEntry, value: Snapshot | EncodedSnapshot) -> list[MemoryEntry] | None:
        """Hold a value and return the evicted entries; None, and nothing is evicted, if pins leave no room."""
        self.drop(entry)
        free, evicted = self.budget - self.used, []
        for other, held in self._held.items():
            if free >= value.nbytes:
                break
            if not other.pinned:
                evicted.append(other)
                free += held.nbytes
        if free < value.nbytes:
            return None
        for other in evicted:
            self.drop(other)
        self._held[entry] = value
        self.used += value.nbytes
        return evicted

    def drop(self, entry: MemoryEntry) -> None:
        """Remove the value of an entry, if there is one."""
        value = self._held.pop(entry, None)
        self.used -= 0 if value is None else value.nbytes

    def usage(self) -> Usage:
        """Return what is held."""
        return Usage(len(self._held), sum(entry.pinned for entry in self), self.used, self.budget)


class MemoryTiers:
    """The device tier, the host tier and the radix tree over both. Not safe for threads."""

    def __init__(self, device: torch.device, device_bytes: int, host_bytes: int) -> None:
        self.device, self.host = MemoryTier(device_bytes), MemoryTier(host_bytes)
        self._torch_device = device
        self._tree: RadixTree[MemoryEntry] = RadixTree()
        self._nodes: dict[str, Node[MemoryEntry]] = {}  # by the digest of their tokens

    @property
    def longest(self) -> int:
        """Return the tokens of the longest prefix that is held."""
        return max((entry.position for tier in (self.device, self.host) for entry in tier), default=0)

    def prefixes(self, tokens: array[int]) -> Iterator[MemoryEntry]:
        """Yield the entries of prefixes of `tokens`, the shortest first."""
        for node in self._tree.path(tokens):
            yield from node.values.values()

    def get(self, entry: MemoryEntry) -> Snapshot:
        """Return a snapshot, which is then held in the device tier too, if there is room."""
        encoded, snapshot = self.host.get(entry), self.device.get(entry)
        if isinstance(snapshot, Snapshot):
            return snapshot
        assert isinstance(encoded, EncodedSnapshot)
        snapshot = codec.decode(encoded, self._torch_device)
        self._add(self.device, entry, snapshot)
        return snapshot

    def put(
        self, tokens: array[int], snapshot: Snapshot, encoded: EncodedSnapshot, *, pin: bool, prefix: str | None = None
    ) -> None:
        """Hold a snapshot in every tier that is on; warn if pins leave no room.

        prefix: digest of a prefix of `tokens` that the caller knows to be one; only later tokens are compared then.
        """
        node = self._tree.node(tokens, self._nodes.get(prefix) if prefix is not None else None)
        self._nodes[snapshot.digest] = node
        entry = node.values.setdefault(snapshot.segment, MemoryEntry(node, snapshot.segment, snapshot.digest))
        entry.pinned |= pin
        self._add(self.device, entry, snapshot)
        self._add(self.host, entry, encoded)
        self._forget(entry)

    def _add(self, tier: MemoryTier, entry: MemoryEntry, value: Snapshot | EncodedSnapshot) -> None:
        if tier.budget == 0:
            return
        evicted = tier.add(entry, value)
        if evicted is None:
            warnings.warn(f"could not keep a state of {value.nbytes} bytes in memory: pinned states leave no room in "
                          f"{tier.budget} bytes; unpin some, or give the pool more", RuntimeWarning, stacklevel=5)
        for other in evicted or ():
            self._forget(other)

    def _forget(self, entry: MemoryEntry) -> None:
        """Remove an entry from the tree if no tier holds it."""
        if entry not in self.device and entry not in self.host:
            entry.node.values.pop(entry.segment, None)
            if not entry.node.values:
                self._nodes.pop(entry.digest, None)
            self._tree.prune(entry.node)
