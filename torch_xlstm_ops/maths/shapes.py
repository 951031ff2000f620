"""Glossary of dimensions, the state tuples, and every check of shape, dtype and device with its message.

    B     batch                      S     sequence length (tokens)
    NH    heads                      L     tokens a chunk        NC  chunks a segment
    DHQK  query/key head dimension   DHHV  value/hidden head dimension
    DH    sLSTM head dimension
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

STREAM_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
EPS = 1e-6


class MLSTMState(NamedTuple):
    """State of an mLSTM: the memory ``c * exp(m)`` and the normaliser ``n * exp(m)``.

    c: (B, NH, DHQK, DHHV); n: (B, NH, DHQK); m: (B, NH, 1); float32, or float64 for float64 inputs.
    """

    c: Tensor  # (B, NH, DHQK, DHHV)
    n: Tensor  # (B, NH, DHQK)
    m: Tensor  # (B, NH, 1)


class SLSTMState(NamedTuple):
    """State of an sLSTM: the output that the next token receives, and the cell.

    y, c, n, m: (B, NH, DH); float32, or float64 for float64 inputs.
    """

    y: Tensor  # (B, NH, DH)
    c: Tensor  # (B, NH, DH)
    n: Tensor  # (B, NH, DH)
    m: Tensor  # (B, NH, DH)


def state_dtype(stream: torch.dtype) -> torch.dtype:
    """Return the dtype of states and gate arithmetic for a stream (q, k, v, x) of dtype `stream`."""
    return torch.float64 if stream == torch.float64 else torch.float32


def check_rank(name: str, tensor: Tensor, axes: str) -> None:
    """Raise ValueError unless `tensor` has the axes named in `axes`, e.g. ``"B NH S DHQK"``."""
    if tensor.dim() != len(axes.split()):
        raise ValueError(f"{name} must be ({', '.join(axes.split())}), got {_tuple(tensor.shape)}")


def check_shape(name: str, tensor: Tensor, axes: str, sizes: Mapping[str, int]) -> None:
    """Raise ValueError unless `tensor` has exactly the sizes that `axes` name (a digit is a literal size)."""
    names = _split(axes)
    wanted = [sizes[a] if a in sizes else int(a) for a in names]
    if [*tensor.shape] != wanted:
        raise ValueError(f"{name} must be ({', '.join(names)}) = {_tuple(wanted)}, got {_tuple(tensor.shape)}")


def check_stream(**tensors: Tensor) -> None:
    """Raise TypeError unless all `tensors` share one supported floating dtype."""
    first, dtype = next((name, t.dtype) for name, t in tensors.items())
    for name, t in tensors.items():
        if t.dtype not in STREAM_DTYPES:
            raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {dtype_name(t.dtype)}")
        if t.dtype != dtype:
            raise TypeError(f"{name} must have {first}'s dtype {dtype_name(dtype)}, got {dtype_name(t.dtype)}")


def check_floating(**tensors: Tensor) -> None:
    """Raise TypeError unless each tensor has a floating dtype."""
    for name, t in tensors.items():
        if not t.dtype.is_floating_point:
            raise TypeError(f"{name} must have a floating dtype, got {dtype_name(t.dtype)}")


def check_state_dtype(stream: torch.dtype, **tensors: Tensor) -> None:
    """Raise TypeError unless each state tensor has the `state_dtype` of the stream."""
    wanted = state_dtype(stream)
    for name, t in tensors.items():
        if t.dtype != wanted:
            raise TypeError(f"{name} must be {dtype_name(wanted)} beside {dtype_name(stream)} inputs, "
                            f"got {dtype_name(t.dtype)}")


def check_device(**tensors: Tensor) -> None:
    """Raise ValueError unless all `tensors` are on one device."""
    first, device = next((name, t.device) for name, t in tensors.items())
    for name, t in tensors.items():
        if t.device != device:
            raise ValueError(f"{name} must be on {first}'s device {device}, got {t.device}")


def check_all_or_none(**tensors: Tensor | None) -> None:
    """Raise ValueError when some but not all of the tensors are given."""
    given = [name for name, t in tensors.items() if t is not None]
    if given and len(given) != len(tensors):
        missing = [name for name, t in tensors.items() if t is None]
        raise ValueError(f"{', '.join(tensors)} must be given together or not at all, got {', '.join(given)} "
                         f"without {', '.join(missing)}")


def check_not_negative(name: str, value: float) -> None:
    """Raise ValueError unless `value` is zero or more."""
    if not value >= 0:
        raise ValueError(f"{name} must be at least 0, got {value}")


def check_reset(reset: Tensor, sizes: Mapping[str, int], **stream: Tensor) -> None:
    """Raise ValueError or TypeError unless `reset` is (B, S), bool, on the device of `stream`."""
    check_shape("reset", reset, "B S", sizes)
    if reset.dtype != torch.bool:
        raise TypeError(f"reset must be bool, got {dtype_name(reset.dtype)}")
    check_device(**stream, reset=reset)


def check_mlstm_sequence(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor,
    c: Tensor | None, n: Tensor | None, m: Tensor | None, reset: Tensor | None = None,
) -> None:
    """Check the arguments of a sequence op; see `MLSTMState` for the states' shapes."""
    check_rank("q", q, "B NH S DHQK")
    check_rank("v", v, "B NH S DHHV")
    B, NH, S, DHQK = q.shape
    sizes = {"B": B, "NH": NH, "S": S, "DHQK": DHQK, "DHHV": v.shape[-1]}
    check_shape("k", k, "B NH S DHQK", sizes)
    check_shape("v", v, "B NH S DHHV", sizes)
    check_shape("igate", igate, "B NH S", sizes)
    check_shape("fgate", fgate, "B NH S", sizes)
    _check_mlstm_rest(q, k, v, igate, fgate, c, n, m, sizes)
    if reset is not None:
        check_reset(reset, sizes, q=q)


