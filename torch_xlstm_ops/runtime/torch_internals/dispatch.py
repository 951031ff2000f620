"""Calls that skip dispatch keys."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from torch_xlstm_ops.runtime.torch_internals.need import need

DEVICES = ("CPU", "CUDA", "MPS")


Below = Callable[[Any, Any, Sequence[Any], Mapping[str, Any]], Any]


def _redispatch_again() -> Below:
    return _call_again


def _call_again(op: Any, keyset: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        return op(*args, **kwargs)


@need(_redispatch_again, where=("torch._C._after_autograd_keyset", "torch._ops.OpOverload.redispatch"),
      without="a call passes the dispatcher twice")
def below_autograd() -> Below:
    """Return a function that calls an operator below autograd, given the key set of autograd's kernel."""
    after = torch._C._after_autograd_keyset
    redispatch = torch._ops.OpOverload.redispatch
    return lambda op, keyset, args, kwargs: redispatch(op, keyset & after, *args, **kwargs)


def _assume_more(keyset: Any) -> bool:
    return False


@need(_assume_more, where=(
        "torch._C.DispatchKeySet.from_raw_repr", "torch._C._after_ADInplaceOrView_keyset", "torch._C.DispatchKey",
    ),
      without="a call passes the dispatcher twice")
def next_is_device(keyset: Any) -> bool:
    """Return whether only a device key is left below autograd: no mode, no subclass, no fake tensor."""
    return _next_is_device(keyset.raw_repr())


@functools.cache
def _next_is_device(keys: int) -> bool:
    keyset = torch._C.DispatchKeySet.from_raw_repr(keys) & torch._C._after_ADInplaceOrView_keyset
    return keyset.highestPriorityTypeId() in {getattr(torch._C.DispatchKey, device) for device in DEVICES}


def _never(keyset: Any) -> bool:
    return False


@need(_never, where=("torch._C.DispatchKeySet.has", "torch._C.DispatchKey.Functionalize"),
      without="functional tensors refuse mlstm_step_")
def functionalizes(keyset: Any) -> bool:
    """Return whether the dispatcher itself functionalises a call; AOTAutograd does it in Python."""
    return bool(keyset.has(torch._C.DispatchKey.Functionalize))


def _autocast_off(device: str) -> AbstractContextManager[object]:
    return torch.autocast(device, enabled=False) if device else nullcontext()


@need(_autocast_off, where=("torch._C._ExcludeDispatchKeyGuard", "torch._C.DispatchKeySet", "torch._C.DispatchKey"),
      without="autocast is switched off and on around each call")
def without_autocast(device: str) -> AbstractContextManager[object]:
    """Return a context manager without the autocast rules of a device, such as "cuda"."""
    guard: Callable[[Any], AbstractContextManager[object]] = torch._C._ExcludeDispatchKeyGuard
    return guard(_autocast_keys(device))


@functools.cache
def _autocast_keys(device: str) -> Any:
    return torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))
