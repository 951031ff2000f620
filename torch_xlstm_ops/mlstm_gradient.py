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

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_xlstm_ops.decay import NEG_INF, causal, prefix, prefixes, span, suffix
from torch_xlstm_ops.mlstm import (
    FLOOR,
    STATE,
    STREAMS,
    floor,
    input_weights,
    looks,
    product_dtype,
    reaches,
    summaries,
    with_state,
)
from torch_xlstm_ops.shapes import state_dtype


def gradient(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, scores: Tensor, c: Tensor, n: Tensor, m: Tensor,
    dh: Tensor, dc: Tensor, dn: Tensor, dm: Tensor, *, eps: float,
) -> tuple[Tensor, ...]:
    """Turn a segment into the factors of its gradient, recomputing it; `finish` multiplies them.

    dh: (G, NC, L, DHHV); dc, dn, dm: gradients of the state after the segment; the rest as in `mlstm.operands`.
    Returns P and dS (G*NC, L, L); dq and dk (G*NC, L, DHQK), so far from other chunks; k_gated (G*NC, L, DHQK) and
    ddC (G*NC, DHQK, DHHV); digate and dfgate (G, NC, L); and the gradients of c, n, m.
    """
    G, NC, L, DHQK = q.shape
    wide, product, scale = state_dtype(q.dtype), product_dtype(q.dtype), DHQK**-0.5
    fgate, igate, q_wide, k_wide = fgate.to(wide), igate.to(wide), q.to(wide), k.to(wide)
    within = prefixes(fgate)
    F_ = within[..., -1]
    across = prefix(F_)
    chunks = summaries(k, v, igate, within)
    reach = reaches(F_, across, chunks.M, m)
    look = looks(igate, within, reach.m_before)
    n_before = torch.bmm(reach.W, chunks.dn) + reach.w_state[..., None] * n[:, None]
    sources = with_state(chunks.dC, c)
    C_before = torch.bmm(reach.with_state().to(product), sources.flatten(2)).view(G * NC, DHQK, -1)

    # The first level: tokens see the tokens of their chunk and the state before it.
    dh_flat = dh.flatten(0, 1)
    seen = torch.bmm(dh_flat, v.flatten(0, 1).mT).view(G, NC, L, L).to(wide)  # dh_t . v_s
    y = torch.bmm(dh_flat.to(product), C_before.mT).view(q.shape).to(wide)  # C_before dh_t
    weight = torch.exp(look.decay - look.m[..., None]) * scale
    w = torch.exp(look.m_inter - look.m) * scale
    qn, qy = (q_wide * n_before[..., None, :]).sum(-1), (q_wide * y).sum(-1)
    A = scores * weight
    den, low = A.sum(-1) + w * qn, floor(look.m)
    r = 1 / (torch.maximum(den.abs(), low) + eps)
    g = r * ((A * seen).sum(-1) + w * qy)
    dden = torch.where(den.abs() > low, -g * r * den.sign(), 0.0)
    dm_look = torch.where(look.m < -FLOOR[wide], -g, -eps * g * r)
    share = dm_look / ((look.decay == look.m[..., None]).to(wide).sum(-1) + (look.m_inter == look.m).to(wide))
    dS = weight * (r[..., None] * seen + dden[..., None])
    E = dS * scores + torch.where(look.decay == look.m[..., None], share[..., None], 0.0)
    rho = torch.where(look.m_inter == look.m, share, 0.0)
    e = w * (r * qy + dden * qn) + rho  # all that a token has from before its chunk
    dq = w[..., None] * (r[..., None] * y + dden[..., None] * n_before[..., None, :])
    q_gated = (w * r)[..., None] * q_wide

    # The second level: chunks see the chunks before them and the incoming state. What is wanted of the state after the
    # segment takes the place of chunk 0, which sees no other chunk.
    dC_before = torch.bmm(q_gated.to(product).flatten(0, 1).mT, dh_flat.to(product)).view(G, NC, DHQK, -1)
    dn_before = ((w * dden)[..., None] * q_wide).sum(-2)
    chunk = torch.arange(NC, device=q.device)
    first, last = chunk == 0, chunk == NC - 1
    to_end, through = span(across[..., -1:], across) + chunks.M, span(across[..., -1:]) + m
    m_after = torch.maximum(to_end.amax(-1, keepdim=True), through)
    w_end, w_through = torch.exp(to_end - m_after), torch.exp(through - m_after)
    dc_in = (reach.w_state[..., None, None] * dC_before.to(wide)).sum(1) + w_through[..., None] * dc
    dn_in = (reach.w_state[..., None] * dn_before).sum(1) + w_through * dn
    targets = dC_before.slice_scatter(dc.to(product)[:, None], 1, 0, 1).flatten(2)
    n_targets = torch.where(first[:, None], dn[:, None], dn_before)
    n_sources = torch.where(last[:, None], n[:, None], chunks.dn)
    V = torch.where(first[:, None], w_end[:, None], reach.W)
    ddC = torch.bmm(V.mT.to(product), targets).view(G * NC, DHQK, -1)
    ddn = torch.bmm(V.mT, n_targets)

    # What passes from a chunk, or the incoming state (last column), to a later one, or the state after (first row).
    inner = torch.bmm(targets, sources.flatten(2).mT).to(wide) + torch.bmm(n_targets, n_sources.mT)
    passing = torch.where(last, reach.w_state[..., None], reach.W)
    passing = inner * torch.where(first[:, None], torch.where(last, w_through, w_end)[:, None], passing)

    gate, _ = input_weights(igate, within)
    dk = gate[..., None] * (torch.bmm(v.flatten(0, 1).to(product), ddC.mT).view(k.shape).to(wide) + ddn[..., None, :])
    alpha = (k_wide * dk).sum(-1)  # all that a token gives to after its chunk

    # Where the maxima were found.
    rho = rho.sum(-1)  # (G, NC)
    end = dm[:, 0] - passing[:, 0].sum(-1) - alpha[:, -1].sum(-1)
    from_chunk = torch.where(first[:, None], torch.where(last, NEG_INF, to_end)[:, None], reach.from_chunk)
    found = torch.where(first, m_after, reach.m_before)
    at_state = torch.where(first, through, reach.from_state) == found
    at_chunk = from_chunk == found[..., None]
    at_last = chunks.M[:, -1:] == m_after
    count = at_chunk.to(wide).sum(-1) + at_state.to(wide) + torch.where(first, at_last.to(wide), 0.0)
    share = torch.where(first, end[:, None], rho) / count
    to_chunk, to_state = torch.where(at_chunk, share[..., None], 0.0), torch.where(at_state, share, 0.0)
    passing = passing + torch.where(last, to_state[..., None], to_chunk)
    rho_chunk = to_chunk.sum(-2) + torch.where(last & at_last, share[:, :1], 0.0)
    log_input = span(within[..., -1:], within) + igate
    at_token = log_input == chunks.M[..., None]
    alpha = alpha + torch.where(at_token, (rho_chunk / at_token.to(wide).sum(-1))[..., None], 0.0)
    dm_in = (dc_in * c).sum((1, 2)) + (dn_in * n).sum(-1) + to_state.sum(-1) + rho[:, 0]

    over = (chunk[:, None] < chunk) | first  # [j, target]
    under = (chunk < chunk[:, None]) | last  # [j, source]
    over_chunk = torch.where(over[:, :, None] & under[:, None, :], passing[:, None], 0.0).sum((-1, -2))
    # What passes over a forget gate: inside the chunk, from before it, to after it, and over all of it. A token's own
    # weight passes over none, and left in it would drown the others where gates are nearly closed.
    others = torch.where(causal(L, igate).mT, 0.0, E)
    dlog_f = suffix(others.sum(-1) - others.sum(-2) + e) + F.pad(prefix(alpha)[..., :-1], (1, 0))
    dlog_f = dlog_f + over_chunk[..., None]
    dfgate = dlog_f * torch.sigmoid(-fgate)
    P, k_gated = A * r[..., None], gate[..., None] * k_wide
    factors = [t.to(dtype).flatten(0, 1) for t, dtype in
               ((P, q.dtype), (dS, q.dtype), (dq, q.dtype), (dk, q.dtype), (k_gated, product))]
    return *factors, ddC, E.sum(-2) + alpha, dfgate, dc_in, dn_in, dm_in[:, None]


def finish(
    P: Tensor, dS: Tensor, dq: Tensor, dk: Tensor, k_gated: Tensor, ddC: Tensor, q: Tensor, k: Tensor, v: Tensor,
    dh: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v (G, NC, L, D) from the factors of `gradient`, adding in place to dq and dk."""
    dq.baddbmm_(dS, k.flatten(0, 1))
    dk.baddbmm_(dS.mT, q.flatten(0, 1))
    dv = torch.bmm(k_gated, ddC).to(v.dtype).baddbmm_(P.mT, dh.flatten(0, 1))
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)


# The function that is compiled, with the axes of its arguments.
AXES = {gradient: (*STREAMS, "G NC L L", *STATE, "G NC L DHHV", *STATE)}
