"""`StatePool`: snapshots on the device, on the host and on disk, found by the longest prefix of a prompt."""

from __future__ import annotations

import dataclasses
import shutil
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from torch_xlstm_ops.context import codec, states
from torch_xlstm_ops.context.batch import Batch
from torch_xlstm_ops.context.codec import Storage
from torch_xlstm_ops.context.pool.disk import DiskTier
from torch_xlstm_ops.context.pool.file_names import StateName
from torch_xlstm_ops.context.pool.memory import MemoryTiers, Usage
from torch_xlstm_ops.context.prefill import prefill
from torch_xlstm_ops.context.states import Snapshot
from torch_xlstm_ops.context.tokens import as_array, digest
from torch_xlstm_ops.models import transformers as adapter
from torch_xlstm_ops.models.identity import identity as identity_of
from torch_xlstm_ops.runtime import devices, forks

DEVICE_SHARE, HOST_SHARE, DISK_SHARE = 1 / 16, 1 / 8, 1 / 10  # default budgets, of what is free at construction


class Stats(NamedTuple):
    """What a pool holds in each tier, its hits and misses, and the largest relative error that `storage` caused.

    disk counts the states of all models in the folder. A tier that is off has zeros.
    """

    device: Usage
    host: Usage
    disk: Usage  # all models' states in the folder
    hits: int
    misses: int
    error: float  # the largest relative error of a state that was put, from `storage`


