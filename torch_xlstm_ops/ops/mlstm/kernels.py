"""The compiled functions of the mLSTM's sequence operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_xlstm_ops.maths import mlstm
from torch_xlstm_ops.maths.nonfinite import finite
from torch_xlstm_ops.runtime import compiler
from torch_xlstm_ops.schedules.kernels import Kernels, Output, Run, State


def kernels(eps: float, *, release_gil: bool = False, strict: bool = False) -> Kernels:
    """Return the functions of a call.

    release_gil: compile them so that other threads run meanwhile. strict: raise RuntimeError where they cannot be
    compiled; else they run uncompiled there.
    """
    def compiled(fn: compiler.PureFunction, **static: Any) -> Run:
        return _compiled(fn, strict=strict, release_gil=release_gil, **static)

    return Kernels(
        forward=_Forward(compiled, eps), forward_from_summary=_forward_from_summary(compiled, eps),
        summarize=compiled(mlstm.summarize), absorb=compiled(mlstm.absorb), final_state=compiled(mlstm.final_state),
        backward=_backward(compiled, eps), step=_step(_compiled(mlstm.advance, strict=strict, eps=eps)),
        step_gradient=lambda args: mlstm.step_gradient(*args, eps=eps),
    )
