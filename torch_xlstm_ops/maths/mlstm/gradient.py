"""The gradient of an mLSTM segment, derived by hand: matrix products at the same two levels as the segment itself.

Token t's output is ``h_t = r_t sum_s A_ts v_s``, with weights ``A_ts = exp(B_t - B_s + igate_s - m_t) q_t.k_s`` over
all earlier tokens s (the incoming state among them), B the prefix sums of log_f, and r_t the inverse of the
denominator. With ``g = r_t dh_t.h_t`` and ``dden_t`` the gradient of ``sum_s A_ts``, the gradient of a weight's
logarithm is ``E_ts = A_ts (r_t dh_t.v_s + dden_t)``. Gates receive all of it: ``digate_s = sum_t E_ts``, and
``dlog_f_u`` is the sum of E_ts over s < u <= t. Summed level by level in that form it is exact after closed gates,
where a difference of two totals would leave their rounding error. A maximum cancels from h except through eps (and is
part of the state): that remainder goes to the arguments of the maximum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_xlstm_ops.maths.decay import across_chunks, causal, log_decay, log_decay_prefixes, prefix_and_suffix
from torch_xlstm_ops.maths.mlstm.chunks import (
    inter_chunk_weights,
    n_before_chunks,
    product_dtype,
    sum_tokens,
    summaries,
)
from torch_xlstm_ops.maths.mlstm.inter_chunk_gradient import (
    final_state_weights,
    inter_chunk_gradient,
    maxima_gradient,
    sum_over_chunks,
    with_state,
)
from torch_xlstm_ops.maths.mlstm.intra_chunk import intra_chunk_gradient, intra_chunk_log_weights
from torch_xlstm_ops.maths.shapes import state_dtype


def gradient(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, scores: Tensor, c: Tensor, n: Tensor, m: Tensor,
    dh: Tensor, dc: Tensor, dn: Tensor, dm: Tensor, *, eps: float,
) -> tuple[Tensor, ...]:
    """Recompute a segment and return the factors of its gradient; `finish_gradient` multiplies them.

    dh: (G, NC, L, DHHV); dc, dn, dm: gradients of the state after the segment; the rest as of `segment_factors`.
    Returns P and dS (G*NC, L, L); dq and dk (G*NC, L, DHQK), their inter-chunk parts; k_gated (G, NC, L, DHQK) and
    ddC (G*NC, DHQK, DHHV); digate and dfgate (G, NC, L); and the gradients of c, n, m.
    """
    G, NC, L, DHQK = q.shape
    wide, product = state_dtype(q.dtype), product_dtype(q.dtype)
    fgate, igate, k_wide, dh_flat = fgate.to(wide), igate.to(wide), k.to(wide), dh.flatten(0, 1)
    within = log_decay_prefixes(fgate)
    across = across_chunks(within)
    chunks, gate, k_gated = summaries(k, v, igate, within)
    inter = inter_chunk_weights(within[..., -1], across, chunks.M, m)
    n_before = n_before_chunks(inter, chunks.dn, n)
    C_sources = with_state(chunks.dC, -1, c)
    C_before = torch.bmm(inter.with_state().to(product), C_sources.flatten(2)).view(G * NC, DHQK, -1)

    dh_v = torch.bmm(dh_flat, v.flatten(0, 1).mT).view(G, NC, L, L).to(wide)
    C_dh = torch.bmm(dh_flat.to(product), C_before.mT).view(q.shape).to(wide)
    intra = intra_chunk_log_weights(igate, within, inter.m_before)
    tokens = intra_chunk_gradient(q.to(wide), scores, intra, n_before, dh_v, C_dh, eps)

    final = final_state_weights(across, chunks.M, m)
    dC_before = torch.bmm(tokens.q_gated.to(product).flatten(0, 1).mT, dh_flat.to(product)).view(G, NC, DHQK, -1)
    states = inter_chunk_gradient(dC_before, tokens.dn_before, dc, dn, C_sources, chunks.dn, n, inter, final)

    v_ddC = torch.bmm(v.flatten(0, 1).to(product), states.ddC.mT).view(k.shape).to(wide)
    dk = gate[..., None] * (v_ddC + states.ddn[..., None, :])
    dlog_gate = (k_wide * dk).sum(-1)  # of the log weights of tokens in their chunk's summary
    dm_final = dm[:, 0] - states.dlog_W[:, 0].sum(-1) - dlog_gate[:, -1].sum(-1)
    to_chunk, to_state, dM = maxima_gradient(dm_final, tokens.dm_inter.sum(-1), chunks.M, inter, final)
    chunk = torch.arange(NC, device=q.device)
    dlog_W = states.dlog_W + torch.where(chunk == NC - 1, to_state[..., None], to_chunk)
    dlog_gate = dlog_gate + _distribute(dM, log_decay(within[..., -1:], within) + igate, chunks.M)
    dm_in = (states.dc * c).sum((1, 2)) + (states.dn * n).sum(-1) + to_state.sum(-1) + tokens.dm_inter[:, 0].sum(-1)

    digate = sum_tokens(tokens.E) + dlog_gate
    dfgate = _sum_over_gates(tokens.E, tokens.e, dlog_gate, dlog_W) * torch.sigmoid(-fgate)
    factors = [t.to(q.dtype).flatten(0, 1) for t in (tokens.P, tokens.dS, tokens.dq, dk)]
    # On the CPU recomputing k_gated is cheaper than storing it. Elsewhere k_gated has the device's layout, from which
    # Inductor would copy to join axes.
    k_gated = (gate[..., None] * k_wide).to(product) if k.device.type == "cpu" else k_gated.mT
    return *factors, k_gated, states.ddC, digate, dfgate, states.dc, states.dn, dm_in[:, None]


def gradient_(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, scores: Tensor, c: Tensor, n: Tensor, m: Tensor,
    dh: Tensor, dc: Tensor, dn: Tensor, dm: Tensor, dq: Tensor, dk: Tensor, *, eps: float,
) -> tuple[Tensor, ...]:
    """Write the inter-chunk parts of dq and dk (G, NC, L, DHQK); return the rest of `gradient`'s results."""
    P, dS, dq_inter, dk_inter, *rest = gradient(
        q, k, v, igate, fgate, scores, c, n, m, dh, dc, dn, dm, eps=eps
    )
    dq.copy_(dq_inter.view(dq.shape))
    dk.copy_(dk_inter.view(dk.shape))
    return P, dS, *rest


