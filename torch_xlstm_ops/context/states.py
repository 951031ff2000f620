"""A model's recurrent state as data: `Snapshot`, its checks against a model, and a cache made from snapshots.

The model is one of transformers' xLSTM, patched or not; `models.transformers` reads and writes its cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_xlstm_ops.maths.shapes import MLSTMState
from torch_xlstm_ops.models import transformers as adapter
from torch_xlstm_ops.models.identity import identity

UNIDENTIFIED = ""  # the identity in snapshots of `prefill(identify=False)`


class StateMismatch(ValueError):
    """A state is of another model, or of other tokens."""


@dataclasses.dataclass(frozen=True, eq=False)
class Snapshot:
    """A model's state after `position` tokens, one row of a batch, and the logits (V,) after the last of them.

    identity: hash of the model's config and weights. digest: hash of the tokens. segment: tokens a piece, if all had
    this size. layers: an `MLSTMState` of each layer, with B = 1.
    """

    identity: str  # of the model's config and weights; empty if it was not computed
    position: int  # tokens read
    digest: str  # of those tokens
    segment: int | None  # tokens per piece if all pieces since the first token had this size, else None
    layers: tuple[MLSTMState, ...]  # c (1, NH, DHQK, DHHV), n (1, NH, DHQK), m (1, NH, 1)
    logits: Tensor  # (V,), after the last token

    @property
    def nbytes(self) -> int:
        """Return the bytes of the tensors."""
        return self.logits.nbytes + sum(tensor.nbytes for layer in self.layers for tensor in layer)

    def to(self, device: torch.device) -> Snapshot:
        """Return the snapshot on a device; itself if it is already there."""
        if self.logits.device == device:
            return self
        layers = tuple(MLSTMState(*(tensor.to(device) for tensor in layer)) for layer in self.layers)
        return dataclasses.replace(self, layers=layers, logits=self.logits.to(device))

    def aligned(self, segment: int | None) -> bool:
        """Return whether reading in pieces of `segment` tokens from the beginning produces this very state."""
        return segment is not None and self.segment == segment and self.position % segment == 0


def outline(model: Any) -> Snapshot:
    """Return a snapshot with the shapes and dtypes of a model's states, on the meta device, without storage."""
    layers = tuple(MLSTMState(*layer) for layer in adapter.layers(adapter.empty_cache(model, device="meta")))
    logits = torch.empty(adapter.output_embeddings(model).out_features, device="meta")
    return Snapshot(UNIDENTIFIED, 0, "", None, layers, logits)


def capture(cache: Any, row: int = 0) -> tuple[MLSTMState, ...]:
    """Return a copy of one row of every layer's state."""
    return tuple(MLSTMState(*layer) for layer in adapter.copy_row(cache, row))


def restore(model: Any, snapshots: Sequence[Snapshot]) -> Any:
    """Return a cache whose rows are copies of snapshots, which may be at different positions.

    Raises StateMismatch, a ValueError, for the snapshot of another model, TypeError for states of another dtype.
    """
    for snapshot in snapshots:
        check_fits(model, snapshot)
    return adapter.cache_of_rows(model, [snapshot.layers for snapshot in snapshots],
                                 max(snapshot.position for snapshot in snapshots))


def check_identity(model: Any, given: str) -> None:
    """Raise StateMismatch unless a snapshot's identity is that of the model, or UNIDENTIFIED."""
    if given != UNIDENTIFIED and given != (own := identity(model)):
        raise StateMismatch(f"snapshot must be of the model with identity {own}, got one of {given}")


def check_fits(model: Any, snapshot: Snapshot) -> None:
    """Raise StateMismatch unless a snapshot is of this model, TypeError unless it has the dtype of its cache."""
    check_identity(model, snapshot.identity)
    wanted = outline(model).layers[0].c.dtype
    for layer in snapshot.layers:
        for tensor in layer:
            if tensor.dtype != wanted:
                raise TypeError(f"snapshot must hold states of {wanted} as this model's cache does, got {tensor.dtype} "
                                "(a patched model keeps float32)")
