"""An estimate of the error of a window, from how far its last two rounds moved y."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_xlstm_ops.maths.decay import NEG_INF


def judge(
    change: Tensor, before: Tensor, size: Tensor, *, unit: float, noise: float, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Return an estimate of the error and the residual, (), relative to the root mean square of each row and head.

    change, before: (NC, G, NH, DH), of the last round and of the one before it; size: of the last.
    Where rho is what a round leaves of the residual r of a row and head, further rounds remove r rho / (1 - rho), which
    is estimated for each of its chunks; the largest counts. It is infinite where a row's residual does not shrink, or
    where that of one chunk grows that is no small part of the tolerance; NaN where y is undecided. A residual below
    `noise` is rounding, by which the recurrence itself is uncertain: it stands for itself.
    unit: a rounding step of y, relative. A change d below it flips one element in unit / d by as much as the unit, so
    that the root mean square found, r, tells of d = r^2 / unit.
    """
    scale = size.mean(-1).mean(0).clamp(min=1e-30)  # (G, NH)
    chunks, chunks_before = (_unrounded(torch.sqrt(t.mean(-1) / scale), unit) for t in (change, before))
    row, row_before = (_unrounded(torch.sqrt(t.mean(-1).mean(0) / scale), unit) for t in (change, before))
    rate = row / row_before
    error = torch.where(rate < 1, chunks * (rate / (1 - rate)), -NEG_INF)
    error = torch.where((chunks > tolerance / 4) & (chunks >= chunks_before), -NEG_INF, error)
    error = torch.where(chunks <= noise, chunks, torch.where(chunks.isnan(), chunks, error))
    return error.amax(), chunks.amax()


def _unrounded(r: Tensor, unit: float) -> Tensor:
    return torch.minimum(r, r * r / unit)