def check_mlstm_step(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, c: Tensor, n: Tensor, m: Tensor
) -> None:
    """Check the arguments of a step op: no S axis, gates (B, NH, 1)."""
    check_rank("q", q, "B NH DHQK")
    check_rank("v", v, "B NH DHHV")
    B, NH, DHQK = q.shape
    sizes = {"B": B, "NH": NH, "DHQK": DHQK, "DHHV": v.shape[-1]}
    check_shape("k", k, "B NH DHQK", sizes)
    check_shape("v", v, "B NH DHHV", sizes)
    check_shape("igate", igate, "B NH 1", sizes)
    check_shape("fgate", fgate, "B NH 1", sizes)
    _check_mlstm_rest(q, k, v, igate, fgate, c, n, m, sizes)


def _check_mlstm_rest(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor,
    c: Tensor | None, n: Tensor | None, m: Tensor | None, sizes: Mapping[str, int],
) -> None:
    check_stream(q=q, k=k, v=v)
    check_floating(igate=igate, fgate=fgate)
    check_all_or_none(c=c, n=n, m=m)
    state: dict[str, Tensor] = {}
    if c is not None and n is not None and m is not None:
        state = {"c": c, "n": n, "m": m}
        check_shape("c", c, "B NH DHQK DHHV", sizes)
        check_shape("n", n, "B NH DHQK", sizes)
        check_shape("m", m, "B NH 1", sizes)
        check_state_dtype(q.dtype, **state)
    check_device(q=q, k=k, v=v, igate=igate, fgate=fgate, **state)


@functools.cache
def _split(axes: str) -> tuple[str, ...]:
    return tuple(axes.split())


def _tuple(sizes: Iterable[int]) -> str:
    return str(tuple(sizes))


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without "torch.", such as "float32"."""
    return str(dtype).removeprefix("torch.")
