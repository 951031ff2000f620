"""Autocast: the streams of an operator are cast, its states and gates keep their precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_xlstm_ops.ops.operator import Operator
from torch_xlstm_ops.runtime import torch_internals

from .devices import DEVICES
from .schemas import LIBRARY


def register(operator: Operator) -> None:
    """Cast the arguments of an operator that say so."""
    if operator.casts is not None:
        for device in DEVICES:
            kernel = _kernel(operator.overload, operator.casts, device.lower())
            LIBRARY.impl(operator.name, kernel, f"Autocast{device}")  # type: ignore[no-untyped-call]


def _kernel(op: Any, casts: slice, device: str) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        streams = [_cast(a, dtype) for a in args[casts]]
        with torch_internals.without_autocast(device):
            return op(*args[:casts.start], *streams, *args[casts.stop:], **kwargs)

    return kernel


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t
