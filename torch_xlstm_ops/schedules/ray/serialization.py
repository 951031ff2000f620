"""Tensors as Ray's object store takes them: numpy arrays of bytes, which processes of one host read without a copy."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """A tensor on its way; numpy knows no bfloat16, so its bytes."""

    data: Any  # numpy, uint8
    dtype: torch.dtype
    shape: tuple[int, ...]


def pack(tensors: Iterable[Tensor]) -> list[Packed]:
    """Return tensors as the store takes them, from whichever device they are on."""
    return [Packed(_bytes(t), t.dtype, tuple(t.shape)) for t in tensors]


def unpack(packed: Iterable[Packed], device: torch.device | None = None) -> list[Tensor]:
    """Return the tensors. On the CPU they may lie in the store, for all processes of the host: only to be read."""
    found = [torch.from_numpy(data).view(dtype).view(shape) for data, dtype, shape in packed]
    return found if device is None or device.type == "cpu" else [t.to(device) for t in found]


def nbytes(packed: Iterable[Packed]) -> int:
    """Return the bytes of packed tensors."""
    return sum(int(one.data.nbytes) for one in packed)


@contextmanager
def room_for(what: str, size: int) -> Iterator[None]:
    """Say of what is put into the store, of `size` bytes, that there was no room for it.

    Raises RuntimeError in the place of Ray's errors of a full store and of a full disk, where the store would spill.
    """
    from ray.exceptions import ObjectStoreFullError, OutOfDiskError

    try:
        yield
    except (ObjectStoreFullError, OutOfDiskError) as error:
        full = "it is full" if isinstance(error, ObjectStoreFullError) else "it and the disk it spills to are full"
        raise RuntimeError(f"Ray's object store must have room for {what} ({size / 2**20:.1f} MB), got none: {full}"
                           ) from error


def _bytes(t: Tensor) -> Any:
    return t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


@cache
def expect_read_only() -> None:
    """Have torch give here its one warning of arrays that must not be written, which those in the store are."""
    import numpy

    array = numpy.zeros(1, dtype=numpy.uint8)
    array.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.from_numpy(array)
