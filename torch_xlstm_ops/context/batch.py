"""Rows that a model reads side by side, each with a past of its own: branches of one prompt, or prompts of any lengths.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_xlstm_ops.context import states
from torch_xlstm_ops.context.piece_size import Allocation, is_out_of_memory
from torch_xlstm_ops.context.reader import Pool
from torch_xlstm_ops.context.states import Snapshot
from torch_xlstm_ops.context.tokens import as_array, digest
from torch_xlstm_ops.models import transformers as adapter


class Batch:
    """A cache of B rows. The recurrence knows no positions, so rows may stand at different ones.

    A row's numbers are those of the row alone up to rounding: products of several rows are summed in another order.

    model: a transformers xLSTM. snapshots: what each row begins with; the same one several times is a fork.
    tokens: what each snapshot was taken after.

    Raises ValueError for no rows, for tokens that are not as many as a snapshot's, for snapshots of another model.
    """

    def __init__(self, model: Any, snapshots: Sequence[Snapshot], tokens: Sequence[Iterable[int]]) -> None:
        self.model = model
        self.tokens = [as_array(row)[:] for row in tokens]  # of each row, the new ones too
        positions, lengths = [snapshot.position for snapshot in snapshots], [len(row) for row in self.tokens]
        if not positions or positions != lengths:
            raise ValueError(f"tokens must be those before the snapshots, {positions} each and one row at least, got "
                             f"{lengths}")
        self._cache = states.restore(model, snapshots)
        self._allocation = Allocation(model, states.device_of(model))
        self.logits = torch.stack([snapshot.logits for snapshot in snapshots])  # (B, V), after each row's last token

    def __len__(self) -> int:
        return len(self.tokens)

    @torch.no_grad()
    def read(self, tokens: Sequence[Iterable[int]]) -> Tensor:
        """Read more tokens, a sequence a row of any lengths; return the logits (B, V) after each row's last.

        As many rows as still have tokens are read at once. What finds no memory is read in halves, with a warning.
        """
        rows = [as_array(row) for row in tokens]
        if len(rows) != len(self):
            raise ValueError(f"tokens must be {len(self)} rows, got {len(rows)}")
        logits, done = self.logits.clone(), 0
        while active := [index for index, row in enumerate(rows) if len(row) > done]:
            count = min(len(rows[index]) for index in active) - done
            count = min(count, max(1, self._allocation.size // len(active)))
            try:
                logits[active] = self._read(active, [rows[index][done : done + count].tolist() for index in active])
            except (RuntimeError, MemoryError) as error:
                if count == 1 or not is_out_of_memory(error):
                    raise
                self._allocation.shrink(error)
            else:
                done += count
        for row, added in zip(self.tokens, rows, strict=True):
            row += added
        self.logits = logits
        return logits

    def _read(self, active: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Read tokens (B, S) with some rows; if it fails on more than one token, the rows are as they were."""
        in_place = len(active) == len(self) and len(tokens[0]) == 1
        part = self._cache if in_place else _take(self.model, self._cache, active)
        logits = states.read(self.model, torch.tensor(tokens, device=self.logits.device), part)
        if not in_place:
            _put(self._cache, active, part)
        return logits

    def select(self, rows: Sequence[int]) -> Batch:
        """Return a batch of some rows, which may be the same one several times; this one stays as it is."""
        return Batch(self.model, [self.snapshot(row) for row in rows], [self.tokens[row] for row in rows])

    def snapshot(self, row: int) -> Snapshot:
        """Return a row's state."""
        tokens = self.tokens[row]
        return Snapshot(states.identity(self.model), len(tokens), digest(tokens), None,
                        states.capture(self._cache, row), self.logits[row].clone())

    def put(self, pool: Pool) -> None:
        """Merge back: keep every row's state in a pool, where later prompts find it."""
        for row, tokens in enumerate(self.tokens):
            pool.put(tokens, self.snapshot(row))


def _take(model: Any, cache: Any, rows: Sequence[int]) -> Any:
    taken = adapter.empty_cache(model, len(rows))
    adapter.put_layers(taken, [(c[rows], n[rows], m[rows]) for c, n, m in adapter.layers(cache)])
    return taken


def _put(cache: Any, rows: Sequence[int], part: Any) -> None:
    for layer, changed in zip(adapter.layers(cache), adapter.layers(part), strict=True):
        for tensor, new in zip(layer, changed, strict=True):
            tensor[rows] = new
