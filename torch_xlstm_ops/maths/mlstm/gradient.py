"""The gradient of an mLSTM segment, derived by hand: matrix products at the same two levels as the segment itself.

Write token t's output as ``h_t = r_t sum_s A_ts v_s``, with weights ``A_ts = exp(B_t - B_s + igate_s - m_t) q_t.k_s``
over all earlier tokens s (the incoming state among them), B the prefix sums of log_f, and r_t the denominator's
inverse. With ``g = r_t dh_t.h_t`` and ``dden_t`` the gradient of ``sum_s A_ts`` the gradient of a weight's logarithm
is ``E_ts = A_ts (r_t dh_t.v_s + dden_t)``, and all of it reaches the gates: ``digate_s = sum_t E_ts``, and ``log_f_u``
gets what passes over it, ``sum of E_ts over s < u <= t``. Summed in that form, level by level, it is exact behind
closed gates; a difference of two totals would leave their rounding there. A maximum cancels from h except
through eps (and a state reports it): that rest goes to the token where the maximum was found.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops.maths.decay import (
    NEG_INF,
    across_chunks,
    causal,
    exp_or_zero,
    log_decay,
    log_decay_prefixes,
    prefix_and_suffix,
    zero_if_empty,
)
from torch_xlstm_ops.maths.mlstm.chunks import (
    InterChunkWeights,
    inter_chunk_weights,
    n_before_chunks,
    product_dtype,
    sum_tokens,
    summaries,
)
from torch_xlstm_ops.maths.mlstm.recurrence import FLOOR, floor
from torch_xlstm_ops.maths.mlstm.segment import IntraChunkLogWeights, intra_chunk_log_weights
from torch_xlstm_ops.maths.shapes import state_dtype


def gradient(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, scores: Tensor, c: Tensor, n: Tensor, m: Tensor,
    dh: Tensor, dc: Tensor, dn: Tensor, dm: Tensor, *, eps: float,
) -> tuple[Tensor, ...]:
    """Turn a segment into the factors of its gradient, recomputing it; `finish_gradient` multiplies them.

    dh: (G, NC, L, DHHV); dc, dn, dm: gradients of the state after the segment; the rest as of `segment_factors`.
    Returns P and dS (G*NC, L, L); dq and dk (G*NC, L, DHQK), so far from other chunks; k_gated (G, NC, L, DHQK) and
    ddC (G*NC, DHQK, DHHV); digate and dfgate (G, NC, L); and the gradients of c, n, m.
    """
    G, NC, L, DHQK = q.shape
    wide, product = state_dtype(q.dtype), product_dtype(q.dtype)
    fgate, igate, k_wide, dh_flat = fgate.to(wide), igate.to(wide), k.to(wide), dh.flatten(0, 1)
    within = log_decay_prefixes(fgate)
    across = across_chunks(within)
    chunks, gate, k_gated = summaries(k, v, igate, within)
    reach = inter_chunk_weights(within[..., -1], across, chunks.M, m)
    look = intra_chunk_log_weights(igate, within, reach.m_before)
    n_before = n_before_chunks(reach, chunks.dn, n)
    sources = _put(chunks.dC, -1, c)
    C_before = torch.bmm(reach.with_state().to(product), sources.flatten(2)).view(G * NC, DHQK, -1)

    seen = torch.bmm(dh_flat, v.flatten(0, 1).mT).view(G, NC, L, L).to(wide)
    y = torch.bmm(dh_flat.to(product), C_before.mT).view(q.shape).to(wide)
    tokens = _tokens(q.to(wide), scores, look, n_before, seen, y, eps)

    # What is wanted of the state after the segment takes the place of chunk 0, which sees no other chunk.
    end = _end(across, chunks.M, m)
    chunk = torch.arange(NC, device=q.device)
    first, last = chunk == 0, chunk == NC - 1
    dC_before = torch.bmm(tokens.q_gated.to(product).flatten(0, 1).mT, dh_flat.to(product)).view(G, NC, DHQK, -1)
    dc_in = (reach.w_state[..., None, None] * dC_before.to(wide)).sum(1) + end.w_state[..., None] * dc
    dn_in = (reach.w_state[..., None] * tokens.dn_before).sum(1) + end.w_state * dn
    targets = _put(dC_before, 0, dc).flatten(2)
    n_targets = torch.where(first[:, None], dn[:, None], tokens.dn_before)
    n_sources = torch.where(last[:, None], n[:, None], chunks.dn)
    W = torch.where(first[:, None], end.W[:, None], reach.W)  # (G, target, source)
    ddC = torch.bmm(W.mT.to(product), targets).view(G * NC, DHQK, -1)
    ddn = torch.bmm(W.mT, n_targets)
    inner = torch.bmm(targets, sources.flatten(2).mT).to(wide) + torch.bmm(n_targets, n_sources.mT)
    w_state = torch.where(first, end.w_state, reach.w_state)
    passing = inner * torch.where(last, w_state[..., None], W)

    dk = gate[..., None] * (torch.bmm(v.flatten(0, 1).to(product), ddC.mT).view(k.shape).to(wide) + ddn[..., None, :])
    alpha = (k_wide * dk).sum(-1)  # all that a token gives to after its chunk
    dm_end = dm[:, 0] - passing[:, 0].sum(-1) - alpha[:, -1].sum(-1)
    to_chunk, to_state, to_summary = _maxima(dm_end, tokens.rho.sum(-1), chunks.M, reach, end)
    passing = passing + torch.where(last, to_state[..., None], to_chunk)
    alpha = alpha + _shared(to_summary, log_decay(within[..., -1:], within) + igate, chunks.M)
    dm_in = (dc_in * c).sum((1, 2)) + (dn_in * n).sum(-1) + to_state.sum(-1) + tokens.rho[:, 0].sum(-1)

    digate = sum_tokens(tokens.E) + alpha
    dfgate = _over_gates(tokens.E, tokens.e, alpha, passing) * torch.sigmoid(-fgate)
    factors = [t.to(dtype).flatten(0, 1) for t, dtype in (
        (tokens.P, q.dtype), (tokens.dS, q.dtype), (tokens.dq, q.dtype), (dk, k.dtype),
    )]
    # In the CPU's cache it costs more to keep than to compute again. Elsewhere its layout is the device's, and Inductor
    # would copy it to join its axes.
    k_gated = (gate[..., None] * k_wide).to(product) if k.device.type == "cpu" else k_gated.mT
    return *factors, k_gated, ddC, digate, dfgate, dc_in, dn_in, dm_in[:, None]


def _put(summaries: Tensor, chunk: int, state: Tensor) -> Tensor:
    """Return `summaries` (G, NC, ...), contiguous, with `state` (G, ...) in the place of one chunk's.

    As a strided scatter, which Inductor does in place: for a slice it would read and write every summary.
    """
    (G, NC, *sizes), (row, slot, *strides) = summaries.shape, summaries.stride()
    offset = slot * (chunk if chunk >= 0 else NC + chunk)
    return torch.as_strided_scatter(summaries, state.to(summaries.dtype), (G, *sizes), (row, *strides), offset)


class _Tokens(NamedTuple):
    """The gradient of the first level, where tokens see the tokens of their chunk and the state before it."""

    P: Tensor  # (G, NC, L, L), the weights of v in h
    dS: Tensor  # (G, NC, L, L), the scores' gradient
    dq: Tensor  # (G, NC, L, DHQK), but for what the scores give
    q_gated: Tensor  # (G, NC, L, DHQK), the weights of the state in h
    dn_before: Tensor  # (G, NC, DHQK)
    E: Tensor  # (G, NC, L, L), of the weights' logarithms
    e: Tensor  # (G, NC, L), of those of the state before the chunk, rho among it
    rho: Tensor  # (G, NC, L), what of a token's maximum was found there


def _tokens(
    q: Tensor, scores: Tensor, look: IntraChunkLogWeights, n_before: Tensor, seen: Tensor, y: Tensor, eps: float
) -> _Tokens:
    """Differentiate the first level; seen: dh_t . v_s (G, NC, L, L); y: C_before dh_t (G, NC, L, DHQK)."""
    scale = q.shape[-1] ** -0.5
    weights, w = look.weights() * scale, look.w_state() * scale
    qn, qy = (q * n_before[..., None, :]).sum(-1), (q * y).sum(-1)
    A = scores * weights
    den, low = A.sum(-1) + w * qn, floor(look.m)
    r = 1 / (torch.maximum(den.abs(), low) + eps)
    g = r * ((A * seen).sum(-1) + w * qy)
    dden = torch.where(den.abs() > low, -g * r * den.sign(), 0.0)
    dm = torch.where(look.m < -FLOOR[q.dtype], -g, -eps * g * r)
    at_token, at_state = look.decay == look.m[..., None], look.m_inter == look.m
    share = dm / (at_token.to(q.dtype).sum(-1) + at_state.to(q.dtype))
    dS = weights * (r[..., None] * seen + dden[..., None])
    E = dS * scores + torch.where(at_token, share[..., None], 0.0)
    rho = torch.where(at_state, share, 0.0)
    e = w * (r * qy + dden * qn) + rho
    dq = w[..., None] * (r[..., None] * y + dden[..., None] * n_before[..., None, :])
    dn_before = sum_tokens((w * dden)[..., None] * q)
    return _Tokens(A * r[..., None], dS, dq, (w * r)[..., None] * q, dn_before, E, e, rho)


class _End(NamedTuple):
    """How the state after the segment sees its chunks and the incoming state; names as in `InterChunkWeights`."""

    W: Tensor  # (G, NC)
    w_state: Tensor  # (G, 1)
    m: Tensor  # (G, 1)
    from_chunk: Tensor  # (G, NC)
    from_state: Tensor  # (G, 1)


def _end(across: Tensor, M: Tensor, m: Tensor) -> _End:
    from_chunk = log_decay(across[..., -1:], across).to(M.dtype) + M
    from_state = log_decay(across[..., -1:]).to(M.dtype) + m
    m_after = torch.maximum(from_chunk.amax(-1, keepdim=True), from_state)
    base = zero_if_empty(m_after)
    return _End(exp_or_zero(from_chunk - base), exp_or_zero(from_state - base), m_after, from_chunk, from_state)


def _maxima(
    dm_end: Tensor, dm_before: Tensor, M: Tensor, reach: InterChunkWeights, end: _End
) -> tuple[Tensor, Tensor, Tensor]:
    """Share the gradients of the second level's maxima among where they were found, the end in the place of chunk 0.

    Returns what goes to other chunks' M (G, NC, NC), to the incoming m (G, NC), and what each M gets in all (G, NC).
    """
    chunk = torch.arange(M.shape[-1], device=M.device)
    first, last = chunk == 0, chunk == M.shape[-1] - 1
    found = torch.where(first, end.m, reach.m_before)
    from_chunk = torch.where(last, NEG_INF, end.from_chunk)  # the last chunk's is counted apart: no slot is left for it
    at_chunk = torch.where(first[:, None], from_chunk[:, None], reach.from_chunk) == found[..., None]
    at_state = torch.where(first, end.from_state, reach.from_state) == found
    at_last = M[:, -1:] == end.m
    count = at_chunk.to(M.dtype).sum(-1) + at_state.to(M.dtype) + torch.where(first, at_last.to(M.dtype), 0.0)
    share = torch.where(found == NEG_INF, 0.0, torch.where(first, dm_end[:, None], dm_before) / count)
    to_chunk, to_state = torch.where(at_chunk, share[..., None], 0.0), torch.where(at_state, share, 0.0)
    return to_chunk, to_state, to_chunk.sum(-2) + torch.where(last & at_last, share[:, :1], 0.0)


def _shared(gradient: Tensor, candidates: Tensor, maximum: Tensor) -> Tensor:
    """Share the gradient (...) of a maximum over the last axis evenly among where it was found (..., L)."""
    found = candidates == maximum[..., None]
    return torch.where(found, (gradient / found.to(maximum.dtype).sum(-1))[..., None], 0.0)


def _over_gates(E: Tensor, e: Tensor, alpha: Tensor, passing: Tensor) -> Tensor:
    """Sum what passes over each forget gate: within its chunk, from before it, to after it, and over all of it."""
    # A token's own weight passes over no gate, and left in it would drown the others where gates are nearly closed.
    others = torch.where(causal(E.shape[-1], E).mT, 0.0, E)
    return prefix_and_suffix(alpha, others.sum(-1) - sum_tokens(others) + e) + _over_chunks(passing)[..., None]


def _over_chunks(passing: Tensor) -> Tensor:
    """Sum what passes over each chunk (G, NC); passing: (G, target, source), of slots filled as in `gradient`."""
    NC = passing.shape[-1]
    chunk = torch.arange(NC, device=passing.device)
    later = (chunk[:, None] < chunk) | (chunk == 0)
    if not passing.is_cuda:
        earlier = (chunk < chunk[:, None]) | (chunk == NC - 1)
        return torch.where(later[:, :, None] & earlier[:, None, :], passing[:, None], 0.0).sum((-1, -2))
    # Segments are long there, and the masks cubic in their chunks: a scan, from the incoming state on.
    from_earlier = torch.cat([passing[..., -1:], passing[..., :-1]], -1).cumsum(-1)
    return torch.where(later.mT, from_earlier, 0.0).sum(-2)


def finish_gradient(
    P: Tensor, dS: Tensor, dq: Tensor, dk: Tensor, k_gated: Tensor, ddC: Tensor, q: Tensor, k: Tensor, v: Tensor,
    dh: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v (G, NC, L, D) from the factors of `gradient`, adding in place to dq and dk."""
    dq.baddbmm_(dS, k.flatten(0, 1))
    dk.baddbmm_(dS.mT, q.flatten(0, 1))
    dv = torch.bmm(k_gated.flatten(0, 1), ddC).to(v.dtype).baddbmm_(P.mT, dh.flatten(0, 1))
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)
