"""Tensors in Ray's object store, as numpy arrays of bytes, which processes of one host read without a copy."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


class TensorBytes(NamedTuple):
    """The bytes of a tensor, as numpy has no bfloat16."""

    data: Any  # numpy, uint8
    dtype: torch.dtype
    shape: tuple[int, ...]


def to_bytes(tensors: Iterable[Tensor]) -> list[TensorBytes]:
    """Return the bytes of tensors on any device."""
    return [TensorBytes(_bytes(t), t.dtype, tuple(t.shape)) for t in tensors]


def from_bytes(tensors: Iterable[TensorBytes], device: torch.device | None = None) -> list[Tensor]:
    """Return the tensors. On the CPU they may be shared memory of the store, which must not be written."""
    found = [
        torch.from_numpy(data).view(dtype).view(shape) if data.size else torch.empty(shape, dtype=dtype)
        for data, dtype, shape in tensors
    ]
    return found if device is None or device.type == "cpu" else [t.to(device) for t in found]


def nbytes(tensors: Iterable[TensorBytes]) -> int:
    """Return the total size in bytes."""
    return sum(int(t.data.nbytes) for t in tensors)


@contextmanager
def store_errors(what: str, size: int) -> Iterator[None]:
    """Replace Ray's errors for a full object store, or a full disk to spill to, by a RuntimeError that names `what`.

    size: in bytes.
    """
    from ray.exceptions import ObjectStoreFullError, OutOfDiskError

    try:
        yield
    except (ObjectStoreFullError, OutOfDiskError) as error:
        full = "it is full" if isinstance(error, ObjectStoreFullError) else "it and the disk it spills to are full"
        raise RuntimeError(f"Ray's object store has no room for {what} ({size / 2**20:.1f} MB): {full}; start Ray with "
                           "a larger object store") from error


def _bytes(t: Tensor) -> Any:
    return t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


@cache
def suppress_read_only_warning() -> None:
    """Trigger and suppress torch's warning for read-only arrays, which it gives once: the store's arrays are such."""
    import numpy

    array = numpy.zeros(1, dtype=numpy.uint8)
    array.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.from_numpy(array)
