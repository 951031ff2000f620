"""Rows that a model reads in one batch, each from a state of its own: branches of one prompt, or several prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_xlstm_ops.context import states
from torch_xlstm_ops.context.piece_size import PieceSize, is_out_of_memory
from torch_xlstm_ops.context.reader import SnapshotStore
from torch_xlstm_ops.context.states import Snapshot
from torch_xlstm_ops.context.tokens import as_array, digest
from torch_xlstm_ops.models import transformers as adapter
from torch_xlstm_ops.models.identity import identity as identity_of


class Batch:
    """A cache of B rows. The recurrence does not use positions, so rows may be at different ones.

    A row equals the same row read alone up to rounding: products of several rows are summed in another order.

    model: a transformers xLSTM. snapshots: the state that each row starts from; the same one several times is a fork.
    tokens: what each snapshot was taken after.

    Raises ValueError for no rows, for tokens that are not as many as a snapshot's, for snapshots of another model.
    """

    def __init__(self, model: Any, snapshots: Sequence[Snapshot], tokens: Sequence[Iterable[int]]) -> None:
        self.model = model
        self.tokens = [as_array(row)[:] for row in tokens]  # of each row, those read later included
        positions, lengths = [snapshot.position for snapshot in snapshots], [len(row) for row in self.tokens]
        if not positions or positions != lengths:
            raise ValueError(f"tokens must be those before the snapshots, {positions} each and one row at least, got "
                             f"{lengths}")
        self._cache = states.restore(model, snapshots)
        self._piece = PieceSize(model, adapter.device_of(model))
        self.logits = torch.stack([snapshot.logits for snapshot in snapshots])  # (B, V), after each row's last token

    def __len__(self) -> int:
        return len(self.tokens)

    @torch.no_grad()
    def read(self, tokens: Sequence[Iterable[int]]) -> Tensor:
        """Read more tokens, one sequence of any length per row; return the logits (B, V) after each row's last.

        All rows that have tokens left are read together. What runs out of memory is read in halves, with a warning.
        """
        rows = [as_array(row) for row in tokens]
        if len(rows) != len(self):
            raise ValueError(f"tokens must be {len(self)} rows, got {len(rows)}")
        logits, done = self.logits.clone(), 0
        while active := [index for index, row in enumerate(rows) if len(row) > done]:
            count = min(len(rows[index]) for index in active) - done
            count = min(count, max(1, self._piece.tokens // len(active)))
            try:
                logits[active] = self._read(active, [rows[index][done : done + count].tolist() for index in active])
            except (RuntimeError, MemoryError) as error:
                if count == 1 or not is_out_of_memory(error):
                    raise
                self._piece.shrink(error)
            else:
                done += count
        for row, added in zip(self.tokens, rows, strict=True):
            row += added
        self.logits = logits
        return logits

    def _read(self, active: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Read tokens (B, S) with some rows; an error with more than one token leaves the rows unchanged."""
        in_place = len(active) == len(self) and len(tokens[0]) == 1
        part = self._cache if in_place else adapter.take_rows(self.model, self._cache, active)
        logits = adapter.forward_last(self.model, torch.tensor(tokens, device=self.logits.device), part).logits
        if not in_place:
            adapter.put_rows(self._cache, active, part)
        return logits

    def select(self, rows: Sequence[int]) -> Batch:
        """Return a batch of copies of some rows, which may repeat; this batch does not change."""
        return Batch(self.model, [self.snapshot(row) for row in rows], [self.tokens[row] for row in rows])

    def snapshot(self, row: int) -> Snapshot:
        """Return a row's state."""
        tokens = self.tokens[row]
        return Snapshot(identity_of(self.model), len(tokens), digest(tokens), None,
                        states.capture(self._cache, row), self.logits[row].clone())

    def put(self, pool: SnapshotStore) -> None:
        """Put every row's state into a pool, where later prompts find it."""
        for row, tokens in enumerate(self.tokens):
            pool.extend(tokens, self.snapshot(row), None)
