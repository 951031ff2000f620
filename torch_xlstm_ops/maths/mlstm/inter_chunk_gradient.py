"""The gradient of the inter-chunk level: chunk summaries, the states before chunks, and the state after the segment.

The inter-chunk weights W (G, target, source) are strictly lower triangular, so row 0 and the last column are unused:
row 0 carries the state after the segment as a target, and the last column the state before it as a source.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops.maths.decay import NEG_INF, exp_or_zero, log_decay, zero_if_empty
from torch_xlstm_ops.maths.mlstm.chunks import InterChunkWeights
from torch_xlstm_ops.maths.products import sum_over_terms


class FinalStateWeights(NamedTuple):
    """Weights of the chunk summaries and of the state before the segment in the state after it."""

    W: Tensor  # (G, NC)
    w_state: Tensor  # (G, 1)
    m: Tensor  # (G, 1)
    from_chunk: Tensor  # (G, NC), log weights
    from_state: Tensor  # (G, 1), log weight


def final_state_weights(across: Tensor, M: Tensor, m: Tensor) -> FinalStateWeights:
    """Return the weights; across: of `across_chunks`; M: (G, NC), of the summaries; m: (G, 1), before the segment."""
    from_chunk = log_decay(across[..., -1:], across).to(M.dtype) + M
    from_state = log_decay(across[..., -1:]).to(M.dtype) + m
    m_after = torch.maximum(from_chunk.amax(-1, keepdim=True), from_state)
    base = zero_if_empty(m_after)
    W, w_state = exp_or_zero(from_chunk - base), exp_or_zero(from_state - base)
    return FinalStateWeights(W, w_state, m_after, from_chunk, from_state)


class InterChunkGradient(NamedTuple):
    """Gradients at the inter-chunk level."""

    ddC: Tensor  # (G*NC, DHQK, DHHV), of the summaries' dC
    ddn: Tensor  # (G, NC, DHQK), of the summaries' dn
    dlog_W: Tensor  # (G, target, source), of the log weights
    dc: Tensor  # (G, DHQK, DHHV), of the state before the segment
    dn: Tensor  # (G, DHQK)


def inter_chunk_gradient(
    dC_before: Tensor, dn_before: Tensor, dc: Tensor, dn: Tensor, C_sources: Tensor, dn_chunks: Tensor, n: Tensor,
    inter: InterChunkWeights, final: FinalStateWeights,
) -> InterChunkGradient:
    """Differentiate the inter-chunk level.

    dC_before (G, NC, DHQK, DHHV), dn_before (G, NC, DHQK): gradients of the states before chunks; dc, dn: of the state
    after the segment; C_sources: the summaries' dC with c in the last chunk's place; dn_chunks: the summaries' dn;
    n: before the segment.
    """
    G, NC, DHQK = dn_before.shape
    wide, product = dn_before.dtype, dC_before.dtype
    chunk = torch.arange(NC, device=n.device)
    first, last = chunk == 0, chunk == NC - 1
    dc_in = (inter.w_state[..., None, None] * dC_before.to(wide)).sum(1) + final.w_state[..., None] * dc
    dn_in = (inter.w_state[..., None] * dn_before).sum(1) + final.w_state * dn
    C_targets = with_state(dC_before, 0, dc).flatten(2)
    n_targets = torch.where(first[:, None], dn[:, None], dn_before)
    n_sources = torch.where(last[:, None], n[:, None], dn_chunks)
    W = torch.where(first[:, None], final.W[:, None], inter.W)
    ddC = torch.bmm(W.mT.to(product), C_targets).view(G * NC, DHQK, -1)
    ddn = torch.bmm(W.mT, n_targets)
    inner = sum_over_terms(C_targets, C_sources.flatten(2).mT).to(wide) + torch.bmm(n_targets, n_sources.mT)
    w_state = torch.where(first, final.w_state, inter.w_state)
    return InterChunkGradient(ddC, ddn, inner * torch.where(last, w_state[..., None], W), dc_in, dn_in)


def with_state(summaries: Tensor, chunk: int, state: Tensor) -> Tensor:
    """Return `summaries` (G, NC, ...), contiguous, with `state` (G, ...) in the place of one chunk's.

    As a strided scatter, which Inductor does in place: for a slice it would read and write every summary.
    """
    (G, NC, *sizes), (row, slot, *strides) = summaries.shape, summaries.stride()
    offset = slot * (chunk if chunk >= 0 else NC + chunk)
    return torch.as_strided_scatter(summaries, state.to(summaries.dtype), (G, *sizes), (row, *strides), offset)


def maxima_gradient(
    dm_final: Tensor, dm_before: Tensor, M: Tensor, inter: InterChunkWeights, final: FinalStateWeights
) -> tuple[Tensor, Tensor, Tensor]:
    """Distribute the gradients of the maxima m_before and m after the segment (row 0) evenly among their arguments.

    dm_final: (G); dm_before: (G, NC). Returns the parts of other chunks' M (G, NC, NC) and of the incoming m (G, NC),
    and the total of each M (G, NC).
    """
    chunk = torch.arange(M.shape[-1], device=M.device)
    first, last = chunk == 0, chunk == M.shape[-1] - 1
    maximum = torch.where(first, final.m, inter.m_before)
    from_chunk = torch.where(last, NEG_INF, final.from_chunk)  # the last chunk has no column: it is counted separately
    at_chunk = torch.where(first[:, None], from_chunk[:, None], inter.from_chunk) == maximum[..., None]
    at_state = torch.where(first, final.from_state, inter.from_state) == maximum
    at_last = M[:, -1:] == final.m
    count = at_chunk.to(M.dtype).sum(-1) + at_state.to(M.dtype) + torch.where(first, at_last.to(M.dtype), 0.0)
    share = torch.where(maximum == NEG_INF, 0.0, torch.where(first, dm_final[:, None], dm_before) / count)
    to_chunk, to_state = torch.where(at_chunk, share[..., None], 0.0), torch.where(at_state, share, 0.0)
    return to_chunk, to_state, to_chunk.sum(-2) + torch.where(last & at_last, share[:, :1], 0.0)


def sum_over_chunks(dlog_W: Tensor) -> Tensor:
    """Return for each chunk (G, NC) the sum of dlog_W (G, target, source) over targets after and sources before it."""
    NC = dlog_W.shape[-1]
    chunk = torch.arange(NC, device=dlog_W.device)
    later = (chunk[:, None] < chunk) | (chunk == 0)
    if not dlog_W.is_cuda:
        earlier = (chunk < chunk[:, None]) | (chunk == NC - 1)
        return torch.where(later[:, :, None] & earlier[:, None, :], dlog_W[:, None], 0.0).sum((-1, -2))
    # On CUDA segments are long and these masks cubic in the chunks: a scan over sources, the incoming state first.
    from_earlier = torch.cat([dlog_W[..., -1:], dlog_W[..., :-1]], -1).cumsum(-1)
    return torch.where(later.mT, from_earlier, 0.0).sum(-2)
