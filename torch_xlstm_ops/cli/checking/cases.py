"""Every operator with drawn arguments and the recurrence that it must equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops.maths import mlstm, slstm
from torch_xlstm_ops.maths.shapes import EPS

MLSTM = {"B": 1, "NH": 4, "S": 300, "DHQK": 64, "DHHV": 128}  # whole chunks and a partial one
SLSTM = {"B": 2, "NH": 4, "S": 40, "DH": 64}  # whole blocks and a partial one


class Case(NamedTuple):
    """An operator, a function that draws its arguments in a dtype, and the recurrence that it must equal.

    inputs: compare the gradients of so many first arguments; default 0, compare the results.
    """

    name: str
    draw: Callable[[torch.dtype], list[Tensor]]
    call: Callable[..., Sequence[Tensor]]
    exact: Callable[..., Sequence[Tensor]]
    inputs: int = 0

    def results(self, function: Callable[..., Sequence[Tensor]], args: Sequence[Tensor]) -> list[Tensor]:
        """Return the results of a function for `args`, or the gradients of the first `inputs` arguments."""
        if not self.inputs:
            return list(function(*args))
        given = [t.detach().requires_grad_() for t in args[: self.inputs]]
        outputs = function(*given)
        generator = torch.Generator().manual_seed(1)
        seeds = [torch.randn(t.shape, generator=generator).bfloat16().to(t) for t in outputs]  # exact in every dtype
        return list(torch.autograd.grad(list(outputs), given, seeds))


def draw_mlstm(dtype: torch.dtype) -> list[Tensor]:
    """Return q, k, v, igate, fgate, c, n, m of a sequence."""
    B, NH, S, DHQK, DHHV = MLSTM.values()
    generator = torch.Generator().manual_seed(0)
    shapes = ((S, DHQK), (S, DHQK), (S, DHHV), (S,), (S,), (DHQK, DHHV), (DHQK,), (1,))
    drawn = [torch.randn(B, NH, *shape, generator=generator) for shape in shapes]
    drawn[4] += 3
    return [*(t.to(dtype) for t in drawn[:5]), *drawn[5:]]


def draw_mlstm_token(dtype: torch.dtype) -> list[Tensor]:
    """Return q, k, v, igate, fgate, c, n, m of a token."""
    q, k, v, igate, fgate, *state = draw_mlstm(dtype)
    return [*(t[:, :, 0].contiguous() for t in (q, k, v)), igate[:, :, :1].contiguous(), fgate[:, :, :1].contiguous(),
            *state]


def draw_slstm(dtype: torch.dtype) -> list[Tensor]:
    """Return x, r, b, y, c, n, m of a sequence."""
    B, NH, S, DH = SLSTM.values()
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, S, 4, NH, DH), (4, NH, DH, DH), (4, NH, DH), *[(B, NH, DH)] * 4)
    x, r, b, y, c, n, m = (torch.randn(shape, generator=generator) for shape in shapes)
    return [*(t.to(dtype) for t in (x, r * DH**-0.5, b)), y, c, n.abs() + 1, m]


def draw_slstm_token(dtype: torch.dtype) -> list[Tensor]:
    """Return x, r, b, y, c, n, m of a token."""
    x, *rest = draw_slstm(dtype)
    return [x[:, 0].contiguous(), *rest]


def _op(name: str) -> Callable[..., Sequence[Tensor]]:
    return lambda *args: getattr(torch.ops.xlstm, name)(*args)


def _step_in_place(*args: Tensor) -> list[Tensor]:
    return [torch.ops.xlstm.mlstm_step_(*args), *args[5:]]


def _mlstm_step(*args: Tensor) -> Sequence[Tensor]:
    return mlstm.step(*args, eps=EPS)


def _mlstm_recurrent(*args: Tensor) -> Sequence[Tensor]:
    return mlstm.recurrent(*args, eps=EPS)


def _slstm_step(*args: Tensor) -> Sequence[Tensor]:
    return slstm.step(*args, floor=0.0, product=slstm.Product.FUSED)


CASES = (
    Case("mlstm_step", draw_mlstm_token, _op("mlstm_step"), _mlstm_step),
    Case("mlstm_step_", draw_mlstm_token, _step_in_place, _mlstm_step),
    Case("mlstm_chunkwise", draw_mlstm, _op("mlstm_chunkwise"), _mlstm_recurrent),
    Case("mlstm_chunkwise and backward", draw_mlstm, _op("mlstm_chunkwise"), _mlstm_recurrent, 8),
    Case("slstm_step", draw_slstm_token, _op("slstm_step"), _slstm_step),
    Case("slstm_sequence", draw_slstm, _op("slstm_sequence"), slstm.recurrent),
    Case("slstm_sequence and backward", draw_slstm, _op("slstm_sequence"), slstm.recurrent, 7),
)
