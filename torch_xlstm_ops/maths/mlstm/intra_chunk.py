"""The intra-chunk level: the weights of a chunk's tokens and of the state before the chunk, and their gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops.maths.decay import NEG_INF, causal, exp_or_zero, log_decay, zero_if_empty
from torch_xlstm_ops.maths.mlstm.chunks import sum_tokens
from torch_xlstm_ops.maths.mlstm.recurrence import FLOOR, floor


class IntraChunkLogWeights(NamedTuple):
    """Log weights, for each token, of the tokens s <= t of its chunk and of the state before the chunk."""

    decay: Tensor  # (G, NC, L, L)
    m_inter: Tensor  # (G, NC, L)
    m: Tensor  # (G, NC, L), the maximum of both

    def weights(self) -> Tensor:
        """Return the weights of the tokens (G, NC, L, L), relative to the maximum."""
        return exp_or_zero(self.decay - zero_if_empty(self.m)[..., None])

    def w_state(self) -> Tensor:
        """Return the weight of the state before the chunk (G, NC, L), relative to the maximum."""
        return exp_or_zero(self.m_inter - zero_if_empty(self.m))


def intra_chunk_log_weights(igate: Tensor, within: Tensor, m_before: Tensor) -> IntraChunkLogWeights:
    """Return the log weights; within: `log_decay_prefixes` of each chunk; m_before: (G, NC), m before each chunk."""
    decay = log_decay(within[..., :, None], within[..., None, :]) + igate[..., None, :]
    decay = torch.where(causal(igate.shape[-1], igate), decay, NEG_INF)
    m_inter = log_decay(within) + m_before[..., None]
    return IntraChunkLogWeights(decay, m_inter, torch.maximum(decay.amax(-1), m_inter))


class IntraChunkGradient(NamedTuple):
    """Gradients at the intra-chunk level, and the weights that the inter-chunk level needs."""

    P: Tensor  # (G, NC, L, L), the weights of v in h
    dS: Tensor  # (G, NC, L, L), of the scores
    dq: Tensor  # (G, NC, L, DHQK), without the part from the scores
    q_gated: Tensor  # (G, NC, L, DHQK), the weights of the state in h
    dn_before: Tensor  # (G, NC, DHQK)
    E: Tensor  # (G, NC, L, L), of the log weights of tokens
    e: Tensor  # (G, NC, L), of the log weight of the state before the chunk, dm_inter included
    dm_inter: Tensor  # (G, NC, L), the part of m's gradient that m_inter receives


def intra_chunk_gradient(
    q: Tensor, scores: Tensor, intra: IntraChunkLogWeights, n_before: Tensor, dh_v: Tensor, C_dh: Tensor, eps: float
) -> IntraChunkGradient:
    """Differentiate the intra-chunk level; dh_v: dh_t . v_s (G, NC, L, L); C_dh: C_before dh_t (G, NC, L, DHQK)."""
    scale = q.shape[-1] ** -0.5
    weights, w = intra.weights() * scale, intra.w_state() * scale
    qn, qy = (q * n_before[..., None, :]).sum(-1), (q * C_dh).sum(-1)
    A = scores * weights
    den, low = A.sum(-1) + w * qn, floor(intra.m)
    r = 1 / (torch.maximum(den.abs(), low) + eps)
    g = r * ((A * dh_v).sum(-1) + w * qy)
    dden = torch.where(den.abs() > low, -g * r * den.sign(), 0.0)
    dm = torch.where(intra.m < -FLOOR[q.dtype], -g, -eps * g * r)
    at_token, at_state = intra.decay == intra.m[..., None], intra.m_inter == intra.m
    share = dm / (at_token.to(q.dtype).sum(-1) + at_state.to(q.dtype))
    dS = weights * (r[..., None] * dh_v + dden[..., None])
    E = dS * scores + torch.where(at_token, share[..., None], 0.0)
    dm_inter = torch.where(at_state, share, 0.0)
    e = w * (r * qy + dden * qn) + dm_inter
    dq = w[..., None] * (r[..., None] * C_dh + dden[..., None] * n_before[..., None, :])
    dn_before = sum_tokens((w * dden)[..., None] * q)
    return IntraChunkGradient(A * r[..., None], dS, dq, (w * r)[..., None] * q, dn_before, E, e, dm_inter)
