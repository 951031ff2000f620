"""How operators are differentiated: reverse mode by hand-written gradients, everything else through pure functions.

The hand-written gradient of an operator is an operator itself. It serves where autograd alone records a call. Forward
mode, transforms of torch.func, and derivatives of a gradient run `torch_xlstm_ops.maths.aten`, which any derivative of
any order passes through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torch_xlstm_ops.runtime import torch_internals

from .dispatch import implementation, overload, refuse_nested
from .schemas import LIBRARY
from .sharding import is_distributed

Results = Any  # a tensor, or a tuple of tensors
Run = Callable[[Sequence[Any], dict[str, Any]], Results]


class Derivative(NamedTuple):
    """How one operator is differentiated."""

    check: Callable[..., object]  # raises for bad arguments
    pure: Callable[..., Results]  # the operator as ATen calls
    record: Callable[[Run, Sequence[Any], dict[str, Any]], Results]  # run it where reverse mode alone records
    functional: Callable[..., Results] | None = None  # the operator without its writes, which torch cannot take away


def requires_grad(args: Sequence[Any]) -> bool:
    """Return whether autograd would record this call."""
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)


def has_tangents(args: Sequence[Any]) -> bool:
    """Return whether an argument carries a tangent of forward mode."""
    # torch has one level of forward mode, 0; it is named because traced code does not make it the current one.
    duals = (forward_ad.unpack_dual(a, level=0) for a in args if isinstance(a, Tensor))  # type: ignore[no-untyped-call]
    return any(dual.tangent is not None for dual in duals)


def register(name: str, derivative: Derivative) -> None:
    """Give an operator its autograd kernel."""
    op, direct = overload(name), implementation(name)
    check, pure, record, functional = derivative

    forward_mode, next_is_device = torch_internals.forward_mode, torch_internals.next_is_device

    def below(keyset: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if next_is_device.run(keyset):  # its way through the dispatcher would cost 3 us
            return direct(*args, **kwargs)
        if functional is not None and torch_internals.functionalizes(keyset):
            return functional(*args, **kwargs)
        refuse_nested(name, args)
        return torch_internals.below_autograd()(op, keyset, args, kwargs)

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        tangents = forward_mode.run() and has_tangents(args)
        if not tangents and not requires_grad(args):
            return direct(*args, **kwargs) if next_is_device.run(keyset) else below(keyset, args, kwargs)
        if tangents or torch_internals.transforms():
            check(*args, **kwargs)
            return pure(*args, **kwargs)
        return record(lambda args, kwargs: below(keyset, args, kwargs), args, kwargs)

    LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]


Save = Callable[[Sequence[Any], tuple[Tensor, ...]], Sequence[Any]]
Gradients = Callable[..., Sequence[Tensor]]


def recorded(save: Save, gradients: Gradients) -> Callable[[Run, Sequence[Any], dict[str, Any]], Results]:
    """Return a `Derivative.record` that calls a hand-written gradient.

    save: from the arguments and results to what the gradient needs. gradients: from the results' gradients, what was
    saved, and the keywords to the gradients of the leading arguments.
    """

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, run: Run, how: dict[str, Any], *args: Any) -> Any:
            results = run(args, how)
            ctx.save_for_backward(*save(args, results))
            ctx.how, ctx.given = how, [isinstance(t, Tensor) for t in args]
            ctx.like = [t.detach() for t in results] if is_distributed(results[0]) else []
            if ctx.like:  # autograd would fill in plain zeros
                ctx.set_materialize_grads(False)
            return results

        @staticmethod
        def backward(ctx: Any, *given: Any) -> Any:
            if ctx.like:
                given = tuple(
                    torch.zeros_like(t) if g is None else g for g, t in zip(given, ctx.like, strict=True)
                )
            found = [*gradients(*given, *ctx.saved_tensors, **ctx.how), None]  # a mask has none
            return None, None, *[g if there else None for g, there in zip(found, ctx.given, strict=False)]

    return lambda run, args, how: Recorded.apply(run, how, *args)  # type: ignore[no-untyped-call]


def refused(message: str) -> Callable[[Run, Sequence[Any], dict[str, Any]], Results]:
    """Return a `Derivative.record` for an operator that autograd must not record."""

    def refuse(run: Run, args: Sequence[Any], how: dict[str, Any]) -> Results:
        raise RuntimeError(message)

    return refuse


def by_pure(pure: Callable[..., Results]) -> Callable[[Run, Sequence[Any], dict[str, Any]], Results]:
    """Return a `Derivative.record` that runs the pure function under autograd: for gradients of gradients."""
    return lambda run, args, how: pure(*args, **how)
