"""mLSTM mathematics: the step, the two-level segment and its gradient, and the recurrent oracle.

A task holds G rows (any heads of any batch entries) and NC chunks of L tokens. Gates are pre-activations; a state
(c, n, m) stands for ``c * exp(m)``, ``n * exp(m)``. Source: Beck et al. 2024, "xLSTM" (mLSTM, stabilised form);
Beck et al. 2025, "Tiled Flash Linear Attention" (chunkwise form). The second level, chunks into a segment, is the
same masked product again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_xlstm_ops.decay import NEG_INF, across_chunks, causal, finite, prefixes, span, weight
from torch_xlstm_ops.shapes import state_dtype

COLUMN = 128  # tokens of a chunk, or rows of a large c, that a CUDA kernel sums at once
LARGE = 1 << 23  # elements of c, which are more than its cache holds
FLOOR = {torch.float32: 80.0, torch.float64: 700.0}  # the most that `floor` raises e to


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
    return _step(_update, q, k, v, igate, fgate, c, n, m, eps)


def advance(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, c: Tensor, n: Tensor, m: Tensor, *, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Do a `step`, to be compiled; on CUDA a large c is returned in parts (..., DHQK / COLUMN, COLUMN, DHHV).

    A kernel holds whole columns of what it sums, and the shorter they are the more beside each other, whose bytes it
    then reads at once. The parts are one block of memory, but joined into an axis within the graph they would be
    written twice.
    """
    return _step(_update_parts if _comes_in_parts(c) else _update, q, k, v, igate, fgate, c, n, m, eps)


