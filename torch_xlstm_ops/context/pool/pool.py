"""Snapshots kept and found again by the longest beginning of tokens that was read: on the device, the host, a disk."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from torch_xlstm_ops.context import codec, states
from torch_xlstm_ops.context.batch import Batch
from torch_xlstm_ops.context.codec import Storage, packed_bytes
from torch_xlstm_ops.context.pool.disk import Disk
from torch_xlstm_ops.context.pool.file_names import Name
from torch_xlstm_ops.context.pool.memory import Memory, Usage
from torch_xlstm_ops.context.prefill import prefill
from torch_xlstm_ops.context.states import Snapshot
from torch_xlstm_ops.context.tokens import as_array, digest
from torch_xlstm_ops.runtime import devices

DEVICE_SHARE, HOST_SHARE, DISK_SHARE = 1 / 16, 1 / 8, 1 / 10  # of what is free when a pool is made


class Stats(NamedTuple):
    """What a pool holds and did; a tier that is off holds nothing of nothing."""

    device: Usage
    host: Usage
    disk: Usage  # all models' states in the folder
    hits: int
    misses: int
    error: float  # the largest that fewer bits made of a state that was put, relative to its norm


class StatePool:
    """Snapshots of one model, found by the longest beginning of tokens that was read.

    A put writes to every tier; each lets go of the least recently used when its budget is full. What is found is held
    in the faster tiers again. Threads may share a pool, and processes its folder.

    model: a transformers xLSTM; states of other models, and of its own with other weights, are never found.
    folder: of the disk tier; default none.
    device_bytes, host_bytes, disk_bytes: budgets; 0 turns a tier off; default a share of what is free now, and on the
        CPU, where the host is the device, no device tier.
    storage: full, bf16 or int8, on the host and the disk: fewer bytes for an error, which `stats` tells.

    Raises ValueError for a budget that no state of the model fits into.
    """

    def __init__(
        self, model: Any, folder: str | Path | None = None, *, device_bytes: int | None = None,
        host_bytes: int | None = None, disk_bytes: int | None = None, storage: Storage | str = Storage.FULL,
    ) -> None:
        self.model, self.storage = model, Storage(storage)
        outline = states.outline(model)
        least = packed_bytes(outline, self.storage)
        path, host, device = None if folder is None else Path(folder), torch.device("cpu"), states.device_of(model)
        if path is None and disk_bytes:
            raise ValueError(f"disk_bytes must come with folder, got {disk_bytes} without")
        free = 0 if device == host else devices.available(device) or 0
        self._bytes = (_budget("device_bytes", device_bytes, outline.nbytes, DEVICE_SHARE * free),
                       _budget("host_bytes", host_bytes, least, HOST_SHARE * (devices.available(host) or 0)))
        disk = _budget("disk_bytes", disk_bytes, least, 0 if path is None else DISK_SHARE * _free_on_disk(path))
        self._disk = None if path is None or not disk else Disk(path, disk)
        self._lock = threading.RLock()
        self._identity = states.identity(model)
        self._memory = Memory(device, *self._bytes)
        self._hits = self._misses = 0
        self._error = 0.0

    @property
    def longest(self) -> int:
        """Return the tokens before the longest past that is kept."""
        on_disk = [] if self._disk is None else [name.position for name in self._disk.names(self._current())]
        with self._lock:
            return max(self._memory.longest, *on_disk, 0)

    def find(self, tokens: Iterable[int], *, segment: int | None = None) -> Snapshot | None:
        """Return the snapshot of the longest beginning of `tokens`, or None.

        segment: only where a reading of `tokens` in pieces of so many would pass, with the same bits (unless `storage`
            is of fewer); default anywhere, also after tokens that were written one by one.
        """
        tokens = as_array(tokens)
        identity = self._current()

        def fits(position: int, pieces: int | None) -> bool:
            return segment is None or (pieces == segment and (position % segment == 0 or position == len(tokens)))

        with self._lock:
            kept = [kept for kept in self._memory.along(tokens) if fits(kept.position, kept.segment)]
            found = self._memory.get(kept[-1]) if kept else None
        for name in [] if self._disk is None else self._disk.matching(identity, tokens):
            if name.position <= (0 if found is None else found.position):
                break
            if fits(name.position, name.segment) and (read := self._from_disk(name, tokens)) is not None:
                found = read
                break
        with self._lock:
            self._hits += found is not None
            self._misses += found is None
        return found

    def put(self, tokens: Iterable[int], snapshot: Snapshot, *, pin: bool = False) -> None:
        """Keep a snapshot that was taken after `tokens`; what cannot be kept is told by a warning.

        pin: whether it stays when room is needed; default False.
        Raises ValueError for the snapshot of another model or of other tokens.
        """
        tokens, identity = as_array(tokens), self._current()
        if snapshot.identity != identity:
            raise ValueError(f"snapshot must be of the pool's model {identity}, got one of {snapshot.identity}")
        if snapshot.position != len(tokens) or snapshot.digest != digest(tokens):
            raise ValueError(f"snapshot must be taken after these {len(tokens)} tokens, got one of others "
                             f"({snapshot.position})")
        packed = codec.pack(snapshot, self.storage)
        with self._lock:
            self._error = max(self._error, packed.error)
            self._memory.put(tokens, snapshot, packed, pin=pin)
        if self._disk is not None:
            self._disk.put(packed, pin=pin)

    def read(self, tokens: Iterable[int]) -> Snapshot:
        """Return the state after `tokens`, read on from the longest beginning that is kept, and keep it.

        Unlike `prefill` with a pool it goes on anywhere, also after tokens that were written one by one: the result is
        that of any other reading up to rounding.
        """
        tokens = as_array(tokens)
        start = self.find(tokens)
        if start is None:
            return prefill(self.model, tokens, pool=self)
        if start.position == len(tokens):
            return start
        found = prefill(self.model, tokens[start.position :], start=start)
        found = dataclasses.replace(found, segment=None, digest=digest(tokens))
        self.put(tokens, found)
        return found

    def batch(self, prompts: Sequence[Iterable[int]]) -> Batch:
        """Return prompts of any lengths as rows to read on side by side, each `read` from where it is known."""
        rows = [as_array(prompt) for prompt in prompts]
        return Batch(self.model, [self.read(row) for row in rows], rows)

    def pin(self, tokens: Iterable[int], *, pinned: bool = True) -> None:
        """Keep the state after exactly these tokens whatever room is needed, or, with False, no longer.

        Raises ValueError when no tier has it, OSError when the folder cannot be written.
        """
        tokens = as_array(tokens)
        with self._lock:
            places = [kept for kept in self._memory.along(tokens) if kept.position == len(tokens)]
            for kept in places:
                kept.pinned = pinned
        names = [] if self._disk is None else self._disk.matching(self._current(), tokens)
        names = [name for name in names if name.position == len(tokens)]
        for name in names:
            name.set_pin(pinned)
        if not places and not names:
            raise ValueError(f"tokens must be those of a state that is kept, got {len(tokens)} that none is kept of")

    def stats(self) -> Stats:
        """Return what the tiers hold, and how often something was found."""
        with self._lock:
            return Stats(self._memory.device.usage(), self._memory.host.usage(),
                         Usage() if self._disk is None else self._disk.usage(), self._hits, self._misses, self._error)

    def _from_disk(self, name: Name, tokens: array[int]) -> Snapshot | None:
        assert self._disk is not None
        packed = self._disk.get(name)
        if packed is None:
            return None
        snapshot = codec.unpack(packed, states.device_of(self.model))
        with self._lock:
            self._memory.put(tokens[: name.position], snapshot, packed, pin=name.pin.exists())
        return snapshot

    def _current(self) -> str:
        """Return the model's identity; with new weights, what memory holds of the old ones is forgotten."""
        identity = states.identity(self.model)
        with self._lock:
            if identity != self._identity:
                self._identity = identity
                self._memory = Memory(states.device_of(self.model), *self._bytes)
        return identity


def _budget(name: str, given: int | None, least: int, free: float) -> int:
    if given is None:
        return int(free) if free >= least else 0
    if given != 0 and given < least:
        raise ValueError(f"{name} must be 0 or at least the {least} bytes of one state, got {given}")
    return given


def _free_on_disk(folder: Path) -> int:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free
