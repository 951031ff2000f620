"""mLSTM mathematics: the step, the two-level segment and its gradient, and the recurrent oracle.

A task holds G rows (any heads of any batch entries) and NC chunks of L tokens. Gates are pre-activations; a state
(c, n, m) stands for ``c * exp(m)``, ``n * exp(m)``. Source: Beck et al. 2024, "xLSTM" (mLSTM, stabilised form);
Beck et al. 2025, "Tiled Flash Linear Attention" (chunkwise form). The second level, chunks into a segment, is the
same masked product again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_xlstm_ops.shapes import state_dtype

NEG_INF = float("-inf")
GRID = 256.0  # multiples of 1/GRID add up exactly in float32 to +-65,536


def step(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, c: Tensor, n: Tensor, m: Tensor, *, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Advance the recurrence by one token.

        m' = max(log_f + m, igate)
        c' = exp(log_f + m - m') c + exp(igate - m') k v^T          n' likewise with k
        h  = (q DHQK^-1/2 . c') / (max(|q DHQK^-1/2 . n'|, exp(-m')) + eps)

    q, k: (..., DHQK); v: (..., DHHV); igate, fgate: (..., 1); c: (..., DHQK, DHHV); n: (..., DHQK); m: (..., 1).
    Returns h in v's dtype and the new c, n, m.
    """
    wide = state_dtype(q.dtype)
    log_f, igate = F.logsigmoid(fgate.to(wide)), igate.to(wide)
    m_new = torch.maximum(log_f + m, igate)
    forget, add = torch.exp(log_f + m - m_new), torch.exp(igate - m_new)
    q_scaled = q.to(wide) * q.shape[-1] ** -0.5
    k_gated = add * k.to(wide)
    c_new = forget[..., None] * c + k_gated[..., :, None] * v.to(wide)[..., None, :]
    n_new = forget * n + k_gated
    denominator = torch.maximum((q_scaled * n_new).sum(-1, keepdim=True).abs(), _floor(m_new)) + eps
    h = (c_new * q_scaled[..., :, None]).sum(-2) / denominator
    return h.to(v.dtype), c_new, n_new, m_new


