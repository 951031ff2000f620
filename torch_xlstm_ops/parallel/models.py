"""Serialise a model, or its cache: tensors go through Ray's object store, the rest is pickled.

So the workers of a host share one copy of the weights.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops.models import transformers as adapter
from torch_xlstm_ops.parallel import device_links, transport
from torch_xlstm_ops.schedules.ray import serialization

Call = Callable[[Any, Tensor, int], tuple[Tensor, Any]]


class SerializedModel(NamedTuple):
    """A pickled object, and the tensors in it."""

    pickled: bytes
    tensors: Any  # a list of TensorBytes, or DeviceTensors


class _TensorReference(NamedTuple):
    """What the pickle has in the place of a tensor."""

    number: int
    requires_grad: bool | None  # of a parameter; None for other tensors


def serialize(
    value: object, pack: Callable[[Sequence[Tensor]], Any] = serialization.to_bytes
) -> SerializedModel:
    """Serialise a model or a cache; `pack` returns how its tensors travel."""
    from ray import cloudpickle

    found: dict[int, tuple[int, Tensor]] = {}

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        def persistent_id(self, part: object) -> _TensorReference | None:
            if not isinstance(part, Tensor):
                return None
            number, _ = found.setdefault(id(part), (len(found), part))
            return _TensorReference(number, part.requires_grad if isinstance(part, torch.nn.Parameter) else None)

    file = io.BytesIO()
    Pickler(file).dump(value)
    return SerializedModel(file.getvalue(), pack([part for _, part in found.values()]))


def deserialize(model: SerializedModel, device: torch.device, *, copy: bool) -> Any:
    """Return the object, its tensors on a device.

    copy: copy the tensors out of the store; otherwise, on the CPU, they may be its read-only memory.
    """
    if isinstance(model.tensors, transport.DeviceTensors):
        tensors, copy = device_links.take(model.tensors, device), False
    else:
        tensors = serialization.from_bytes(model.tensors, device)
    made: dict[_TensorReference, Tensor] = {}

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, reference: Any) -> Tensor:
            if reference not in made:
                t = tensors[reference.number].clone() if copy else tensors[reference.number]
                requires_grad = reference.requires_grad
                made[reference] = t if requires_grad is None else torch.nn.Parameter(t, requires_grad)
            return made[reference]

    return Unpickler(io.BytesIO(model.pickled)).load()


def transformers_call(model: Any, tokens: Tensor, before: int) -> tuple[Tensor, Any]:
    """Run an xLSTM of transformers over tokens (B, S) that follow `before` others; return last logits and cache."""
    logits, cache = adapter.forward_last(model, tokens)
    adapter.advance_position(cache, before)
    return logits, cache


def check_transformers(model: Any) -> None:
    """Raise ValueError for a model that `transformers_call` cannot run."""
    if not adapter.is_causal_lm(model):
        raise ValueError(f"model must be an xLSTMForCausalLM of transformers, or come with call=, got "
                         f"{type(model).__name__}")


def prepare_transformers(model: Any) -> None:
    """Make an xLSTM of transformers read a shard in one call."""
    model.config.mode, model.config.return_last_states = "inference", True
    model.config.max_inference_chunksize = 1 << 62
