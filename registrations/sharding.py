"""How DTensor shards the operators: by batch or by heads, which are independent, or not at all.

A sequence's tokens and the head dimensions stay whole on each device. Where an sLSTM is sharded by batch, the gradients
of its weights come as partial sums. `register_sharding` takes an operator that writes in place to return its first
argument, so `mlstm_step_` has a rule of another kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from torch_xlstm_ops.ops.operator import InPlace, Operator, copy_to_state

from .schemas import LIBRARY


def _rule(operator: Operator) -> Callable[..., Sequence[tuple[list[Any], list[Any]]]]:
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
        given = list(zip(operator.arguments, args, strict=False))
        return [
            ([result(axes) for axes in operator.results], [None if a is None else argument(axes) for axes, a in given])  # type: ignore[no-untyped-call]
            for result, argument in ways
        ]

    return rule


_types: list[type] = []  # DTensor, once it is there


def is_distributed(t: object) -> bool:
    """Return whether a tensor is a DTensor."""
    return bool(_types) and isinstance(t, _types[0])


def register(operators: Iterable[Operator]) -> None:
    """Give DTensor the operators' rules."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.experimental import register_sharding

    _types[:] = [DTensor]
    for operator in operators:
        if operator.in_place is None:
            register_sharding(operator.overload)(_rule(operator))
        else:
            torch.library.register_torch_dispatch(
                f"xlstm::{operator.name}", DTensor, _in_place(operator.in_place), lib=LIBRARY
            )


def _in_place(how: InPlace) -> Callable[..., Any]:
    """Return what DTensor calls for an operator that writes: it takes what is written for the first argument."""
    def run(cls: Any, op: Any, types: Any, args: Sequence[Any], kwargs: dict[str, Any] | None) -> Any:
        return copy_to_state(how.functional, args, kwargs or {}, how.written)

    return run
