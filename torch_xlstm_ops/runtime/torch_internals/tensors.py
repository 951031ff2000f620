"""Compare tensors with those of an earlier call in a microsecond, mark tensors as written, and copy several."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torch_xlstm_ops.runtime.torch_internals.need import need

Alike = Callable[..., bool]


def _compare(tensors: Sequence[Tensor]) -> Alike:
    wanted = [_facts(t) for t in tensors]
    return lambda *given: len(given) == len(wanted) and all(map(_is, given, wanted))


def _facts(t: Tensor) -> tuple[object, ...]:
    neg = t.is_neg() if t.layout is torch.strided else False
    return (type(t), t.shape, t.stride(), t.dtype, t.device, t.requires_grad, t.is_inference(), neg)


def _is(t: object, facts: tuple[object, ...]) -> bool:
    return isinstance(t, Tensor) and _facts(t) == facts


@need(_compare, where=("torch._C._dynamo.guards.TensorGuards",),
      without="calls are recognised in Python, a few microseconds slower each")
def like(tensors: Sequence[Tensor]) -> Alike:
    """Return a function that tests whether tensors have these types, sizes, strides, dtypes and devices."""
    from torch._C._dynamo.guards import TensorGuards

    guards: Alike = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    return guards


def _count_by_view(tensors: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for t in tensors:
            t[:0].zero_() if t.dim() else t.add_(0)


@need(_count_by_view, where=("torch.autograd.graph.increment_version",),
      without="a write in place is announced by an empty write, which costs a few microseconds more")
def written(tensors: Sequence[Tensor]) -> None:
    """Tell autograd that a kernel wrote to tensors in place."""
    torch.autograd.graph.increment_version(tensors)


def _copy_each(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


@need(_copy_each, where=("torch._foreach_copy_",), without="tensors are copied one by one, with a launch each")
def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors into others of the same dtypes, on CUDA with one launch for each dtype where strides allow."""
    for dtype in dict.fromkeys(t.dtype for t in targets):
        of_dtype = [index for index, t in enumerate(targets) if t.dtype == dtype]
        torch._foreach_copy_([targets[i] for i in of_dtype], [sources[i] for i in of_dtype])
