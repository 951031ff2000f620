"""A model's whole past as data: a `Snapshot` of every layer's state, whose model it is, and the way in and out.

The model is one of transformers' xLSTM, patched or not; the states are in its cache, which `models.transformers` reads.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_xlstm_ops.maths.shapes import MLSTMState
from torch_xlstm_ops.models import transformers as adapter

UNKNOWN = ""  # the identity of a model that nobody asked for

# What transformers keeps in a config that changes no number.
_IDLE = frozenset(("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache",
                   "mode", "return_last_states", "output_hidden_states", "output_attentions", "return_dict"))


class Refused(ValueError):
    """A state was given that is of another model, or of other tokens."""


@dataclasses.dataclass(frozen=True, eq=False)
class Snapshot:
    """All that a model knows after `position` tokens, and what it expects next; one row."""

    identity: str  # of the model's config and weights; empty where nobody asked for it
    position: int  # tokens read
    digest: str  # of those tokens
    segment: int | None  # tokens a piece when all were read so from the first on; None where they were not
    layers: tuple[MLSTMState, ...]  # c (1, NH, DHQK, DHHV), n (1, NH, DHQK), m (1, NH, 1)
    logits: Tensor  # (V,), after the last token

    @property
    def nbytes(self) -> int:
        """Return the bytes of the tensors."""
        return self.logits.nbytes + sum(tensor.nbytes for layer in self.layers for tensor in layer)

    def to(self, device: torch.device) -> Snapshot:
        """Return the snapshot on a device, itself where it is there already."""
        if self.logits.device == device:
            return self
        layers = tuple(MLSTMState(*(tensor.to(device) for tensor in layer)) for layer in self.layers)
        return dataclasses.replace(self, layers=layers, logits=self.logits.to(device))

    def aligned(self, segment: int | None) -> bool:
        """Return whether a whole reading in pieces of `segment` tokens passes through this very state."""
        return segment is not None and self.segment == segment and self.position % segment == 0


def device_of(model: Any) -> torch.device:
    """Return the device that a model reads tokens on."""
    return model.get_input_embeddings().weight.device  # type: ignore[no-any-return]


def outline(model: Any) -> Snapshot:
    """Return a snapshot of the shapes and dtypes that a model's have, on the meta device, where nothing is stored."""
    layers = tuple(MLSTMState(*layer) for layer in adapter.layers(adapter.empty_cache(model, device="meta")))
    logits = torch.empty(adapter.output_embeddings(model).out_features, device="meta")
    return Snapshot("", 0, "", None, layers, logits)


@torch.no_grad()
def read(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """Move a cache on by tokens (B, S), and return the logits (B, V) after the last; the head sees that one alone."""
    with adapter.last_position_only(model):
        return adapter.run(model, ids, cache).logits[:, -1]


def capture(cache: Any, row: int = 0) -> tuple[MLSTMState, ...]:
    """Return a copy of one row of every layer's state."""
    return tuple(MLSTMState(*(tensor[row : row + 1].clone() for tensor in layer)) for layer in adapter.layers(cache))


@torch.no_grad()
def restore(model: Any, snapshots: Sequence[Snapshot]) -> Any:
    """Return a cache whose rows are copies of snapshots; they may stand at different positions.

    Raises Refused, a ValueError, for the snapshot of another model, TypeError for states of another dtype.
    """
    cache = adapter.empty_cache(model, len(snapshots))
    for snapshot in snapshots:
        check_fits(model, snapshot)
    for index, states in enumerate(adapter.layers(cache)):
        for part, tensor in enumerate(states):
            for row, snapshot in enumerate(snapshots):
                tensor[row].copy_(snapshot.layers[index][part][0])
    adapter.place(cache, max(snapshot.position for snapshot in snapshots))
    return cache


def check_fits(model: Any, snapshot: Snapshot) -> None:
    """Raise Refused unless a snapshot is one of this model, TypeError unless it is in the dtype of its cache."""
    if snapshot.identity != UNKNOWN and snapshot.identity != (own := identity(model)):
        raise Refused(f"snapshot must be of the model with identity {own}, got one of {snapshot.identity}")
    wanted = outline(model).layers[0].c.dtype
    for layer in snapshot.layers:
        for tensor in layer:
            if tensor.dtype != wanted:
                raise TypeError(f"snapshot must hold states of {wanted} as this model's cache does, got {tensor.dtype} "
                                "(a patched model keeps float32)")


_known: weakref.WeakKeyDictionary[Any, tuple[object, str]] = weakref.WeakKeyDictionary()


def identity(model: Any) -> str:
    """Return a hash of a model's config and weights, and of the dtype that its states have, which patches may change.

    Found once, and again when a weight was written since.
    """
    weights = model.state_dict(keep_vars=True)
    states = adapter.layers(adapter.empty_cache(model, device="meta"))[0][0].dtype
    written = (states, *((tensor.data_ptr(), None if tensor.is_inference() else tensor._version)
                         for tensor in weights.values()))
    known = _known.get(model)
    if known is None or known[0] != written:
        known = _known[model] = (written, _hash(model.config.to_dict(), weights, states))
    return known[1]


def _hash(config: dict[str, Any], weights: dict[str, Tensor], states: torch.dtype) -> str:
    found = hashlib.blake2b(digest_size=16)
    kept = {name: value for name, value in config.items() if name not in _IDLE}
    found.update(json.dumps([kept, str(states)], sort_keys=True, default=str).encode())
    for name, tensor in weights.items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(raw_bytes(tensor))
    return found.hexdigest()


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes as they are in memory, row by row."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]
