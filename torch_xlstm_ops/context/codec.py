"""Encode a snapshot as named host tensors and metadata: as it is, in bfloat16, or in int8.

m is an exponent and the logits are few numbers, so both are kept as they are. The metadata holds the largest error of
any c or n, measured when the snapshot was encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops.context.states import Snapshot
from torch_xlstm_ops.maths.shapes import MLSTMState, dtype_name

FORMAT = "xlstm-state-1"


class Storage(str, Enum):
    """The numbers in which states are kept: as they are, bfloat16, or int8 with one scale per row."""

    FULL = "full"
    BF16 = "bf16"
    INT8 = "int8"

    def __str__(self) -> str:
        return str(self.value)


class EncodedSnapshot(NamedTuple):
    """A snapshot on the host, as it is kept."""

    about: Mapping[str, str]  # the fields of a snapshot that are no tensors, and `storage`, `dtype` and `error`
    tensors: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Return the bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def error(self) -> float:
        """Return the largest error of a state relative to its norm; 0 for `Storage.FULL`."""
        return float(self.about["error"])


Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # dtype and shape of each encoded tensor, by name


def encode(snapshot: Snapshot, storage: Storage = Storage.FULL) -> EncodedSnapshot:
    """Return a snapshot as it is kept; its tensors are copies on the host."""
    tensors, error = {"logits": snapshot.logits.to("cpu", copy=True)}, 0.0
    for index, layer in enumerate(snapshot.layers):
        tensors[f"{index}.m"] = layer.m.to("cpu", copy=True)
        for part, state in (("c", layer.c), ("n", layer.n)):
            kept = _CODECS[storage].encode(state.to("cpu", copy=True))
            tensors |= {f"{index}.{part}{name}": tensor for name, tensor in kept.items()}
            error = max(error, relative_error(state.cpu(), _CODECS[storage].decode(kept, state.dtype)))
    about = {"format": FORMAT, "identity": snapshot.identity, "position": str(snapshot.position),
             "digest": snapshot.digest, "segment": str(snapshot.segment or 0), "storage": str(storage),
             "dtype": _dtype_name(snapshot), "error": repr(error)}
    return EncodedSnapshot(about, tensors)


def decode(encoded: EncodedSnapshot, device: torch.device | str = "cpu") -> Snapshot:
    """Return the snapshot. It shares tensors that are kept as they are; nothing writes to a snapshot's tensors."""
    about, tensors = encoded
    codec, dtype = _CODECS[Storage(about["storage"])], _DTYPES[about["dtype"]]
    layers = []
    for index in range(sum(name.endswith(".m") for name in tensors)):
        c, n = (codec.decode(_with_prefix(tensors, f"{index}.{part}"), dtype) for part in "cn")
        layers.append(MLSTMState(c, n, tensors[f"{index}.m"]))
    snapshot = Snapshot(about["identity"], int(about["position"]), about["digest"], int(about["segment"]) or None,
                        tuple(layers), tensors["logits"])
    return snapshot.to(torch.device(device))


def layout(snapshot: Snapshot, storage: Storage) -> Layout:
    """Return the layout that a snapshot, also one on the meta device, has when it is encoded."""
    tensors = {"logits": snapshot.logits}
    for index, layer in enumerate(snapshot.layers):
        tensors[f"{index}.m"] = layer.m
        for part, state in (("c", layer.c), ("n", layer.n)):
            kept = _CODECS[storage].encode(state)
            tensors |= {f"{index}.{part}{name}": tensor for name, tensor in kept.items()}
    return layout_of(tensors)


def layout_of(tensors: Mapping[str, Tensor]) -> Layout:
    """Return the layout of encoded tensors."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def encoded_bytes(snapshot: Snapshot, storage: Storage) -> int:
    """Return the bytes that a snapshot, also one on the meta device, has when it is encoded."""
    return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in layout(snapshot, storage).values())


def mismatch(encoded: EncodedSnapshot, outline: Snapshot | None = None) -> str | None:
    """Return how an encoded snapshot differs from what `encode` writes, or None.

    outline: of the model that it must fit; default any model.
    """
    try:
        shapes = EncodedSnapshot(encoded.about, {name: t.to("meta") for name, t in encoded.tensors.items()})
        found, storage = decode(shapes, "meta"), Storage(encoded.about["storage"])
        if found.position < 0 or (found.segment or 1) < 1 or not 0 <= encoded.error < float("inf"):
            return "a position, a segment or an error that is out of range"
        expected = layout(found if outline is None else outline, storage)
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    if outline is not None and encoded.about["dtype"] != _dtype_name(outline):
        return f"states of {encoded.about['dtype']}"
    if outline is None and not all(_consistent(layer) for layer in found.layers):
        return "states of different shapes"
    given = layout_of(encoded.tensors)
    wrong = sorted(name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name))
    return f"tensor {wrong[0]} is {given.get(wrong[0], 'missing')}" if wrong else None


def _consistent(layer: MLSTMState) -> bool:
    c, n, m = layer
    return c.dim() == 4 and n.shape == c.shape[:-1] and m.shape == (*c.shape[:2], 1)


def relative_error(exact: Tensor, kept: Tensor) -> float:
    """Return the norm of the error over the norm of the exact tensor; 0 for a tensor of zeros."""
    norm = exact.double().norm().item()
    return (kept.double() - exact.double()).norm().item() / norm if norm else 0.0


def _dtype_name(snapshot: Snapshot) -> str:
    return dtype_name(snapshot.layers[0].c.dtype)


def _with_prefix(tensors: Mapping[str, Tensor], start: str) -> dict[str, Tensor]:
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


class _Codec(NamedTuple):
    encode: Callable[[Tensor], dict[str, Tensor]]
    decode: Callable[[Mapping[str, Tensor], torch.dtype], Tensor]


def _to_int8(state: Tensor) -> dict[str, Tensor]:
    scale = state.abs().amax(-1, keepdim=True).float() / 127
    whole = torch.where(scale > 0, state / scale, 0).round()
    return {"": whole.to(torch.int8), ".scale": scale}


_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CODECS = {
    Storage.FULL: _Codec(lambda state: {"": state}, lambda kept, dtype: kept[""]),
    Storage.BF16: _Codec(lambda state: {"": state.bfloat16()}, lambda kept, dtype: kept[""].to(dtype)),
    Storage.INT8: _Codec(_to_int8, lambda kept, dtype: kept[""].to(dtype) * kept[".scale"].to(dtype)),
}
