"""How DTensor shards the operators: by batch or by heads, which are independent, or not at all.

A sequence's tokens and the head dimensions stay whole on each device. Where an sLSTM is sharded by batch, the gradients
of its weights come as partial sums. `register_sharding` takes an operator that writes in place to return its first
argument, so `mlstm_step_` has a rule of another kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from torch_xlstm_ops.runtime.import_hook import when_imported

from .dispatch import overload
from .schemas import LIBRARY


class _Axes(NamedTuple):
    """Where a tensor has its batch and its heads; None where it has none."""

    batch: int | None
    heads: int | None


class Tensors(NamedTuple):
    """The axes of an operator's tensor arguments and of its results, in order."""

    arguments: tuple[_Axes, ...]
    results: tuple[_Axes, ...]


_ROWS, _MASK = _Axes(0, 1), _Axes(0, None)  # q k v igate fgate c n m h; reset
_X, _X_TOKEN, _H, _WEIGHT = _Axes(0, 3), _Axes(0, 2), _Axes(0, 2), _Axes(None, 1)
_CELL = (_WEIGHT, _WEIGHT, *[_ROWS] * 4)  # r b y c n m

OPERATORS = {
    "mlstm_step": Tensors((_ROWS,) * 8, (_ROWS,) * 4),
    "mlstm_chunkwise": Tensors((*[_ROWS] * 8, _MASK), (_ROWS,) * 4),
    "mlstm_chunkwise_backward": Tensors((*[_ROWS] * 12, _MASK), (_ROWS,) * 8),
    "slstm_step": Tensors((_X_TOKEN, *_CELL), (_ROWS,) * 4),
    "slstm_sequence": Tensors((_X, *_CELL, _MASK), (_H, *[_ROWS] * 4)),
    "slstm_sequence_backward": Tensors(
        (_H, *[_ROWS] * 4, _X, *_CELL, _H, _MASK), (_X, _WEIGHT, _WEIGHT, *[_ROWS] * 4)
    ),
}


def _rule(tensors: Tensors) -> Callable[..., Sequence[tuple[list[Any], list[Any]]]]:
    """Return what `register_sharding` asks: the placements that a call may have, of its results and its arguments."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    def place(axis: int | None, otherwise: Any) -> Any:
        return otherwise if axis is None else Shard(axis)

    ways = [
        (lambda axes: Replicate(), lambda axes: Replicate()),
        (lambda axes: place(axes.batch, Partial()), lambda axes: place(axes.batch, Replicate())),
        (lambda axes: place(axes.heads, Replicate()), lambda axes: place(axes.heads, Replicate())),
    ]

    def rule(*args: Any, **how: Any) -> Sequence[tuple[list[Any], list[Any]]]:
        given = list(zip(tensors.arguments, args, strict=False))
        return [
            ([result(axes) for axes in tensors.results], [None if a is None else argument(axes) for axes, a in given])  # type: ignore[no-untyped-call]
            for result, argument in ways
        ]

    return rule


def _step_in_place(cls: Any, op: Any, types: Any, args: Sequence[Any], kwargs: dict[str, Any] | None) -> Any:
    """Find the new state, and copy it over the old: DTensor takes what is written in place for the first argument."""
    h, *new = overload("mlstm_step")(*args, **(kwargs or {}))
    for state, value in zip(args[5:], new, strict=True):
        state.copy_(value)
    return h


_types: list[type] = []  # DTensor, once it is there


def is_distributed(t: object) -> bool:
    """Return whether a tensor is a DTensor."""
    return bool(_types) and isinstance(t, _types[0])


def _register() -> None:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.experimental import register_sharding

    _types[:] = [DTensor]
    for name, tensors in OPERATORS.items():
        register_sharding(overload(name))(_rule(tensors))
    torch.library.register_torch_dispatch("xlstm::mlstm_step_", DTensor, _step_in_place, lib=LIBRARY)


when_imported("torch.distributed.tensor", _register)  # which takes longer to import than all of this package