_Update = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _step(
    update: _Update, q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, c: Tensor, n: Tensor, m: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = state_dtype(q.dtype)
    log_f, igate = F.logsigmoid(fgate.to(wide)), igate.to(wide)
    m_new = torch.maximum(log_f + m, igate)
    forget, add = torch.exp(log_f + m - m_new), torch.exp(igate - m_new)
    q_scaled = q.to(wide) * q.shape[-1] ** -0.5
    k_gated = add * k.to(wide)
    c_new, read = update(c, forget, k_gated, v.to(wide), q_scaled)
    n_new = forget * n + k_gated
    denominator = torch.maximum((q_scaled * n_new).sum(-1, keepdim=True).abs(), floor(m_new)) + eps
    return (read / denominator).to(v.dtype), c_new, n_new, m_new


def _update(c: Tensor, forget: Tensor, k: Tensor, v: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``forget c + k v^T`` and its product with q."""
    if c.device.type == "cpu":
        c = forget[..., None] * c + k[..., :, None] * v[..., None, :]
        return c, (c * q[..., :, None]).sum(-2)
    # In Metal and Triton, Inductor writes c and sums it in one kernel only along the last axis.
    c = forget[..., None] * c.mT + k[..., None, :] * v[..., :, None]  # (..., DHHV, DHQK)
    return c.mT, (c * q[..., None, :]).sum(-1)


def _update_parts(c: Tensor, forget: Tensor, k: Tensor, v: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Do `_update` and return c in parts."""
    c = _in_parts(c).mT  # (..., part, DHHV, COLUMN)
    k, q = (torch.unflatten(t, -1, (-1, COLUMN))[..., None, :] for t in (k, q))
    c = forget[..., None, None] * c + k * v[..., None, :, None]
    return c.mT, (c * q).sum(-1).sum(-2)


def _comes_in_parts(c: Tensor) -> bool:
    return c.is_cuda and c.shape[-2] > COLUMN and c.shape[-2] % COLUMN == 0 and c.numel() >= LARGE


def _in_parts(c: Tensor) -> Tensor:
    return torch.unflatten(c, -2, (-1, COLUMN))


def step_(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, c: Tensor, n: Tensor, m: Tensor, *, eps: float
) -> tuple[Tensor]:
    """Do a `step` and write the new state over c, n, m; return h."""
    h, *new = advance(q, k, v, igate, fgate, c, n, m, eps=eps)
    if c.device.type != "cpu":
        c, new[0] = (_in_parts(c) if _comes_in_parts(c) else c).mT, new[0].mT  # in the order in which it is computed
        # The kernel that updates n also stores m: as a reduction's result, after all its threads have read m.
        new[2] = new[2].expand_as(n).amax(-1, keepdim=True)
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
) -> tuple[Tensor, ...]:
    """Turn a segment into the factors of its output, ``h = q_gated C_before + P v``, and the state after it.

    q, k: (G, NC, L, DHQK); v: (G, NC, L, DHHV); igate, fgate: (G, NC, L); scores: (G, NC, L, L), of `scores`;
    c: (G, DHQK, DHHV); n: (G, DHQK); m: (G, 1).
    Returns P (G*NC, L, L), q_gated (G*NC, L, DHQK), W (G, NC, NC) and dC (G, NC, DHQK, DHHV) for `stand`, and c, n, m.
    The factors already hold 1/denominator, so no pass over h follows. A token with igate -inf and fgate +inf changes
    nothing (padding).
    """
    within, igate = prefixes(fgate.to(state_dtype(q.dtype))), igate.to(state_dtype(q.dtype))
    chunks, _, _ = summaries(k, v, igate, within)
    across = across_chunks(within)
    reach = reaches(within[..., -1], across, chunks.M, m)
    P, q_gated = _answers(q, igate, within, reach, scores, before(reach, chunks.dn, n), eps)
    W = reach.with_state().to(product_dtype(q.dtype))
    return P, q_gated, W, chunks.dC, *absorb(*_fold(across, *chunks), c, n, m)


def opening(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, scores: Tensor, *, eps: float
) -> tuple[Tensor, ...]:
    """Do what `operands` does from an empty state, but for c: that is left for `close`, after `stand`.

    c is then the last chunk's summary, absorbed into what stands before it: a pass over two of the summaries in place
    of one over all. Returns P, q_gated, W, dC, n, m, and keep and add (G, 1) for `close`.
    """
    within, igate = prefixes(fgate.to(state_dtype(q.dtype))), igate.to(state_dtype(q.dtype))
    chunks, _, _ = summaries(k, v, igate, within)
    reach = reaches(within[..., -1], across_chunks(within), chunks.M, torch.zeros_like(chunks.M[:, :1]))
    n_before = torch.bmm(reach.W, chunks.dn)
    P, q_gated = _answers(q, igate, within, reach, scores, n_before, eps)
    F_, M, m_before = span(within[..., -1:, -1]), chunks.M[:, -1:], reach.m_before[:, -1:]
    m = torch.maximum(F_ + m_before, M)
    keep, add = weight(F_ + m_before - m), weight(M - m)
    n = keep * n_before[:, -1] + add * chunks.dn[:, -1]
    return P, q_gated, reach.W.to(product_dtype(q.dtype)), chunks.dC, n, m, keep, add


def close(dC: Tensor, C_before: Tensor, keep: Tensor, add: Tensor) -> tuple[Tensor]:
    """Return c (G, DHQK, DHHV) after a segment that `opening` began; dC, C_before: (G, NC, DHQK, DHHV)."""
    return (keep[..., None] * C_before[:, -1].to(keep.dtype) + add[..., None] * dC[:, -1].to(add.dtype),)


def opens(device: str) -> bool:
    """Return whether a segment from an empty state does well to begin with `opening`.

    On CUDA, where a pass over all summaries is one over the memory. The CPU has them in its cache, and looks at c
    before it computes h.
    """
    return device == "cuda"


def answers(
    q: Tensor, igate: Tensor, fgate: Tensor, scores: Tensor, M: Tensor, dn: Tensor, n: Tensor, m: Tensor, *, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return P, q_gated and W as `operands` does, from chunks already summarised by `summarize`."""
    wide = state_dtype(q.dtype)
    within = prefixes(fgate.to(wide))
    reach = reaches(within[..., -1], across_chunks(within), M, m)
    P, q_gated = _answers(q, igate.to(wide), within, reach, scores, before(reach, dn, n), eps)
    return P, q_gated, reach.with_state().to(product_dtype(q.dtype))


def before(reach: Reach, dn: Tensor, n: Tensor) -> Tensor:
    """Return n before each chunk, (G, NC, DHQK)."""
    return torch.bmm(reach.W, dn) + reach.w_state[..., None] * n[:, None]


def _answers(
    q: Tensor, igate: Tensor, within: Tensor, reach: Reach, scores: Tensor, n_before: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    scale = q.shape[-1] ** -0.5
    q_wide = q.to(state_dtype(q.dtype))
    look = looks(igate, within, reach.m_before)
    P = scores * scale * weight(look.decay - look.m[..., None])
    w = weight(look.m_inter - look.m) * scale
    qn = (q_wide * n_before[..., None, :]).sum(-1)
    r = 1 / (torch.maximum((P.sum(-1) + w * qn).abs(), floor(look.m)) + eps)
    P, q_gated = P * r[..., None], q_wide * (w * r)[..., None]
    return P.to(q.dtype).flatten(0, 1), q_gated.to(product_dtype(q.dtype)).flatten(0, 1)


def stand(W: Tensor, dC: Tensor, c: Tensor | None) -> Tensor:
    """Return what stands before each chunk, C_before (G, NC, DHQK, DHHV), from what `operands` returns; writes over dC.

    c: that before the segment; None after `opening`, which leaves dC as it is.
    A product outside the compiled graph: there Inductor would copy all of dC to change one slot.
    """
    if c is not None:
        dC[:, -1].copy_(c)
    return torch.bmm(W, dC.flatten(2)).view(dC.shape)


def emit(P: Tensor, q_gated: Tensor, C_before: Tensor, v: Tensor, h: Tensor) -> None:
    """Write ``q_gated C_before + P v`` into h (G*NC, L, DHHV); v (G, NC, L, DHHV), C_before of `stand`.

    Products outside the compiled graph: there Inductor would copy the second to add it to the first.
    """
    C_before = C_before.flatten(0, 1)
    if C_before.dtype == h.dtype:
        torch.bmm(q_gated, C_before, out=h)
    else:
        h.copy_(torch.bmm(q_gated, C_before))
    h.baddbmm_(P, v.flatten(0, 1))


def segment(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, c: Tensor, n: Tensor, m: Tensor, *, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return h (G, NC, L, DHHV) and the state after a segment; shapes as in `operands`. A pure form of the two."""
    P, q_gated, W, dC, *state = operands(q, k, v, igate, fgate, scores(q, k), c, n, m, eps=eps)
    sources = dC.slice_scatter(c.to(dC.dtype)[:, None], 1, dC.shape[1] - 1, dC.shape[1])
    C_before = torch.bmm(W, sources.flatten(2)).view(-1, *c.shape[1:])
    h = torch.bmm(q_gated, C_before).to(v.dtype) + torch.bmm(P, v.flatten(0, 1))
    c_after, n_after, m_after = state
    return h.view(v.shape), c_after, n_after, m_after


def after(
    k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, c: Tensor, n: Tensor, m: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return only the state after a segment."""
    F_, M, dC, dn, *_ = summarize(k, v, igate, fgate)
    return absorb(F_, M, dC, dn, c, n, m)


def summarize(k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor) -> tuple[Tensor, ...]:
    """Reduce a segment to its monoid element F (G, 1), M (G, 1), dC (G, DHQK, DHHV), dn (G, DHQK).

    Returns these, and M (G, NC), dC (G, NC, DHQK, DHHV) and dn (G, NC, DHQK) of its chunks, for `answers` and `stand`.
    """
    wide = state_dtype(k.dtype)
    within = prefixes(fgate.to(wide))
    chunks, _, _ = summaries(k, v, igate.to(wide), within)
    return *_fold(across_chunks(within), *chunks), *chunks


def absorb(
    F_: Tensor, M: Tensor, dC: Tensor, dn: Tensor, c: Tensor, n: Tensor, m: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the state after a segment from its monoid element and the state before it.

        m' = max(F + m, M)      c' = exp(F + m - m') c + exp(M - m') dC          n' likewise
    """
    m_new = torch.maximum(F_ + m, M)
    keep, add = weight(F_ + m - m_new), weight(M - m_new)
    return keep[..., None] * c + add[..., None] * dC, keep * n + add * dn, m_new


def combine(
    first: tuple[Tensor, Tensor, Tensor, Tensor], second: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compose the monoid elements of two segments, `first` before `second` in time; exactly associative."""
    (F_first, M, dC, dn), (F_second, M_second, dC_second, dn_second) = first, second
    M_new = torch.maximum(F_second + M, M_second)
    base = finite(M_new)
    keep, add = torch.exp(F_second + M - base), torch.exp(M_second - base)
    dC_new = keep[..., None] * dC + add[..., None] * dC_second
    return F_first + F_second, M_new, dC_new, keep * dn + add * dn_second


class Summaries(NamedTuple):
    """The monoid elements of the chunks of a segment, but for their decay."""

    M: Tensor  # (G, NC)
    dC: Tensor  # (G, NC, DHQK, DHHV)
    dn: Tensor  # (G, NC, DHQK)


def summaries(k: Tensor, v: Tensor, igate: Tensor, within: Tensor) -> tuple[Summaries, Tensor, Tensor]:
    """Sum up each chunk, all weights relative to the chunk's largest; within: `prefixes` of its tokens.

    Returns these, the weights (G, NC, L), and k times them (G, NC, DHQK, L).
    """
    gate, M = _input_weights(igate, within)
    k_gated, dn = _gated(k, gate)
    dC = torch.bmm(k_gated.flatten(0, 1), v.to(k_gated.dtype).flatten(0, 1))
    return Summaries(M, dC.view(*k_gated.shape[:3], v.shape[-1]), dn), gate, k_gated


def _gated(k: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Return k times the gate, transposed (G, NC, DHQK, L), in the dtype of products, and its sum over the tokens."""
    product = product_dtype(k.dtype)
    if k.device.type != "mps":
        k_gated = k.to(gate.dtype) * gate[..., None]
        return k_gated.to(product).mT, sum_tokens(k_gated)
    # In Metal, Inductor writes k_gated and sums it in one kernel only along the last axis; contiguous says that it is
    # kept so, else Inductor would copy it for whoever returns it.
    k_gated = k.to(gate.dtype).mT * gate[..., None, :]
    return k_gated.to(product).contiguous(), k_gated.sum(-1)


def sum_tokens(terms: Tensor) -> Tensor:
    """Return the sum over the tokens of each chunk, (..., L, D) -> (..., D).

    On CUDA in halves of a chunk, for the reason that `advance` gives.
    """
    if terms.is_cuda and terms.shape[-2] > COLUMN and terms.shape[-2] % COLUMN == 0:
        terms = torch.unflatten(terms, -2, (-1, COLUMN)).sum(-2)
    return terms.sum(-2)


def _input_weights(igate: Tensor, within: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a token weighs at the end of its chunk, (G, NC, L), relative to the chunk's largest, and that M."""
    log_weight = span(within[..., -1:], within) + igate
    M = log_weight.amax(-1)
    return weight(log_weight - finite(M)[..., None]), M


class Reach(NamedTuple):
    """How much of each chunk's summary, and of the incoming state, stands before each chunk."""

    W: Tensor  # (G, NC, NC), strictly lower triangular
    w_state: Tensor  # (G, NC)
    m_before: Tensor  # (G, NC), what both are relative to
    from_chunk: Tensor  # (G, NC, NC) and
    from_state: Tensor  # (G, NC): their logarithms, not relative

    def with_state(self) -> Tensor:
        """Return W with w_state in the last column: the last chunk's summary feeds no chunk of this segment."""
        chunk = torch.arange(self.W.shape[-1], device=self.W.device)
        return torch.where(chunk == self.W.shape[-1] - 1, self.w_state[..., None], self.W)


def reaches(F_: Tensor, across: Tensor, M: Tensor, m: Tensor) -> Reach:
    """Find the weights of the second level; F_: each chunk's decay (3, G, NC); across: of `across_chunks`."""
    chunk = torch.arange(M.shape[-1], device=M.device)
    before = across - F_
    from_state = span(before).to(M.dtype) + m
    from_chunk = span(before[..., :, None], across[..., None, :]).to(M.dtype) + M[..., None, :]
    from_chunk = torch.where(chunk[None, :] < chunk[:, None], from_chunk, NEG_INF)
    m_before = torch.maximum(from_chunk.amax(-1), from_state)
    W = weight(from_chunk - m_before[..., None])
    return Reach(W, weight(from_state - m_before), m_before, from_chunk, from_state)


class Look(NamedTuple):
    """Logarithms of what a token sees: the tokens s <= t of its chunk, and the state before the chunk."""

    decay: Tensor  # (G, NC, L, L)
    m_inter: Tensor  # (G, NC, L)
    m: Tensor  # (G, NC, L), the largest of either


def looks(igate: Tensor, within: Tensor, m_before: Tensor) -> Look:
    """Find the logarithms of the first level."""
    decay = span(within[..., :, None], within[..., None, :]) + igate[..., None, :]
    decay = torch.where(causal(igate.shape[-1], igate), decay, NEG_INF)
    m_inter = span(within) + m_before[..., None]
    return Look(decay, m_inter, torch.maximum(decay.amax(-1), m_inter))


def _fold(across: Tensor, M: Tensor, dC: Tensor, dn: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compose the monoid elements of the chunks of a segment into one."""
    from_chunk = span(across[..., -1:], across).to(M.dtype) + M
    M_all = from_chunk.amax(-1, keepdim=True)
    share = weight(from_chunk - finite(M_all))
    dC_all = (share[..., None, None] * dC.to(M.dtype)).sum(1)
    return span(across[..., -1:]).to(M.dtype), M_all, dC_all, (share[..., None] * dn).sum(1)


def floor(m: Tensor) -> Tensor:
    """Return exp(-m), held finite: 1/denominator is 0 in effect, and its gradient is no 0 * inf."""
    return torch.exp((-m).clamp(max=FLOOR[m.dtype]))


def product_dtype(stream: torch.dtype) -> torch.dtype:
    """Return the dtype in which states are multiplied: float16's range is too small for a sum over a segment."""
    return torch.float32 if stream == torch.float16 else stream


STREAMS = ("G NC L DHQK", "G NC L DHQK", "G NC L DHHV", "G NC L", "G NC L")
STATE = ("G DHQK DHHV", "G DHQK", "G 1")
_SUMMARY = ("G 1", "G 1", "G DHQK DHHV", "G DHQK")
_STEP = ("B NH DHQK", "B NH DHQK", "B NH DHHV", "B NH 1", "B NH 1", "B NH DHQK DHHV", "B NH DHQK", "B NH 1")
# The functions that are compiled, with the axes of their arguments.
AXES = {
    advance: _STEP,
    step_: _STEP,
    operands: (*STREAMS, "G NC L L", *STATE),
    opening: (*STREAMS, "G NC L L"),
    close: (*["G NC DHQK DHHV"] * 2, *["G 1"] * 2),
    answers: ("G NC L DHQK", "G NC L", "G NC L", "G NC L L", "G NC", "G NC DHQK", *STATE[1:]),
    summarize: STREAMS[1:],
    absorb: (*_SUMMARY, *STATE),
    after: (*STREAMS[1:], *STATE),
}
