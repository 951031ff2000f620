"""How far rounding may put the results of a call: from the float64 recurrence run beside the sums of absolute values.

A denominator q.n that is a small difference of large terms multiplies every rounding error by
kappa = sum of |terms| / |denominator|, and a weight exp(x) has the rounding error of x, which is |x| times that of 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_xlstm_ops.maths.decay import zero_if_empty
from torch_xlstm_ops.maths.mlstm.recurrence import floor

EPS = 1e-6
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


class Bounds(NamedTuple):
    """Of the tokens and the final state of an mLSTM; sizes that one rounding error is relative to."""

    h: Tensor  # (B, NH, S), with kappa
    c: Tensor  # (B, NH)
    n: Tensor  # (B, NH)
    kappa: float  # the largest
    exponent: float  # the largest |x| of a weight exp(x), at least 1
    kink: float  # least distance of |q.n| from exp(-m), where the gradient jumps, over the sum of |terms|
    tie: float  # least distance of the two arguments of m's maximum, where its gradient jumps, over their size


def bounds(args: list[Tensor]) -> Bounds:
    """Return the bounds of a call without resets; args: q k v igate fgate c n m, finite but for gates and m of -inf."""
    q, k, v, igate, fgate, c, n, m = (t.double() for t in args)
    q, log_f = q * q.shape[-1] ** -0.5, F.logsigmoid(fgate)
    c_abs, n_abs = c.abs(), n.abs()
    found: list[Tensor] = []
    kappa, exponent, kink, tie = 1.0, 1.0, float("inf"), float("inf")
    for t in range(q.shape[2]):
        i = igate[:, :, t, None]
        carried = log_f[:, :, t, None] + m
        new = torch.maximum(carried, i)
        base = zero_if_empty(new)
        keep, add = torch.exp(carried - base), torch.exp(i - base)
        empty = (carried == -torch.inf)[..., None]
        added = (add * k[:, :, t].abs())[..., None] * v[:, :, t, None].abs()
        c_abs = torch.where(empty, 0, keep[..., None] * c_abs) + added
        n = torch.where(empty[..., 0], 0, keep * n) + add * k[:, :, t]
        n_abs = torch.where(empty[..., 0], 0, keep * n_abs) + add * k[:, :, t].abs()
        at, at_abs = (q[:, :, t] * n).sum(-1).abs(), (q[:, :, t].abs() * n_abs).sum(-1)
        low = floor(new)[..., 0]
        ratio = torch.maximum(at_abs, low) / (torch.maximum(at, low) + EPS)
        read = (q[:, :, t].abs()[..., None] * c_abs).sum(-2).norm(dim=-1) / (torch.maximum(at, low) + EPS)
        found.append(read * ratio)
        sizes = [x[x.isfinite()].abs().max().item() if x.isfinite().any() else 0.0 for x in (carried, i, new, m)]
        exponent = max(exponent, *sizes)
        kappa = max(kappa, ratio.max().item())
        kink = min(kink, ((at - low).abs() / torch.maximum(at_abs, low)).min().item())
        near = ((carried - i).abs() / (1 + new.abs()))[carried.isfinite() & i.isfinite()]
        tie, m = min(tie, near.min().item() if near.numel() else tie), new
    h = torch.stack(found, -1) if found else q.new_zeros(q.shape[:3])
    return Bounds(h, c_abs.flatten(2).norm(dim=-1), n_abs.norm(dim=-1), kappa, exponent, kink, tie)
