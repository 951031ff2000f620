"""One table of operator calls in float64 for the laws that hold for every operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tests import oracle
from torch_xlstm_ops.maths import aten

ops = torch.ops.xlstm
L = 16
SIZES = oracle.Sizes(B=2, NH=2, S=5)  # and L: head dimensions and chunks of test_mlstm_ops, as each is a compile
SLSTM = (2, 4, 2, 4)  # B, S, and NH, DH of test_slstm


class Case(NamedTuple):
    """A call of an operator, and the same as the plain recurrence."""

    op: Callable[..., Sequence[Tensor]]
    aten: Callable[..., Sequence[Tensor]]
    args: Callable[[], list[Tensor]]


def mlstm_sequence(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return oracle.draw(SIZES, dtype)


def mlstm_token(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    q, k, v, igate, fgate, *state = oracle.draw(SIZES, dtype)
    token = (q[:, :, 0], k[:, :, 0], v[:, :, 0], igate[:, :, :1], fgate[:, :, :1])
    # Contiguous: in compiled forward mode torch 2.13 asserts that views of a strided input and of its tangent agree.
    return [*(t.contiguous() for t in token), *state]


def slstm_sequence(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    B, S, NH, DH = SLSTM
    g = torch.Generator().manual_seed(3)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64)

    drawn = [normal(B, S, 4, NH, DH), normal(4, NH, DH, DH) / 2, normal(4, NH, DH)]
    drawn += [normal(B, NH, DH), normal(B, NH, DH), normal(B, NH, DH).exp(), normal(B, NH, DH)]
    return [t.to(dtype) for t in drawn]


def slstm_token(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    x, *rest = slstm_sequence(dtype)
    return [x[:, 0].contiguous(), *rest]


def by_steps(*args: Tensor) -> Sequence[Tensor]:
    """Run the mLSTM by the schedule that has one small kernel."""
    found: Sequence[Tensor] = ops.mlstm_chunkwise(*args, chunk_size=L, schedule="recurrent")
    return found


def recurrence(*args: Tensor) -> Sequence[Tensor]:
    from torch_xlstm_ops.maths import mlstm

    return mlstm.recurrent(*args, eps=1e-6)


CASES = {
    "mlstm_step": Case(ops.mlstm_step, aten.mlstm_step, mlstm_token),
    "mlstm_chunkwise": Case(by_steps, recurrence, mlstm_sequence),
    "slstm_step": Case(ops.slstm_step, aten.slstm_step, slstm_token),
    "slstm_sequence": Case(ops.slstm_sequence, aten.slstm_sequence, slstm_sequence),
}
