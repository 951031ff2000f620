"""The sLSTM's operators."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torch_xlstm_ops.maths import aten
from torch_xlstm_ops.ops import flops
from torch_xlstm_ops.ops.operator import MASK, ROWS, Axes, Backward, Operator, overload
from torch_xlstm_ops.ops.slstm import sequence, step

_X, _X_TOKEN, _H, _WEIGHT = Axes(0, 3), Axes(0, 2), Axes(0, 2), Axes(None, 1)
_CELL = (_WEIGHT, _WEIGHT, *[ROWS] * 4)  # r b y c n m
_CASTS = slice(0, 2)  # x and r: states and biases keep their precision


def _decomposition(x: Tensor, *args: Any, **how: Any) -> aten.Results:
    if not isinstance(x.shape[1], int):
        raise NotImplementedError(f"x must have a known S to decompose slstm_sequence, a loop over its tokens, "
                                  f"got S = {x.shape[1]}")
    return aten.slstm_sequence(x, *args, **how)


OPERATORS = (
    Operator(
        "slstm_step", step.run, step.fake, aten.slstm_step, flops.slstm_step,
        arguments=(_X_TOKEN, *_CELL), results=(ROWS,) * 4, backward=Backward(step.save, step.gradients), casts=_CASTS,
        decomposition=aten.slstm_step,
    ),
    Operator(
        "slstm_sequence", sequence.run, sequence.fake, aten.slstm_sequence, flops.slstm_sequence,
        arguments=(_X, *_CELL, MASK), results=(_H, *[ROWS] * 4),
        backward=Backward(sequence.save, lambda *tensors, **how: overload("slstm_sequence_backward")(*tensors, **how)),
        casts=_CASTS, decomposition=_decomposition,
    ),
    Operator(
        "slstm_sequence_backward", sequence.run_backward, sequence.fake_backward, aten.slstm_sequence_backward,
        flops.slstm_sequence_backward, arguments=(_H, *[ROWS] * 4, _X, *_CELL, _H, MASK),
        results=(_X, _WEIGHT, _WEIGHT, *[ROWS] * 4),
    ),
)
