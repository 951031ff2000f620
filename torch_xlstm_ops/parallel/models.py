"""A model, or its cache, on its way: without its tensors, which go through the object store.

So the workers of a host share one copy of the weights.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops.models import transformers as adapter
from torch_xlstm_ops.schedules.ray import serialization

Call = Callable[[Any, Tensor, int], tuple[Tensor, Any]]


class Parcel(NamedTuple):
    """An object without its tensors, and those."""

    skeleton: bytes
    tensors: list[serialization.Packed]


class _Place(NamedTuple):
    """Which tensor stands somewhere in the object."""

    number: int
    learns: bool | None  # None for a tensor that is no parameter


def pack(value: object) -> Parcel:
    """Take an object apart."""
    from ray import cloudpickle

    found: dict[int, tuple[int, Tensor]] = {}

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        def persistent_id(self, part: object) -> _Place | None:
            if not isinstance(part, Tensor):
                return None
            number, _ = found.setdefault(id(part), (len(found), part))
            return _Place(number, part.requires_grad if isinstance(part, torch.nn.Parameter) else None)

    file = io.BytesIO()
    Pickler(file).dump(value)
    return Parcel(file.getvalue(), serialization.pack(part for _, part in found.values()))


def unpack(parcel: Parcel, device: torch.device, *, owned: bool) -> Any:
    """Put an object together on a device.

    owned: copy the tensors out of the store; otherwise, on the CPU, they may lie there and are only to be read.
    """
    tensors = serialization.unpack(parcel.tensors, device)
    made: dict[_Place, Tensor] = {}

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, place: Any) -> Tensor:
            if place not in made:
                t = tensors[place.number].clone() if owned else tensors[place.number]
                made[place] = t if place.learns is None else torch.nn.Parameter(t, place.learns)
            return made[place]

    return Unpickler(io.BytesIO(parcel.skeleton)).load()


def transformers_call(model: Any, tokens: Tensor, before: int) -> tuple[Tensor, Any]:
    """Run an xLSTM of transformers over tokens (B, S) that stand behind `before` others, as `prefill` has it."""
    logits, cache = adapter.forward_last(model, tokens)
    adapter.advance_position(cache, before)
    return logits, cache


def check_transformers(model: Any) -> None:
    """Raise ValueError for a model that `transformers_call` cannot run."""
    if not adapter.is_causal_lm(model):
        raise ValueError(f"model must be an xLSTMForCausalLM of transformers, or come with call=, got "
                         f"{type(model).__name__}")


def prepare_transformers(model: Any) -> None:
    """Make an xLSTM of transformers read a stretch in one piece."""
    model.config.mode, model.config.return_last_states = "inference", True
    model.config.max_inference_chunksize = 1 << 62
