"""The description of an operator, from which `registrations` makes all that the dispatcher needs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Results = Any  # a tensor, or a tuple of tensors


class Axes(NamedTuple):
    """Which axes of a tensor hold the batch and the heads; None where it has none."""

    batch: int | None
    heads: int | None


ROWS, MASK = Axes(0, 1), Axes(0, None)  # q k v igate fgate c n m h and the sLSTM's states; reset


class Backward(NamedTuple):
    """A hand-written gradient."""

    # From the arguments and the results to the tensors that `gradients` reads.
    save: Callable[[Sequence[Any], tuple[Tensor, ...]], Sequence[Any]]
    # From the results' gradients, the saved tensors and the keywords to the gradients of the leading arguments.
    gradients: Callable[..., Sequence[Tensor]]


class InPlace(NamedTuple):
    """What an operator does that writes to some of its arguments."""

    functional: str  # the operator that returns the new values, after its first result
    written: slice  # the arguments that are written
    refusal: str  # the error where autograd would record the call


@dataclass(frozen=True, eq=False)
class Operator:
    """One operator; `registrations/schemas.py` has its schema."""

    name: str
    run: Callable[..., Results]  # for every device
    fake: Callable[..., Results]  # checks the arguments and allocates the results
    aten: Callable[..., Results]  # the operator as ATen calls; autograd differentiates it to any order
    flops: Callable[..., int]
    arguments: tuple[Axes, ...]  # of the tensor arguments, in order
    results: tuple[Axes, ...]
    backward: Backward | None = None  # None: the gradient is that of `aten`
    casts: slice | None = None  # the arguments that autocast casts
    in_place: InPlace | None = None
    decomposition: Callable[..., Results] | None = None  # for exporters that know ATen alone

    @property
    def overload(self) -> Any:
        """Return the operator as torch.ops has it."""
        return overload(self.name)

    @functools.cached_property
    def signature(self) -> inspect.Signature:
        """Return the arguments with their defaults, from the schema."""
        return inspect.Signature([
            inspect.Parameter(
                a.name, inspect.Parameter.KEYWORD_ONLY if a.kwarg_only else inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=a.default_value if a.has_default_value() else inspect.Parameter.empty,
            )
            for a in self.overload._schema.arguments
        ])


def overload(name: str) -> Any:
    """Return the operator `name` as torch.ops has it."""
    return getattr(torch.ops.xlstm, name).default


def without_view(t: Tensor) -> Tensor:
    """Return a tensor on the same memory that autograd does not take for a view: torch refuses to write to some views.
    """
    return t.data


def copy_to_state(operator: str, args: Sequence[Any], how: dict[str, Any], written: slice) -> Tensor:
    """Compute the new values of `written` arguments by a functional operator, and copy them over the old ones."""
    first, *new = overload(operator)(*args, **how)
    for old, value in zip(args[written], new, strict=True):
        old.copy_(value)
    return first  # type: ignore[no-any-return]
