"""Decompose operators for exporters only."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from torch_xlstm_ops.runtime.torch_internals.need import need


def _register_nothing(op: Any, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    pass


@need(_register_nothing, where=("torch._decomp.register_decomposition",),
      without="torch.onnx.export needs a program that was decomposed by registrations.decompositions.table()")
def register_decomposition(op: Any, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register an operator's decomposition for exporters; fake tensors still use its fake.

    With symbolic sizes, FakeTensorMode prefers a decomposition to a fake, unless the operator is in the table of Python
    meta functions.
    """
    torch._decomp.register_decomposition(op, type="meta")(fake)
    torch._decomp.register_decomposition(op)(function)


def _no_functional_mode() -> type | None:
    return None


@need(_no_functional_mode, where=("torch._subclasses.functional_tensor.FunctionalTensorMode",),
      without="torch.onnx.export refuses a model that calls mlstm_step_")
def functional_mode() -> type | None:
    """Return the mode that takes writes to arguments out of a program; None if there is none."""
    from torch._subclasses.functional_tensor import FunctionalTensorMode

    return FunctionalTensorMode


def _keep_default(op: Any) -> None:
    pass


@need(_keep_default, where=("torch._inductor.lowering.make_fallback", "torch._inductor.lowering.lowerings",
                        "torch._inductor.lowering.tag_to_layout_constraint",
                        "torch._inductor.graph.get_layout_constraint_tag"),
      without="with the environment variable CI set, Inductor refuses operators that have a decomposition")
def keep_as_call(op: Any) -> None:
    """Make Inductor, if it is loaded, keep an operator as a call although it has a decomposition.

    This is Inductor's default, except that it raises if the environment variable CI is set.
    """
    if "torch._inductor.lowering" not in sys.modules:
        return
    from torch._inductor.graph import get_layout_constraint_tag  # type: ignore[attr-defined]
    from torch._inductor.lowering import lowerings, make_fallback, tag_to_layout_constraint

    if op not in lowerings:
        constraint = tag_to_layout_constraint(get_layout_constraint_tag(op, with_default=True))
        make_fallback(op, layout_constraint=constraint, warn=False)  # type: ignore[no-untyped-call]
