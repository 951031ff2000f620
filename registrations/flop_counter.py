"""The operators' formulas for `torch.utils.flop_counter`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from torch_xlstm_ops.ops.operator import Operator


def register(operators: Iterable[Operator]) -> None:
    """Give torch's counter the operators' formulas."""
    from torch.utils.flop_counter import register_flop_formula

    for operator in operators:
        register_flop_formula(getattr(torch.ops.xlstm, operator.name), get_raw=True)(_raw(operator.flops))


def _raw(formula: Callable[..., int]) -> Callable[..., int]:
    """Return a formula as torch calls it, with the result too."""
    return lambda *args, out_val=None, **how: formula(*args, **how)
