"""The segment: what a token sees of its own chunk and of what stands before it, as the factors of matrix products."""

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
    zero_if_empty,
)
from torch_xlstm_ops.maths.mlstm.chunks import (
    InterChunkWeights,
    absorb,
    inter_chunk_weights,
    n_before_chunks,
    product_dtype,
    reduce_chunks,
    summaries,
)
from torch_xlstm_ops.maths.mlstm.recurrence import floor
from torch_xlstm_ops.maths.shapes import state_dtype


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


def segment_factors(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, scores: Tensor, c: Tensor, n: Tensor, m: Tensor,
    *, eps: float,
) -> tuple[Tensor, ...]:
    """Turn a segment into the factors of its output, ``h = q_gated C_before + P v``, and the state after it.

    q, k: (G, NC, L, DHQK); v: (G, NC, L, DHHV); igate, fgate: (G, NC, L); scores: (G, NC, L, L), of `scores`;
    c: (G, DHQK, DHHV); n: (G, DHQK); m: (G, 1).
    Returns P (G*NC, L, L), q_gated (G*NC, L, DHQK), then W (G, NC, NC) and dC (G, NC, DHQK, DHHV) for
    `inter_chunk_states`, and the state c, n, m after the segment.
    The factors already hold 1/denominator, so no pass over h follows. A token with igate -inf and fgate +inf changes
    nothing (padding).
    """
    within, igate = log_decay_prefixes(fgate.to(state_dtype(q.dtype))), igate.to(state_dtype(q.dtype))
    chunks, _, _ = summaries(k, v, igate, within)
    across = across_chunks(within)
    reach = inter_chunk_weights(within[..., -1], across, chunks.M, m)
    P, q_gated = _weights_and_gated_q(q, igate, within, reach, scores, n_before_chunks(reach, chunks.dn, n), eps)
    W = reach.with_state().to(product_dtype(q.dtype))
    return P, q_gated, W, chunks.dC, *absorb(*reduce_chunks(across, *chunks), c, n, m)


def segment_factors_zero_state(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, scores: Tensor, *, eps: float
) -> tuple[Tensor, ...]:
    """Like `segment_factors` for a zero initial state; call `final_state_` after `inter_chunk_states` to obtain c.

    c is then the last chunk's summary, absorbed into what stands before it: a pass over two of the summaries in place
    of one over all. Returns P, q_gated, W, dC, n, m, and keep and add (G, 1) for `final_state_`.
    """
    within, igate = log_decay_prefixes(fgate.to(state_dtype(q.dtype))), igate.to(state_dtype(q.dtype))
    chunks, _, _ = summaries(k, v, igate, within)
    reach = inter_chunk_weights(within[..., -1], across_chunks(within), chunks.M, torch.zeros_like(chunks.M[:, :1]))
    n_before = torch.bmm(reach.W, chunks.dn)
    P, q_gated = _weights_and_gated_q(q, igate, within, reach, scores, n_before, eps)
    F_, M, m_before = log_decay(within[..., -1:, -1]), chunks.M[:, -1:], reach.m_before[:, -1:]
    m = torch.maximum(F_ + m_before, M)
    keep, add = exp_or_zero(F_ + m_before - zero_if_empty(m)), exp_or_zero(M - zero_if_empty(m))
    n = keep * n_before[:, -1] + add * chunks.dn[:, -1]
    return P, q_gated, reach.W.to(product_dtype(q.dtype)), chunks.dC, n, m, keep, add


def final_state_(dC: Tensor, C_before: Tensor, keep: Tensor, add: Tensor, c: Tensor) -> tuple[()]:
    """Write c after a segment of `segment_factors_zero_state` into c (G, DHQK, DHHV).

    dC, C_before: (G, NC, DHQK, DHHV); keep, add: (G, 1).
    """
    c.copy_(keep[..., None] * C_before[:, -1].to(keep.dtype) + add[..., None] * dC[:, -1].to(add.dtype))
    return ()


def prefers_zero_state(device: str) -> bool:
    """Return whether a segment from an empty state does well to begin with `segment_factors_zero_state`.

    On CUDA, where a pass over all summaries is one over the memory. The CPU has them in its cache, and looks at c
    before it computes h.
    """
    return device == "cuda"


