"""vmap: the mapped axis becomes part of the batch, or of the heads where an argument has no batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from torch_xlstm_ops.ops.operator import Operator
from torch_xlstm_ops.ops.table import OPERATORS

from .schemas import LIBRARY


def register(operator: Operator) -> None:
    """Give an operator its vmap rule."""
    def rule(info: Any, in_dims: Sequence[int | None], *args: Any, **how: Any) -> Any:
        if operator.in_place is not None:
            return _write(operator, info.batch_size, in_dims, args, how)
        return _mapped(operator, info.batch_size, in_dims, args, how)

    torch.library.register_vmap(f"xlstm::{operator.name}", rule, lib=LIBRARY)


def _mapped(
    operator: Operator, size: int, in_dims: Sequence[int | None], args: Sequence[Any], how: dict[str, Any]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Call an operator with the mapped axis folded into the batch or the heads; return results, and that axis of each.

    Where a mapped argument has no such axis, as a mask has no heads, the operator is called once for each entry.
    """
    by_batch = all(axes.batch is not None for axes in operator.arguments)
    axes_of = [axes.batch if by_batch else axes.heads for axes in operator.arguments]
    out_axes = [cast(int, axes.batch if by_batch else axes.heads) for axes in operator.results]
    front = [_front(a, dim, size) for a, dim in zip(args, in_dims, strict=True)]
    if any(axis is None and dim is not None for axis, dim in zip(axes_of, in_dims, strict=False)):
        rows = [operator.overload(*[t[row] if isinstance(t, Tensor) else t for t in front], **how)
                for row in range(size)]
        return tuple(torch.stack(parts) for parts in zip(*rows, strict=True)), (0,) * len(out_axes)
    folded = [
        t if not isinstance(t, Tensor) else t[0] if axis is None else t.movedim(0, axis).flatten(axis, axis + 1)
        for t, axis in zip(front, axes_of, strict=False)
    ]
    out = operator.overload(*folded, **how)
    return tuple(_unfold(t, axis, size) for t, axis in zip(out, out_axes, strict=True)), tuple(out_axes)


def _write(
    operator: Operator, size: int, in_dims: Sequence[int | None], args: Sequence[Any], how: dict[str, Any]
) -> tuple[Tensor, int]:
    """Compute the new values by the functional operator, and copy them over the old ones."""
    assert operator.in_place is not None
    functional, written, _ = operator.in_place
    names = list(operator.signature.parameters)[written]
    for name, dim in zip(names, in_dims[written], strict=True):
        if dim is None:
            raise ValueError(f"{name} must be mapped where vmap maps another argument of {operator.name}, got in_dims "
                             "None")
    (h, *new), axes = _mapped(OPERATORS[functional], size, in_dims, args, how)
    for old, dim, value, axis in zip(args[written], in_dims[written], new, axes[1:], strict=True):
        old.movedim(cast(int, dim), axis).copy_(value)
    return h, axes[0]


def _front(a: Any, dim: int | None, size: int) -> Any:
    """Return a tensor with the mapped axis first."""
    if not isinstance(a, Tensor):
        return a
    return a.expand(size, *a.shape) if dim is None else a.movedim(dim, 0)


def _unfold(t: Tensor, axis: int, size: int) -> Tensor:
    """Part the mapped axis from the one that it was folded into."""
    inner = t.shape[axis] // size if size else 0
    return t.reshape(*t.shape[:axis], size, inner, *t.shape[axis + 1:])
