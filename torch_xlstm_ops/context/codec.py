"""How a snapshot is kept: its tensors as they are or in fewer bits, and as one checked file of safetensors.

A maximum (m) is an exponent, and logits are few: both are always kept as they are. Beside them stands the largest
error that fewer bits made of any c or n, measured when they were packed.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops.context.states import Snapshot, raw_bytes
from torch_xlstm_ops.maths.shapes import MLSTMState

FORMAT = "xlstm-state-1"
SUFFIX = ".safetensors"


class Storage(str, Enum):
    """In which numbers states are kept: as they are, bfloat16, or int8 with a scale a row."""

    FULL = "full"
    BF16 = "bf16"
    INT8 = "int8"

    def __str__(self) -> str:
        return str(self.value)


class Damaged(ValueError):
    """A file is not the snapshot that was written to it."""


class Packed(NamedTuple):
    """A snapshot on the host, as it is kept."""

    about: Mapping[str, str]  # what a snapshot has besides tensors, and `storage`, `dtype` and `error`
    tensors: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Return the bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def error(self) -> float:
        """Return the largest error of a state, relative to its norm: 0 where it is kept as it is."""
        return float(self.about["error"])


def pack(snapshot: Snapshot, storage: Storage = Storage.FULL) -> Packed:
    """Return a snapshot as it is kept; its tensors are copies on the host."""
    tensors, error = {"logits": snapshot.logits.to("cpu", copy=True)}, 0.0
    for index, layer in enumerate(snapshot.layers):
        tensors[f"{index}.m"] = layer.m.to("cpu", copy=True)
        for part, state in (("c", layer.c), ("n", layer.n)):
            kept = _CODECS[storage].encode(state.to("cpu", copy=True))
            tensors |= {f"{index}.{part}{name}": tensor for name, tensor in kept.items()}
            error = max(error, _error(state.cpu(), _CODECS[storage].decode(kept, state.dtype)))
    about = {"format": FORMAT, "identity": snapshot.identity, "position": str(snapshot.position),
             "digest": snapshot.digest, "segment": str(snapshot.segment or 0), "storage": str(storage),
             "dtype": str(snapshot.layers[0].c.dtype).removeprefix("torch."), "error": repr(error)}
    return Packed(about, tensors)


def packed_bytes(snapshot: Snapshot, kept_in: Storage) -> int:
    """Return the bytes that a snapshot will take, also of one on the meta device."""
    coded = [tensor for layer in snapshot.layers for state in (layer.c, layer.n)
             for tensor in _CODECS[kept_in].encode(state).values()]
    return sum(tensor.nbytes for tensor in (*coded, *(layer.m for layer in snapshot.layers), snapshot.logits))


def unpack(packed: Packed, device: torch.device | str = "cpu") -> Snapshot:
    """Return the snapshot, sharing what is kept as it is; no one writes to a snapshot's tensors."""
    about, tensors = packed
    codec, dtype = _CODECS[Storage(about["storage"])], getattr(torch, about["dtype"])
    layers = []
    for index in range(sum(name.endswith(".m") for name in tensors)):
        c, n = (codec.decode(_named(tensors, f"{index}.{part}"), dtype) for part in "cn")
        layers.append(MLSTMState(c, n, tensors[f"{index}.m"]))
    snapshot = Snapshot(about["identity"], int(about["position"]), about["digest"], int(about["segment"]) or None,
                        tuple(layers), tensors["logits"])
    return snapshot.to(torch.device(device))


def _named(tensors: Mapping[str, Tensor], start: str) -> dict[str, Tensor]:
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def _error(exact: Tensor, kept: Tensor) -> float:
    norm = exact.double().norm().item()
    return (kept.double() - exact.double()).norm().item() / norm if norm else 0.0


class _Codec(NamedTuple):
    encode: Callable[[Tensor], dict[str, Tensor]]
    decode: Callable[[Mapping[str, Tensor], torch.dtype], Tensor]


def _to_int8(state: Tensor) -> dict[str, Tensor]:
    scale = state.abs().amax(-1, keepdim=True).float() / 127
    whole = torch.where(scale > 0, state / scale, 0).round()
    return {"": whole.to(torch.int8), ".scale": scale}


_CODECS = {
    Storage.FULL: _Codec(lambda state: {"": state}, lambda kept, dtype: kept[""]),
    Storage.BF16: _Codec(lambda state: {"": state.bfloat16()}, lambda kept, dtype: kept[""].to(dtype)),
    Storage.INT8: _Codec(_to_int8, lambda kept, dtype: kept[""].to(dtype) * kept[".scale"].to(dtype)),
}


# Files


def to_file(packed: Packed) -> bytes:
    """Return the bytes of a file of safetensors, with a checksum over everything in it."""
    from safetensors.torch import save

    return save(dict(packed.tensors), {**packed.about, "checksum": _checksum(packed)})


def from_file(path: Path) -> Packed:
    """Return what a file holds. Raises Damaged when it is not what was written, OSError when it cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    content = path.read_bytes()
    try:
        (length,) = struct.unpack_from("<Q", content)
        about: dict[str, Any] = json.loads(content[8 : 8 + length])["__metadata__"]
        checksum = about.pop("checksum")
        packed = Packed(about, load(content))
        intact = about["format"] == FORMAT and checksum == _checksum(packed)
    except (struct.error, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise Damaged(f"{path} must be a whole file of a snapshot, got one that cannot be read: {error}") from None
    if not intact:
        raise Damaged(f"{path} must be what was written, got a file whose checksum differs")
    return packed


def is_ours(path: Path) -> bool:
    """Return whether a file is empty, or begins as one of ours does, whole or not."""
    with open(path, "rb") as file:
        beginning = file.read(4096)
    return not beginning or FORMAT.encode() in beginning


def _checksum(packed: Packed) -> str:
    found = hashlib.blake2b(digest_size=16)
    found.update(json.dumps(packed.about, sort_keys=True).encode())
    for name in sorted(packed.tensors):
        tensor = packed.tensors[name]
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(raw_bytes(tensor))
    return found.hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Put a file in place at once: whoever looks finds what was there before or all of this, also after a crash.

    Raises OSError; then nothing is left of it. What a crash leaves, a hidden `.partial`, the next writer takes over.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _settle(path.parent)


def _settle(folder: Path) -> None:
    """Make a folder's names last through a power cut, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
