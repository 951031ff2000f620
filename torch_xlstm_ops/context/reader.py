"""Read a prompt piece by piece: each piece advances the cache, and the snapshot before it is kept until it is read."""

from __future__ import annotations

from array import array
from typing import Any, Protocol

import torch
from torch import Tensor

from torch_xlstm_ops import trace
from torch_xlstm_ops.context import states
from torch_xlstm_ops.context.piece_size import PieceSize, is_out_of_memory
from torch_xlstm_ops.context.states import Snapshot
from torch_xlstm_ops.context.tokens import TokenDigest, TokenSource
from torch_xlstm_ops.models import transformers as adapter

_SKIPPED_TOKENS = 1 << 16  # hashed at once


class SnapshotStore(Protocol):
    """A place to put snapshots and find them again; `StatePool` is one."""

    @property
    def longest(self) -> int:
        """Return the tokens of the longest prefix that is kept."""

    def find(self, tokens: array[int], *, segment: int | None) -> Snapshot | None:
        """Return the snapshot of the longest prefix of tokens that was read in pieces of `segment`."""

    def put(self, tokens: array[int], snapshot: Snapshot) -> None:
        """Keep a snapshot that was taken after these tokens."""

    def extend(self, tokens: array[int], snapshot: Snapshot, prefix: str | None) -> None:
        """Do what `put` does for a snapshot whose digest is known to be that of `tokens`.

        prefix: the digest of a prefix of `tokens`, or None.
        """


class PromptReader:
    """A model, the tokens that it reads, and the snapshot after those it has read: `last`, None before the first."""

    def __init__(
        self, model: Any, source: TokenSource, size: PieceSize, pool: SnapshotStore | None, identity: str
    ) -> None:
        self.last: Snapshot | None = None
        self.source = source
        self._model, self._size, self._pool = model, size, pool
        self._identity, self.device = identity, adapter.device_of(model)
        self._segment: int | None = size.tokens  # None once pieces had different sizes
        self._digest = TokenDigest()
        self._tokens: array[int] = array("i")  # all tokens since the first; only with a pool
        self._cache = adapter.empty_cache(model)

    @property
    def position(self) -> int:
        """Return the number of tokens read."""
        return 0 if self.last is None else self.last.position

    def resume(self, start: Snapshot) -> None:
        """Start from a snapshot of the tokens before the source's first."""
        self._digest = TokenDigest(start.digest)
        self._start_from(start)

    def resume_prefix(self, saved: Snapshot | None, where: str) -> None:
        """Start after the longest prefix of the source's tokens that the saved snapshot or the pool holds.

        Raises StateMismatch if the saved one was taken after other tokens.
        """
        if self._pool is not None:
            found = self._pool.find(self.source.peek(self._pool.longest + 1), segment=self._size.tokens)
            if found is not None and (saved is None or found.position > saved.position):
                saved, where = found, "the pool's state"
        if saved is not None:
            self._skip(saved, where)

    def _skip(self, start: Snapshot, where: str) -> None:
        skipped = 0
        while piece := self.source.take(min(_SKIPPED_TOKENS, start.position - skipped)):
            self._append(piece)
            skipped += len(piece)
        if self._digest.hex() != start.digest:
            raise states.StateMismatch(f"tokens must begin with the {start.position} that {where} was saved after, got "
                                       "others")
        self._start_from(start)

    def advance(self) -> bool:
        """Read the next piece; return False if there is none."""
        self._size.adapt()
        while True:
            size = self._size.tokens
            piece = self.source.take(size - self.position % size)
            if not piece:
                return False
            try:
                with trace.span("model", phase="prefill", device=self.device):
                    ids = torch.tensor([piece.tolist()], device=self.device)
                    logits = adapter.forward_last(self._model, ids, self._cache).logits
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._size.shrink(error)
            else:
                self._finish(piece, logits, size)
                return True
            self.source.put_back(piece)
            self._cache = self._restored()  # the failed piece may have updated some layers

    def _finish(self, piece: array[int], logits: Tensor, size: int) -> None:
        self._append(piece)
        if size != self._segment:
            self._segment = None
        before, self.last = self.last, Snapshot(
            self._identity, self.position + len(piece), self._digest.hex(), self._segment,
            states.capture(self._cache), logits[0].clone())
        if self._pool is not None:
            self._pool.extend(self._tokens, self.last, None if before is None else before.digest)

    def _append(self, piece: array[int]) -> None:
        self._digest.add(piece)
        if self._pool is not None:
            self._tokens += piece

    def _start_from(self, start: Snapshot) -> None:
        self.last = start
        if not start.aligned(self._segment):
            self._segment = None
        self._cache = self._restored()

    def _restored(self) -> Any:
        return adapter.empty_cache(self._model) if self.last is None else states.restore(self._model, [self.last])
