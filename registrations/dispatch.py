"""What the operators share of the dispatcher: which keys they serve, and how autocast, vmap and autograd treat them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_xlstm_ops.runtime import torch_internals

from .schemas import LIBRARY

DEVICES = ("CPU", "CUDA", "MPS")
Arguments = Sequence[Any]

# Elements of a state up to which one CPU thread is as fast as many: waking the others takes longer than it saves, and
# beside other work they come late.
ONE_THREAD = 1 << 16


def step_threads(elements: int) -> int | None:
    """Return for how many threads to compile the step of a state; None: for all that the caller may use."""
    return 1 if elements <= ONE_THREAD else None


def packet(name: str) -> Any:
    """Return the operator `name` as `torch.ops` has it."""
    return getattr(torch.ops.xlstm, name)


def overload(name: str) -> Any:
    """Return the operator `name`, bound once so that a call skips the look-up."""
    return packet(name).default


def fresh(t: Tensor) -> Tensor:
    """Return a tensor on the same memory that autograd does not take for a view: torch refuses to write to some views.
    """
    return t.data


_implementations: dict[str, Callable[..., Any]] = {}
SIGNATURES: dict[str, inspect.Signature] = {}  # of each operator's arguments, with their defaults
FAKES: dict[str, Callable[..., Any]] = {}


def implement(name: str, function: Callable[..., Any]) -> None:
    """Serve `name` on every device by one function."""
    _implementations[name] = function
    for device in DEVICES:
        LIBRARY.impl(name, function, device)  # type: ignore[no-untyped-call]


def implementation(name: str) -> Callable[..., Any]:
    """Return the function that serves `name` on every device."""
    return _implementations[name]


def fake(name: str, function: Callable[..., Any]) -> None:
    """Give `name` the function that checks its arguments and allocates its results."""
    op = overload(name)

    @functools.wraps(function)
    def kept(*args: Any, **kwargs: Any) -> Any:
        torch_internals.keep_as_call(op)  # before Inductor lowers a graph, it has fakes run
        return function(*args, **kwargs)

    SIGNATURES[name], FAKES[name] = inspect.signature(function), kept
    torch.library.register_fake(f"xlstm::{name}", kept, lib=LIBRARY)


def refuse_nested(name: str, args: Arguments) -> None:
    """Raise TypeError for a nested tensor."""
    for argument, t in zip(SIGNATURES[name].parameters, args, strict=False):
        if isinstance(t, Tensor) and t.is_nested:
            kind = "jagged" if t.layout == torch.jagged else "strided"
            raise TypeError(f"{argument} must be a dense tensor, got a nested one ({kind}): put sequences of several "
                            "lengths one behind another in a row, and mark the first token of each in reset")


def autocast(name: str, casts: slice) -> None:
    """Under autocast, cast the arguments in `casts` (the streams; states and gates keep their precision)."""
    op = overload(name)

    def under(device: str) -> Callable[..., Any]:
        def kernel(*args: Any, **kwargs: Any) -> Any:
            dtype = torch.get_autocast_dtype(device)
            streams = [_cast(a, dtype) for a in args[casts]]
            with torch_internals.without_autocast(device):
                return op(*args[:casts.start], *streams, *args[casts.stop:], **kwargs)

        return kernel

    for device in DEVICES:
        LIBRARY.impl(name, under(device.lower()), f"Autocast{device}")  # type: ignore[no-untyped-call]


def vmap(name: str) -> None:
    """Fold the mapped axis into the batch, which is the first axis of every tensor of every operator."""
    op = overload(name)

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any, **kwargs: Any) -> Any:
        out = mapped(op, info.batch_size, in_dims, args, kwargs)
        return out, (0,) * len(out)

    torch.library.register_vmap(f"xlstm::{name}", rule, lib=LIBRARY)


def mapped(
    op: Callable[..., Sequence[Tensor]], size: int, in_dims: Sequence[int | None], args: Sequence[Any],
    kwargs: dict[str, Any],
) -> tuple[Tensor, ...]:
    """Call an operator with the mapped axis of its arguments folded into the batch; it comes first in the results."""
    folded = [
        _batch_first(a, dim, size).flatten(0, 1) if isinstance(a, Tensor) else a
        for a, dim in zip(args, in_dims, strict=True)
    ]
    out = op(*folded, **kwargs)
    return tuple(torch.unflatten(t, 0, (size, -1)) if t.shape[0] else t.view(size, 0, *t.shape[1:]) for t in out)


def _batch_first(t: Tensor, dim: int | None, size: int) -> Tensor:
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t