class StatePool:
    """Snapshots of one model, found by the longest prefix of a prompt that was read before.

    A put writes to every tier; a full tier evicts the least recently used. A snapshot that is found on a slower tier
    is added to the faster ones. Threads may share a pool, and processes its folder.

    model: a transformers xLSTM; states of other models, and of this one with other weights, are never found.
    folder: of the disk tier; default none.
    device_bytes, host_bytes, disk_bytes: budgets; 0 turns a tier off; default a share of what is free now, and no
        device tier on the CPU, where the host is the device.
    storage: full, bf16 or int8, on the host and on disk: fewer bytes, with an error that `stats` returns.

    Raises ValueError for a budget that is smaller than one state of the model.
    """

    def __init__(
        self, model: Any, folder: str | Path | None = None, *, device_bytes: int | None = None,
        host_bytes: int | None = None, disk_bytes: int | None = None, storage: Storage | str = Storage.FULL,
    ) -> None:
        self.model, self.storage = model, Storage(storage)
        self._outline = outline = states.outline(model)
        least = codec.encoded_bytes(outline, self.storage)
        path, host, device = None if folder is None else Path(folder), torch.device("cpu"), adapter.device_of(model)
        if path is None and disk_bytes:
            raise ValueError(f"disk_bytes must come with folder, got {disk_bytes} without")
        free = 0 if device == host else devices.available(device) or 0
        self._bytes = (_budget("device_bytes", device_bytes, outline.nbytes, DEVICE_SHARE * free),
                       _budget("host_bytes", host_bytes, least, HOST_SHARE * (devices.available(host) or 0)))
        disk = _budget("disk_bytes", disk_bytes, least, 0 if path is None else DISK_SHARE * _free_on_disk(path))
        self._disk = None if path is None or not disk else DiskTier(path, disk)
        self._lock = forks.new_rlock()
        self._identity = identity_of(model)
        self._memory = MemoryTiers(device, *self._bytes)
        self._hits = self._misses = 0
        self._error = 0.0

    @property
    def longest(self) -> int:
        """Return the tokens of the longest prefix that is kept."""
        on_disk = [] if self._disk is None else [name.position for name in self._disk.names(self._current_identity())]
        with self._lock:
            return max(self._memory.longest, *on_disk, 0)

    def find(self, tokens: Iterable[int], *, segment: int | None = None) -> Snapshot | None:
        """Return the snapshot of the longest prefix of `tokens`, or None.

        segment: only a snapshot that reading `tokens` in pieces of this size would pass through, bit for bit if
            `storage` is full; default any, also one after tokens that were decoded one by one.
        """
        tokens = as_array(tokens)
        identity = self._current_identity()

        def fits(position: int, pieces: int | None) -> bool:
            return segment is None or (pieces == segment and (position % segment == 0 or position == len(tokens)))

        with self._lock:
            kept = [entry for entry in self._memory.prefixes(tokens) if fits(entry.position, entry.segment)]
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
        """Keep a snapshot that was taken after `tokens`; warn if a tier cannot.

        pin: never evict it; default False.
        Raises ValueError for the snapshot of another model or of other tokens.
        """
        tokens = as_array(tokens)
        if snapshot.position != len(tokens) or snapshot.digest != digest(tokens):
            raise ValueError(f"snapshot must be taken after these {len(tokens)} tokens, got one of others "
                             f"({snapshot.position})")
        self._put(tokens, snapshot, None, pin=pin)

    def extend(self, tokens: array[int], snapshot: Snapshot, prefix: str | None) -> None:
        """Do what `put` does for a snapshot whose digest is known to be that of `tokens`, which are not hashed again.

        prefix: the digest of a prefix of `tokens`, which is not compared again; None for no such prefix.
        Raises ValueError for the snapshot of another model.
        """
        self._put(tokens, snapshot, prefix, pin=False)

    def _put(self, tokens: array[int], snapshot: Snapshot, prefix: str | None, *, pin: bool) -> None:
        identity = self._current_identity()
        if snapshot.identity != identity:
            raise ValueError(f"snapshot must be of the pool's model {identity}, got one of {snapshot.identity}")
        encoded = codec.encode(snapshot, self.storage)
        with self._lock:
            self._error = max(self._error, encoded.error)
            self._memory.put(tokens, snapshot, encoded, pin=pin, prefix=prefix)
        if self._disk is not None:
            self._disk.put(encoded, pin=pin)

    def read(self, tokens: Iterable[int]) -> Snapshot:
        """Return the state after `tokens`, read from the longest prefix that is kept, and keep it.

        Unlike `prefill` with a pool it resumes from any state, also one after tokens that were decoded one by one: the
        result equals that of any other reading up to rounding.
        """
        tokens = as_array(tokens)
        start = self.find(tokens)
        if start is None:
            return prefill(self.model, tokens, pool=self)
        if start.position == len(tokens):
            return start
        found = prefill(self.model, tokens[start.position :], start=start)
        found = dataclasses.replace(found, segment=None, digest=digest(tokens))
        self.extend(tokens, found, start.digest)
        return found

    def batch(self, prompts: Sequence[Iterable[int]]) -> Batch:
        """Return prompts of any lengths as the rows of a batch, each read as by `read`."""
        rows = [as_array(prompt) for prompt in prompts]
        return Batch(self.model, [self.read(row) for row in rows], rows)

    def pin(self, tokens: Iterable[int], *, pinned: bool = True) -> None:
        """Protect the state after exactly these tokens from eviction, or, with False, end the protection.

        Raises ValueError if no tier has it, OSError if the folder cannot be written.
        """
        tokens = as_array(tokens)
        with self._lock:
            entries = [entry for entry in self._memory.prefixes(tokens) if entry.position == len(tokens)]
            for entry in entries:
                entry.pinned = pinned
        names = [] if self._disk is None else self._disk.matching(self._current_identity(), tokens)
        names = [name for name in names if name.position == len(tokens)]
        for name in names:
            name.set_pin(pinned)
        if not entries and not names:
            raise ValueError(f"tokens must be those of a state that is kept, got {len(tokens)} without a state")

    def stats(self) -> Stats:
        """Return what the tiers hold, and the hits and misses of `find`."""
        with self._lock:
            return Stats(self._memory.device.usage(), self._memory.host.usage(),
                         Usage() if self._disk is None else self._disk.usage(), self._hits, self._misses, self._error)

    def _from_disk(self, name: StateName, tokens: array[int]) -> Snapshot | None:
        assert self._disk is not None
        encoded = self._disk.get(name, self._outline)
        if encoded is None:
            return None
        snapshot = codec.decode(encoded, adapter.device_of(self.model))
        with self._lock:
            self._memory.put(tokens[: name.position], snapshot, encoded, pin=name.pin.exists())
        return snapshot

    def _current_identity(self) -> str:
        """Return the model's identity; if it changed, drop what memory holds."""
        identity = identity_of(self.model)
        with self._lock:
            if identity != self._identity:
                self._identity, self._outline = identity, states.outline(self.model)
                self._memory = MemoryTiers(adapter.device_of(self.model), *self._bytes)
        return identity


def _budget(name: str, given: int | None, least: int, free: float) -> int:
    if given is None:
        return int(free) if free >= least else 0
    if given != 0 and given < least:
        raise ValueError(f"{name} must be 0 or at least the {least} bytes of one state, got {given}")
    return given


def _free_on_disk(folder: Path) -> int:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free
