"""Autograd: reverse mode by hand-written gradients, everything else through the operators as ATen calls.

The hand-written gradient of an operator is an operator itself. It serves where autograd alone records a call. Forward
mode, transforms of torch.func, and derivatives of a gradient run the operator's `aten` form, which has derivatives of
any order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torch_xlstm_ops.ops.operator import Backward, Operator, Results, copy_to_state
from torch_xlstm_ops.runtime import forks, torch_internals

from .schemas import LIBRARY
from .sharding import is_distributed

Call = Callable[[Sequence[Any], dict[str, Any]], Results]


def register(operator: Operator) -> None:
    """Give an operator its autograd kernel."""
    direct, forward_mode, next_is_device = operator.run, torch_internals.forward_mode, torch_internals.next_is_device
    redispatch, record = _redispatch(operator), _record(operator)

    def below(keyset: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if forks.unsettled:
            forks.settle()
        if next_is_device.run(keyset):  # the dispatcher would take 3 us to get there
            return direct(*args, **kwargs)
        return redispatch(keyset, args, kwargs)

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        tangents = forward_mode.run() and has_tangents(args)
        if not tangents and not requires_grad(args):
            return below(keyset, args, kwargs)
        if tangents or torch_internals.transforms():
            operator.fake(*args, **kwargs)  # checks the arguments
            return operator.aten(*args, **kwargs)
        return record(lambda args, kwargs: below(keyset, args, kwargs), args, kwargs)

    LIBRARY.impl(operator.name, kernel, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]


def requires_grad(args: Sequence[Any]) -> bool:
    """Return whether autograd would record this call."""
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)


def has_tangents(args: Sequence[Any]) -> bool:
    """Return whether an argument carries a tangent of forward mode."""
    # torch has one level of forward mode, 0; it is named because traced code does not make it the current one.
    duals = (forward_ad.unpack_dual(a, level=0) for a in args if isinstance(a, Tensor))  # type: ignore[no-untyped-call]
    return any(dual.tangent is not None for dual in duals)


def refuse_nested(operator: Operator, args: Sequence[Any]) -> None:
    """Raise TypeError for a nested tensor."""
    for argument, t in zip(operator.signature.parameters, args, strict=False):
        if isinstance(t, Tensor) and t.is_nested:
            kind = "jagged" if t.layout == torch.jagged else "strided"
            raise TypeError(f"{argument} must be a dense tensor, got a nested one ({kind}): put sequences of several "
                            "lengths one behind another in a row, and mark the first token of each in reset")


def _redispatch(operator: Operator) -> Callable[[Any, Sequence[Any], dict[str, Any]], Any]:
    """Return what calls the kernel below autograd's, where that is not a device's."""
    op, in_place = operator.overload, operator.in_place

    def redispatch(keyset: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if in_place is not None and torch_internals.functionalizes(keyset):  # torch cannot take our writes away
            return copy_to_state(in_place.functional, args, kwargs, in_place.written)
        refuse_nested(operator, args)
        return torch_internals.below_autograd()(op, keyset, args, kwargs)

    return redispatch


def _record(operator: Operator) -> Callable[[Call, Sequence[Any], dict[str, Any]], Results]:
    """Return what runs an operator where reverse mode alone records it."""
    if operator.backward is not None:
        return _recorded(operator.backward)
    if operator.in_place is not None:
        refusal = operator.in_place.refusal

        def refuse(call: Call, args: Sequence[Any], how: dict[str, Any]) -> Results:
            raise RuntimeError(refusal)

        return refuse
    return lambda call, args, how: operator.aten(*args, **how)


def _recorded(backward: Backward) -> Callable[[Call, Sequence[Any], dict[str, Any]], Results]:
    """Return what runs an operator with a hand-written gradient."""

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, call: Call, how: dict[str, Any], *args: Any) -> Any:
            results = call(args, how)
            ctx.save_for_backward(*backward.save(args, results))
            ctx.how, ctx.given = how, [isinstance(t, Tensor) for t in args]
            if type(results[0]) is Tensor or is_distributed(results[0]):  # else autograd fills in zeros of the type
                ctx.set_materialize_grads(False)
            ctx.results = [t.detach() if is_distributed(t) else (t.shape, t.dtype) for t in results]
            return results

        @staticmethod
        def backward(ctx: Any, *given: Any) -> Any:
            saved = ctx.saved_tensors
            gradients = backward.gradients(*_filled(given, ctx.results, saved[0]), *saved, **ctx.how)
            found = [*gradients, None]  # a mask has none
            return None, None, *[g if there else None for g, there in zip(found, ctx.given, strict=False)]

    return lambda call, args, how: Recorded.apply(call, how, *args)  # type: ignore[no-untyped-call]


_ALIGNED = 64  # elements, at a multiple of which each part of a tensor begins: kernels may rely on 16 bytes


def _strides(shape: Sequence[int]) -> list[int]:
    """Return the strides of a contiguous tensor."""
    return [math.prod(shape[axis + 1:]) for axis in range(len(shape))]


def _filled(given: Sequence[Tensor | None], results: Sequence[Any], like: Tensor) -> Sequence[Tensor]:
    """Return gradients of results, with zeros in place of None, which one kernel fills for all of a dtype.

    results: a distributed tensor each, or else the shape and dtype. like: on the device of the zeros.
    """
    missing = {at: results[at] for at, gradient in enumerate(given) if gradient is None}
    zeros: dict[int, Tensor] = {}
    if is_distributed(results[0]):
        zeros = {at: torch.zeros_like(t) for at, t in missing.items()}
    else:
        for dtype in {dtype for _, dtype in missing.values()}:
            shapes = {at: shape for at, (shape, of_dtype) in missing.items() if of_dtype == dtype}
            starts = [0, *accumulate(-(-math.prod(shape) // _ALIGNED) * _ALIGNED for shape in shapes.values())]
            whole = like.new_zeros(starts[-1], dtype=dtype)
            for (at, shape), start in zip(shapes.items(), starts, strict=False):
                zeros[at] = whole.as_strided(shape, _strides(shape), start)  # one call for each part
    return [zeros[at] if gradient is None else gradient for at, gradient in enumerate(given)]
