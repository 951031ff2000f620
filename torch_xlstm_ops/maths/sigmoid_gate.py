"""The mLSTM with a sigmoid input gate, by the one with an exponential gate.

    C' = sigmoid(f) C + sigmoid(i) k v^T          N' likewise with k
    h  = (q DHQK^-1/2 . C') / (max(|q DHQK^-1/2 . N'|, 1) + eps), or without the denominator

The exponential gate log(sigmoid(i)) gives the same state, C = c exp(m), and with eps = 0 the denominator max(|q.N|, 1).
To leave the denominator out, all input is scaled by exp(-SHIFT), so that 1 is the larger, and h by exp(SHIFT).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops.maths.shapes import state_dtype

SHIFT = 40.0  # q.N is below exp(40), and what is above exp(-48) keeps exp(-m) finite in float32


class SigmoidState(NamedTuple):
    """State of an mLSTM with a sigmoid input gate: the memory and the normaliser, without a stabiliser.

    c: (B, NH, DHQK, DHHV); n: (B, NH, DHQK); float32, or float64 for float64 inputs.
    """

    c: Tensor  # (B, NH, DHQK, DHHV)
    n: Tensor  # (B, NH, DHQK)


def through(
    run: Callable[..., tuple[Tensor, Sequence[Tensor]]], streams: Sequence[Tensor], c: Tensor | None, n: Tensor | None,
    *, normalize: bool, eps: float,
) -> tuple[Tensor, SigmoidState]:
    """Run an mLSTM with an exponential gate as one with a sigmoid gate.

    run: the former, from q k v igate fgate c n m and eps to h and c n m. c and n may be None, and n where nothing is
    normalised. In float64 eps is exact; else it is added relative to the denominator, which differs by less than eps.
    """
    q, k, v, igate, fgate = streams
    if normalize and (c is None) != (n is None):
        raise ValueError("c and n must be given together, got one")
    dtype, exact = v.dtype, normalize and v.dtype == torch.float64
    shift = SHIFT if exact or not normalize else 0.0
    if c is not None and n is None:
        n = c.new_zeros(c.shape[:-1])
    if shift and dtype == torch.float16:  # has no room for exp(-SHIFT)
        q, k, v = q.float(), k.float(), v.float()
    if exact:  # a column more computes q.N
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        c = c if c is None or n is None else torch.cat([c, n[..., None]], -1)
    m = None if c is None else c.new_full((*c.shape[:2], 1), -shift)
    log_i = torch.nn.functional.logsigmoid(igate.to(state_dtype(q.dtype))) - shift
    h, (c_after, n_after, m_after) = run(q, k, v, log_i, fgate, c, n, m, eps=0.0)
    scale = torch.exp(m_after + shift)
    c_after, n_after = c_after * scale[..., None], n_after * scale
    if exact:
        h, c_after = h * math.exp(shift), c_after[..., :-1].contiguous()
        h = h[..., :-1] / (h[..., -1:].abs().clamp(min=1.0) + eps)
    else:
        h = h / (1 + eps) if normalize else (h * math.exp(shift)).to(dtype)
    return h, SigmoidState(c_after, n_after)
