"""Read pieces one after another: the cache moves on, and the state before a piece is kept until the piece is read."""

from __future__ import annotations

from array import array
from typing import Any, Protocol

import torch
from torch import Tensor

from torch_xlstm_ops import trace
from torch_xlstm_ops.context import states
from torch_xlstm_ops.context.piece_size import Allocation, is_out_of_memory
from torch_xlstm_ops.context.states import Snapshot
from torch_xlstm_ops.context.tokens import Digest, Source
from torch_xlstm_ops.models import transformers as adapter

_BLOCK = 1 << 16  # tokens that are skipped at once


class Pool(Protocol):
    """Where snapshots are put and found again; `StatePool` is one."""

    @property
    def longest(self) -> int:
        """Return the tokens of the longest past that is kept."""

    def find(self, tokens: array[int], *, segment: int | None) -> Snapshot | None:
        """Return the snapshot of the longest beginning of tokens that was read in pieces of `segment`."""

    def put(self, tokens: array[int], snapshot: Snapshot) -> None:
        """Keep a snapshot that was taken after these tokens."""


class Reader:
    """A model, the tokens it is to read, and the snapshot of those it has read: `last`, None before the first."""

    def __init__(self, model: Any, source: Source, allocation: Allocation, pool: Pool | None, identity: str) -> None:
        self.last: Snapshot | None = None
        self.source = source
        self._model, self._allocation, self._pool = model, allocation, pool
        self._identity, self.device = identity, states.device_of(model)
        self._segment: int | None = allocation.size  # None once pieces were of different sizes
        self._digest = Digest()
        self._tokens: array[int] = array("i")  # all of them, for a pool alone
        self._cache = adapter.empty_cache(model)

    @property
    def position(self) -> int:
        """Return the tokens read."""
        return 0 if self.last is None else self.last.position

    def go_on(self, start: Snapshot) -> None:
        """Begin at a snapshot of what came before the source's first token."""
        self._digest = Digest(start.digest)
        self._begin(start)

    def find(self, saved: Snapshot | None, where: str) -> None:
        """Begin after those of the source's own tokens that were read already, as a saved snapshot or the pool has it.

        Raises Refused if the saved one was taken of other tokens.
        """
        if self._pool is not None:
            found = self._pool.find(self.source.look(self._pool.longest + 1), segment=self._allocation.size)
            if found is not None and (saved is None or found.position > saved.position):
                saved, where = found, "the pool's state"
        if saved is not None:
            self._skip(saved, where)

    def _skip(self, start: Snapshot, where: str) -> None:
        skipped = 0
        while piece := self.source.take(min(_BLOCK, start.position - skipped)):
            self._note(piece)
            skipped += len(piece)
        if self._digest.hex() != start.digest:
            raise states.Refused(f"tokens must begin with the {start.position} that {where} was saved after, got "
                                 "others")
        self._begin(start)

    def advance(self) -> bool:
        """Read the next piece; return False where there is none."""
        self._allocation.adapt()
        while True:
            size = self._allocation.size
            piece = self.source.take(size - self.position % size)
            if not piece:
                return False
            try:
                with trace.span("model", phase="prefill", device=self.device):
                    logits = states.read(self._model, torch.tensor([piece.tolist()], device=self.device), self._cache)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._allocation.shrink(error)
            else:
                self._take_in(piece, logits, size)
                return True
            self.source.put_back(piece)
            self._cache = self._restored()  # the failed piece may have written into some layers

    def _take_in(self, piece: array[int], logits: Tensor, size: int) -> None:
        self._note(piece)
        if size != self._segment:
            self._segment = None
        self.last = Snapshot(self._identity, self.position + len(piece), self._digest.hex(), self._segment,
                             states.capture(self._cache), logits[0].clone())
        if self._pool is not None:
            self._pool.put(self._tokens, self.last)

    def _note(self, piece: array[int]) -> None:
        self._digest.add(piece)
        if self._pool is not None:
            self._tokens += piece

    def _begin(self, start: Snapshot) -> None:
        self.last = start
        if not start.aligned(self._segment):
            self._segment = None
        self._cache = self._restored()

    def _restored(self) -> Any:
        return adapter.empty_cache(self._model) if self.last is None else states.restore(self._model, [self.last])