def step_(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, c: Tensor, n: Tensor, m: Tensor, *, eps: float
) -> tuple[Tensor]:
    """Do a `step` and write the new state over c, n, m; return h."""
    h, *new = step(q, k, v, igate, fgate, c, n, m, eps=eps)
    for state, value in zip((c, n, m), new, strict=True):
        state.copy_(value)
    return (h,)


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, c: Tensor, n: Tensor, m: Tensor, *, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run `step` over the S tokens of a sequence (..., S, D): the definition that everything else must equal."""
    h = []
    for t in range(q.shape[-2]):
        gates = igate[..., t, None], fgate[..., t, None]
        h_t, c, n, m = step(q[..., t, :], k[..., t, :], v[..., t, :], *gates, c, n, m, eps=eps)
        h.append(h_t)
    return torch.stack(h, -2) if h else torch.empty_like(v), c, n, m


def scores(q: Tensor, k: Tensor) -> Tensor:
    """Return q k^T of each chunk, (G, NC, L, L), in float32; q, k: (G, NC, L, DHQK).

    Where a denominator is the small sum of large scores, their rounding to bfloat16 would put 1.6e-2 into h; without
    it h is as good as the recurrence's. A product outside the compiled graph: CUDA alone has one with a wider result,
    and its meta function fails on symbolic sizes.
    """
    wide = state_dtype(q.dtype)
    q_chunks, k_chunks = q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)
    if q.is_cuda and q.dtype != wide:
        product = torch.bmm(q_chunks, k_chunks, out_dtype=wide)
    else:
        product = torch.bmm(q_chunks.to(wide), k_chunks.to(wide))
    return product.view(*q.shape[:3], q.shape[2])


def operands(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, scores: Tensor, c: Tensor, n: Tensor, m: Tensor,
    *, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Turn a segment into the factors of its output, ``h = q_gated C_before + P v``, and the state after it.

    q, k: (G, NC, L, DHQK); v: (G, NC, L, DHHV); igate, fgate: (G, NC, L); scores: (G, NC, L, L), of `scores`;
    c: (G, DHQK, DHHV); n: (G, DHQK); m: (G, 1).
    Returns P (G*NC, L, L), q_gated (G*NC, L, DHQK), C_before (G*NC, DHQK, DHHV), c, n, m. The factors already hold
    1/denominator, so no pass over h follows. A token with igate -inf and fgate +inf changes nothing (padding).
    """
    _, _, L, DHQK = q.shape
    wide, scale = state_dtype(q.dtype), DHQK**-0.5
    within = _prefix(_parts(fgate.to(wide)))
    igate = igate.to(wide)
    M, dC, dn = _chunk_summaries(k, v, igate, within)
    # In this order: `_states_before` writes over a slot of dC, and copies it all if it is read again.
    c_after, n_after, m_after = absorb(*_fold(within[..., -1], M, dC, dn), c, n, m)
    C_before, n_before, m_before = _states_before(within[..., -1], M, dC, dn, c, n, m)

    # Token t sees the tokens s <= t of its chunk and the state before the chunk, all relative to its maximum m_t.
    decay = _span(within[..., :, None], within[..., None, :]) + igate[..., None, :]
    decay = torch.where(_causal(L, q), decay, NEG_INF)  # (G, NC, L, L)
    m_inter = _span(within) + m_before[..., None]
    m_t = torch.maximum(decay.amax(-1), m_inter)
    P = scores * scale * torch.exp(decay - m_t[..., None])
    w = torch.exp(m_inter - m_t) * scale
    qn = (q.to(wide) * n_before[..., None, :]).sum(-1)
    r = 1 / (torch.maximum((P.sum(-1) + w * qn).abs(), _floor(m_t)) + eps)
    P = (P * r[..., None]).to(q.dtype).flatten(0, 1)
    q_gated = (q.to(wide) * (w * r)[..., None]).to(C_before.dtype).flatten(0, 1)
    return P, q_gated, C_before, c_after, n_after, m_after


def emit(P: Tensor, q_gated: Tensor, C_before: Tensor, v: Tensor, h: Tensor) -> None:
    """Write ``q_gated C_before + P v`` into h (G*NC, L, DHHV); v (G, NC, L, DHHV), the rest from `operands`.

    Two products outside the compiled graph: the second adds in place, where Inductor's would copy first.
    """
    if C_before.dtype == h.dtype:
        torch.bmm(q_gated, C_before, out=h)
    else:
        h.copy_(torch.bmm(q_gated, C_before))
    h.baddbmm_(P, v.flatten(0, 1))