def _distribute(gradient: Tensor, candidates: Tensor, maximum: Tensor) -> Tensor:
    """Distribute the gradient (...) of a maximum over the last axis (..., L) evenly among its arguments."""
    found = candidates == maximum[..., None]
    return torch.where(found, (gradient / found.to(maximum.dtype).sum(-1))[..., None], 0.0)


def _sum_over_gates(E: Tensor, e: Tensor, dlog_gate: Tensor, dlog_W: Tensor) -> Tensor:
    """Return dlog_f (G, NC, L): the sum of all gradients of log weights that a forget gate is part of.

    These are weights within its chunk (E), from before it (e), to after it (dlog_gate), and over all of it (dlog_W).
    """
    # A token's weight in its own output includes no forget gate; where gates are nearly closed its rounding error would
    # exceed the other weights.
    others = torch.where(causal(E.shape[-1], E).mT, 0.0, E)
    inside = prefix_and_suffix(dlog_gate, others.sum(-1) - sum_tokens(others) + e)
    return inside + sum_over_chunks(dlog_W)[..., None]


def finish_gradient_(
    P: Tensor, dS: Tensor, k_gated: Tensor, ddC: Tensor, q: Tensor, k: Tensor, v: Tensor, dh: Tensor, dq: Tensor,
    dk: Tensor, dv: Tensor,
) -> None:
    """Write the gradients of q, k, v (G, NC, L, D) from the factors of `gradient_`, which has begun dq and dk."""
    dq.flatten(0, 1).baddbmm_(dS, k.flatten(0, 1))
    dk.flatten(0, 1).baddbmm_(dS.mT, q.flatten(0, 1))
    from_states, k_gated = dv.flatten(0, 1), k_gated.flatten(0, 1)
    if k_gated.dtype == dv.dtype:
        torch.bmm(k_gated, ddC, out=from_states)
    else:
        from_states.copy_(torch.bmm(k_gated, ddC))
    from_states.baddbmm_(P.mT, dh.flatten(0, 1))
