"""An estimate of the error of a window, from how far its last two rounds moved y or the gradients of the gates."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_xlstm_ops.maths.decay import NEG_INF
from torch_xlstm_ops.maths.shapes import state_dtype
from torch_xlstm_ops.maths.slstm.parallel.window import PAD


def movement(found: Tensor, before: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    """Return how far a round moved what it found, and the size of that, as sums of squares over each chunk and head.

    found, before: what the last round stored and what the one before it did, (G, NC, L, NH, DH), or of four gates
    (G, NC, L, NH, 4, DH). rest, told apart by the number of axes: a mask (G, NC, L), whose padding does not count, and
    `doubt` as `settle` returns it (G, NC, NH, DH), which is added. Returns (G, NC, NH) each, wide.
    This is compiled for itself: within the round, Inductor would compare with what is not yet rounded.
    """
    wide, by_axes = state_dtype(found.dtype), {t.dim(): t for t in rest}
    now, then = found.to(wide), before.to(wide)
    change = torch.where((now == then) | (now.isnan() & then.isnan()), 0.0, now - then)
    size = torch.where(now.isnan(), 0.0, now)
    if 3 in by_axes:
        pad = (by_axes[3] == PAD).view(*by_axes[3].shape, *[1] * (now.dim() - 3))
        change, size = torch.where(pad, 0.0, change), torch.where(pad, 0.0, size)
    over = (2, 4, 5) if now.dim() == 6 else (2, 4)
    moved, squares = (t.square().sum(over) for t in (change, size))
    return moved + by_axes[4].sum(-1) if 4 in by_axes else moved, squares


def judge(
    change: Tensor, before: Tensor, size: Tensor, *, unit: float, noise: float, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Return an estimate of the error and the residual, (), relative to the root mean square of each row and head.

    change, before: (G, NC, NH), of the last round and of the one before it; size: of the last.
    Where rho is what a round leaves of the residual r of a row and head, further rounds remove r rho / (1 - rho), which
    is estimated for each of its chunks; the largest counts. It is infinite where a row's residual does not shrink, or
    where that of one chunk grows that is no small part of the tolerance; NaN where y is undecided. A residual below
    `noise` is rounding, by which the recurrence itself is uncertain: it stands for itself.
    unit: a rounding step of y, relative. A change d below it flips one element in unit / d by as much as the unit, so
    that the root mean square found, r, tells of d = r^2 / unit.
    """
    scale = size.mean(1, keepdim=True).clamp(min=1e-30)  # (G, 1, NH)
    chunks, chunks_before = (_unrounded(torch.sqrt(t / scale), unit) for t in (change, before))
    row, row_before = (_unrounded(torch.sqrt(t.mean(1, keepdim=True) / scale), unit) for t in (change, before))
    rate = row / row_before
    error = torch.where(rate < 1, chunks * (rate / (1 - rate)), -NEG_INF)
    error = torch.where((chunks > tolerance / 4) & (chunks >= chunks_before), -NEG_INF, error)
    error = torch.where(chunks <= noise, chunks, torch.where(chunks.isnan(), chunks, error))
    # In two steps: on CUDA each row and head is a block of its own.
    return error.amax(1).amax(), chunks.amax(1).amax()


def _unrounded(r: Tensor, unit: float) -> Tensor:
    return torch.minimum(r, r * r / unit)