def segment(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, c: Tensor, n: Tensor, m: Tensor, *, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return h (G, NC, L, DHHV) and the state after a segment; shapes as in `operands`."""
    return _segment(q, k, v, igate, fgate, scores(q, k), c, n, m, eps=eps)


def _segment(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, scores: Tensor, c: Tensor, n: Tensor, m: Tensor,
    *, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    P, q_gated, C_before, c, n, m = operands(q, k, v, igate, fgate, scores, c, n, m, eps=eps)
    h = torch.bmm(q_gated, C_before).to(v.dtype) + torch.bmm(P, v.flatten(0, 1))
    return h.view(v.shape), c, n, m


def segment_backward(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, scores: Tensor, c: Tensor, n: Tensor, m: Tensor,
    dh: Tensor, dc: Tensor, dn: Tensor, dm: Tensor, *, eps: float,
) -> tuple[Tensor, ...]:
    """Return the gradients of q, k, v, igate, fgate, c, n, m from those of the results of `segment`, recomputing it."""
    inputs = [t.detach().requires_grad_() for t in (q, k, v, igate, fgate, scores, c, n, m)]
    with torch.enable_grad():
        results = _segment(*inputs, eps=eps)
    dq, dk, dv, digate, dfgate, dscores, *dstate = torch.autograd.grad(results, inputs, (dh, dc, dn, dm))
    dscores = dscores.to(q.dtype).flatten(0, 1)
    dq = dq + torch.bmm(dscores, k.flatten(0, 1)).view(q.shape)
    dk = dk + torch.bmm(dscores.transpose(1, 2), q.flatten(0, 1)).view(k.shape)
    return dq, dk, dv, digate, dfgate, *dstate


def after(
    k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, c: Tensor, n: Tensor, m: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return only the state after a segment."""
    return absorb(*summarize(k, v, igate, fgate), c, n, m)


def summarize(k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reduce a segment to its monoid element F (G, 1), M (G, 1), dC (G, DHQK, DHHV), dn (G, DHQK)."""
    wide = state_dtype(k.dtype)
    within = _prefix(_parts(fgate.to(wide)))
    return _fold(within[..., -1], *_chunk_summaries(k, v, igate.to(wide), within))


def absorb(
    F_: Tensor, M: Tensor, dC: Tensor, dn: Tensor, c: Tensor, n: Tensor, m: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the state after a segment from its monoid element and the state before it.

        m' = max(F + m, M)      c' = exp(F + m - m') c + exp(M - m') dC          n' likewise
    """
    m_new = torch.maximum(F_ + m, M)
    keep, add = torch.exp(F_ + m - m_new), torch.exp(M - m_new)
    return keep[..., None] * c + add[..., None] * dC, keep * n + add * dn, m_new


def combine(
    first: tuple[Tensor, Tensor, Tensor, Tensor], second: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compose the monoid elements of two segments, `first` before `second` in time; exactly associative."""
    (F_first, M, dC, dn), (F_second, M_second, dC_second, dn_second) = first, second
    M_new = torch.maximum(F_second + M, M_second)
    base = _finite(M_new)
    keep, add = torch.exp(F_second + M - base), torch.exp(M_second - base)
    dC_new = keep[..., None] * dC + add[..., None] * dC_second
    return F_first + F_second, M_new, dC_new, keep * dn + add * dn_second


def _chunk_summaries(k: Tensor, v: Tensor, igate: Tensor, within: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return M (G, NC), dC (G, NC, DHQK, DHHV) and dn (G, NC, DHQK) of each chunk."""
    G, NC, _, DHQK = k.shape
    a = _span(within[..., -1:], within) + igate  # (G, NC, L)
    M = a.amax(-1)
    k_gated = k.to(a.dtype) * torch.exp(a - _finite(M)[..., None])[..., None]
    product = _state_product_dtype(k.dtype)
    dC = torch.bmm(k_gated.to(product).flatten(0, 1).transpose(1, 2), v.to(product).flatten(0, 1))
    return M, dC.view(G, NC, DHQK, v.shape[-1]), k_gated.sum(-2)


def _states_before(
    across: Tensor, M: Tensor, dC: Tensor, dn: Tensor, c: Tensor, n: Tensor, m: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return C (G*NC, DHQK, DHHV), n (G, NC, DHQK) and m (G, NC) as they stand before each chunk."""
    G, NC, DHQK, DHHV = dC.shape
    upto = _prefix(across)  # (3, G, NC)
    before = upto - across
    from_state = _span(before) + m
    chunk = torch.arange(NC, device=M.device)
    earlier = chunk[None, :] < chunk[:, None]
    from_chunk = _span(before[..., :, None], upto[..., None, :]) + M[..., None, :]
    from_chunk = torch.where(earlier, from_chunk, NEG_INF)  # (G, NC, NC)
    m_before = torch.maximum(from_chunk.amax(-1), from_state)
    w_state = torch.exp(from_state - m_before)
    W = torch.exp(from_chunk - m_before[..., None])
    n_before = torch.bmm(W, dn) + w_state[..., None] * n[:, None]
    # The last chunk's summary feeds no chunk of this segment: its slot in the product carries the incoming state.
    W = torch.where(chunk == NC - 1, w_state[..., None], W).to(dC.dtype)
    sources = dC.slice_scatter(c.to(dC.dtype)[:, None], 1, NC - 1, NC)
    C_before = torch.bmm(W, sources.flatten(2))
    return C_before.view(G * NC, DHQK, DHHV), n_before, m_before


def _fold(across: Tensor, M: Tensor, dC: Tensor, dn: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compose the monoid elements of the chunks of a segment into one."""
    upto = _prefix(across)
    from_chunk = _span(upto[..., -1:], upto) + M
    M_all = from_chunk.amax(-1, keepdim=True)
    weight = torch.exp(from_chunk - _finite(M_all))
    dC_all = (weight[..., None, None] * dC.to(M.dtype)).sum(1)
    return _span(upto[..., -1:]), M_all, dC_all, (weight[..., None] * dn).sum(1)


def _parts(fgate: Tensor) -> Tensor:
    """Split log_f into three planes whose sums stay exact: coarse, fine, and the count of closed gates (log_f = -inf).

    Differences of plain prefix sums lose a decay of 1e-6 behind a sum of -1e3. The coarse plane holds multiples of
    1/GRID, which float32 adds without rounding; a closed gate is counted, not added, as -inf - -inf is no number.
    """
    log_f = F.logsigmoid(fgate)
    closed = log_f == NEG_INF
    log_f = torch.where(closed, 0.0, log_f)
    coarse = torch.round(log_f * GRID) / GRID
    return torch.stack([coarse, log_f - coarse, closed.to(log_f.dtype)])


def _prefix(parts: Tensor) -> Tensor:
    """Return the inclusive prefix sums over the last axis, as a masked reduction that fuses (cumsum does not)."""
    return torch.where(_causal(parts.shape[-1], parts), parts[..., None, :], 0.0).sum(-1)


def _span(after: Tensor, before: Tensor | None = None) -> Tensor:
    """Return the log decay between two prefixes of `_parts`, -inf where a closed gate lies between them."""
    coarse, fine, closed = (after if before is None else after - before).unbind(0)
    return torch.where(closed == 0, coarse + fine, NEG_INF)


def _causal(size: int, like: Tensor) -> Tensor:
    index = torch.arange(size, device=like.device)
    return index[None, :] <= index[:, None]


def _finite(maximum: Tensor) -> Tensor:
    """Replace the maximum of nothing, -inf, by 0, so that -inf - maximum stays -inf."""
    return torch.where(maximum == NEG_INF, 0.0, maximum)


def _floor(m: Tensor) -> Tensor:
    """Return exp(-m), held finite: 1/denominator is 0 in effect, and its gradient is no 0 * inf."""
    return torch.exp((-m).clamp(max=700.0 if m.dtype == torch.float64 else 80.0))


def _state_product_dtype(stream: torch.dtype) -> torch.dtype:
    """Return the dtype in which states are multiplied: float16's range is too small for a sum over a segment."""
    return torch.float32 if stream == torch.float16 else stream


_STREAMS = ("G NC L DHQK", "G NC L DHQK", "G NC L DHHV", "G NC L", "G NC L")
_STATE = ("G DHQK DHHV", "G DHQK", "G 1")
_SUMMARY = ("G 1", "G 1", "G DHQK DHHV", "G DHQK")
_STEP = ("B NH DHQK", "B NH DHQK", "B NH DHHV", "B NH 1", "B NH 1", "B NH DHQK DHHV", "B NH DHQK", "B NH 1")
# The functions that are compiled, with the axes of their arguments.
AXES = {
    step: _STEP,
    step_: _STEP,
    operands: (*_STREAMS, "G NC L L", *_STATE),
    segment_backward: (*_STREAMS, "G NC L L", *_STATE, "G NC L DHHV", *_STATE),
    summarize: _STREAMS[1:],
    absorb: (*_SUMMARY, *_STATE),
    after: (*_STREAMS[1:], *_STATE),
}
