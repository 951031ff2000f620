"""The sLSTM's step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_xlstm_ops.kernels.threads import step_threads
from torch_xlstm_ops.maths import slstm
from torch_xlstm_ops.maths.slstm import Product
from torch_xlstm_ops.ops.call_cache import CallCache
from torch_xlstm_ops.ops.operator import overload
from torch_xlstm_ops.ops.slstm.arguments import check_step
from torch_xlstm_ops.runtime import compiler, devices

Results = tuple[Tensor, ...]


def run(*args: Tensor, floor: float = 0.0) -> Results:
    """Return the state y, c, n, m after a token; args: x r b y c n m."""
    contiguous = [t.contiguous() for t in args]
    with devices.submission(args[0].device):
        if args[0].numel() == 0:
            return fake(*contiguous, floor=floor)
        return tuple(_calls(contiguous, floor)(contiguous))


def fake(*args: Tensor, floor: float = 0.0) -> Results:
    """Check the arguments of a step and allocate its results."""
    x, r, b, y, c, n, m = args
    check_step(x, r, b, (y, c, n, m), floor)
    return tuple(t.new_empty(t.shape) for t in (y, c, n, m))


def save(args: Sequence[Any], results: Results) -> Sequence[Any]:
    """Return what the gradient reads: the arguments, and y after the token."""
    return *args, results[0]


def gradients(*tensors: Tensor, floor: float = 0.0) -> Sequence[Tensor]:
    """Return a step's gradients: those of a sequence of one token. tensors: dy, dc, dn, dm, and what `save` returns."""
    dy, dc, dn, dm, x, r, b, y, c, n, m, y_after = tensors
    h = y_after.to(x.dtype)[:, None]
    args = (torch.zeros_like(h), dy, dc, dn, dm, x[:, None], r, b, y, c, n, m, h)
    dx, *others = overload("slstm_sequence_backward")(*args, floor=floor)
    return dx.squeeze(1), *others


def _find(args: list[Tensor], floor: float) -> compiler.RawCallable:
    x, r, b, y, c, n, m = args
    check_step(x, r, b, (y, c, n, m), floor)
    axes = slstm.axes(slstm.step, Product.FUSED, False)
    threads = step_threads(y.numel())
    return compiler.get(slstm.step, axes, args, threads=threads, floor=floor, product=Product.FUSED)


_calls = CallCache(_find)