def segment_factors_single_chunk(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, scores: Tensor, *, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute a segment of one chunk (NC = 1) from an empty state: no summary, no product with what stands before.

    Returns P (G, L, L), of which ``h = P v``, and the state after the segment.
    """
    wide = state_dtype(q.dtype)
    within, igate = log_decay_prefixes(fgate.to(wide)), igate.to(wide)
    look = intra_chunk_log_weights(igate, within, torch.zeros_like(igate[..., 0]))
    P = scores * q.shape[-1] ** -0.5 * look.weights()
    P = P * _inverse_denominator(P.sum(-1), look, eps)[..., None]
    (m, dC, dn), _, _ = summaries(k, v, igate, within, least=log_decay(within[..., -1]))
    return P.to(q.dtype).flatten(0, 1), dC[:, 0].to(wide), dn[:, 0], m


def factors_from_summary(
    q: Tensor, igate: Tensor, fgate: Tensor, scores: Tensor, M: Tensor, dn: Tensor, n: Tensor, m: Tensor, *, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return P, q_gated and W as `segment_factors` does, from chunks already summarised by `summarize`."""
    wide = state_dtype(q.dtype)
    within = log_decay_prefixes(fgate.to(wide))
    reach = inter_chunk_weights(within[..., -1], across_chunks(within), M, m)
    P, q_gated = _weights_and_gated_q(q, igate.to(wide), within, reach, scores, n_before_chunks(reach, dn, n), eps)
    return P, q_gated, reach.with_state().to(product_dtype(q.dtype))


def _weights_and_gated_q(
    q: Tensor, igate: Tensor, within: Tensor, reach: InterChunkWeights, scores: Tensor, n_before: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    scale = q.shape[-1] ** -0.5
    q_wide = q.to(state_dtype(q.dtype))
    look = intra_chunk_log_weights(igate, within, reach.m_before)
    P = scores * scale * look.weights()
    w = look.w_state() * scale
    qn = (q_wide * n_before[..., None, :]).sum(-1)
    r = _inverse_denominator(P.sum(-1) + w * qn, look, eps)
    P, q_gated = P * r[..., None], q_wide * (w * r)[..., None]
    return P.to(q.dtype).flatten(0, 1), q_gated.to(product_dtype(q.dtype)).flatten(0, 1)


def _inverse_denominator(total: Tensor, look: IntraChunkLogWeights, eps: float) -> Tensor:
    """Return 1/denominator (G, NC, L), from the sum of all weights."""
    return 1 / (torch.maximum(total.abs(), floor(look.m)) + eps)


class IntraChunkLogWeights(NamedTuple):
    """Logarithms of what a token sees: the tokens s <= t of its chunk, and the state before the chunk."""

    decay: Tensor  # (G, NC, L, L)
    m_inter: Tensor  # (G, NC, L)
    m: Tensor  # (G, NC, L), the largest of either

    def weights(self) -> Tensor:
        """Return what each token weighs (G, NC, L, L), relative to the largest."""
        return exp_or_zero(self.decay - zero_if_empty(self.m)[..., None])

    def w_state(self) -> Tensor:
        """Return what the state before the chunk weighs (G, NC, L)."""
        return exp_or_zero(self.m_inter - zero_if_empty(self.m))


def intra_chunk_log_weights(igate: Tensor, within: Tensor, m_before: Tensor) -> IntraChunkLogWeights:
    """Find the logarithms of the first level."""
    decay = log_decay(within[..., :, None], within[..., None, :]) + igate[..., None, :]
    decay = torch.where(causal(igate.shape[-1], igate), decay, NEG_INF)
    m_inter = log_decay(within) + m_before[..., None]
    return IntraChunkLogWeights(decay, m_inter, torch.maximum(decay.amax(-1), m_inter))


def inter_chunk_states(W: Tensor, dC: Tensor, c: Tensor | None) -> Tensor:
    """Return the inter-chunk states C_before (G, NC, DHQK, DHHV), from W and dC of `segment_factors`; writes over dC.

    c: that before the segment; None after `segment_factors_zero_state`, which leaves dC as it is.
    A product outside the compiled graph: there Inductor would copy all of dC to change one slot.
    """
    if c is not None:
        dC[:, -1].copy_(c)
    return torch.bmm(W, dC.flatten(2)).view(dC.shape)


def write_output_(P: Tensor, q_gated: Tensor | None, C_before: Tensor | None, v: Tensor, h: Tensor) -> None:
    """Write ``q_gated C_before + P v`` into h (G*NC, L, DHHV); v (G, NC, L, DHHV), C_before of `inter_chunk_states`.

    None for q_gated and C_before: nothing stands before, after `segment_factors_single_chunk`.

    Products outside the compiled graph: there Inductor would copy the second to add it to the first.
    """
    if q_gated is None or C_before is None:
        torch.bmm(P, v.flatten(0, 1), out=h)
        return
    C_before = C_before.flatten(0, 1)
    if C_before.dtype == h.dtype:
        torch.bmm(q_gated, C_before, out=h)
    else:
        h.copy_(torch.bmm(q_gated, C_before))
    h.baddbmm_(P, v.flatten(0, 1))


def segment(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, c: Tensor, n: Tensor, m: Tensor, *, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return h (G, NC, L, DHHV) and the state after a segment as a pure function; arguments as of `segment_factors`."""
    P, q_gated, W, dC, *state = segment_factors(q, k, v, igate, fgate, scores(q, k), c, n, m, eps=eps)
    sources = dC.slice_scatter(c.to(dC.dtype)[:, None], 1, dC.shape[1] - 1, dC.shape[1])
    C_before = torch.bmm(W, sources.flatten(2)).view(-1, *c.shape[1:])
    h = torch.bmm(q_gated, C_before).to(v.dtype) + torch.bmm(P, v.flatten(0, 1))
    c_after, n_after, m_after = state
    return h.view(v.shape), c_after, n_after, m_after


def final_state(
    k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, c: Tensor, n: Tensor, m: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return only the state after a segment."""
    F_, M, dC, dn, *_ = summarize(k, v, igate, fgate)
    return absorb(F_, M, dC, dn, c, n, m)


def summarize(k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor) -> tuple[Tensor, ...]:
    """Reduce a segment to its monoid element F (G, 1), M (G, 1), dC (G, DHQK, DHHV), dn (G, DHQK).

    Returns these, and M (G, NC), dC (G, NC, DHQK, DHHV) and dn (G, NC, DHQK) of its chunks, for
    `factors_from_summary` and `inter_chunk_states`.
    """
    wide = state_dtype(k.dtype)
    within = log_decay_prefixes(fgate.to(wide))
    chunks, _, _ = summaries(k, v, igate.to(wide), within)
    return *reduce_chunks(across_chunks(within), *chunks), *chunks
