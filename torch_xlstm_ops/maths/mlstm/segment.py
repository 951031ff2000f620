"""Segment forward: intra-chunk weights and inter-chunk states as the factors of batched matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_xlstm_ops.maths.decay import (
    across_chunks,
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
from torch_xlstm_ops.maths.mlstm.intra_chunk import IntraChunkLogWeights, intra_chunk_log_weights
from torch_xlstm_ops.maths.mlstm.recurrence import floor
from torch_xlstm_ops.maths.products import columns
from torch_xlstm_ops.maths.shapes import state_dtype


def scores(q: Tensor, k: Tensor) -> Tensor:
    """Return q k^T of each chunk, (G, NC, L, L), in float32; q, k: (G, NC, L, DHQK).

    Where large scores cancel in a denominator, rounding them to bfloat16 would cause an error of 1.6e-2 in h; in
    float32 h is as exact as the recurrence's. Computed outside the compiled graph: only CUDA has a product with a wider
    result, and its meta function fails on symbolic sizes.
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
    """Return the factors of a segment's output, ``h = q_gated C_before + P v``, and the state after it.

    q, k: (G, NC, L, DHQK); v: (G, NC, L, DHHV); igate, fgate: (G, NC, L); scores: (G, NC, L, L), of `scores`;
    c: (G, DHQK, DHHV); n: (G, DHQK); m: (G, 1).
    Returns P (G*NC, L, L), q_gated (G*NC, L, DHQK), then W (G, NC, NC) and dC (G, NC, DHQK, DHHV) for
    `inter_chunk_states`, and the state c, n, m after the segment.
    The factors include 1/denominator, so h needs no further pass. A token with igate -inf and fgate +inf is the
    identity (padding).
    """
    within, igate = log_decay_prefixes(fgate.to(state_dtype(q.dtype))), igate.to(state_dtype(q.dtype))
    chunks, _, _ = summaries(k, v, igate, within)
    across = across_chunks(within)
    inter = inter_chunk_weights(within[..., -1], across, chunks.M, m)
    P, q_gated = _weights_and_gated_q(q, igate, within, inter, scores, n_before_chunks(inter, chunks.dn, n), eps)
    W = inter.with_state().to(product_dtype(q.dtype))
    return P, q_gated, W, chunks.dC, *absorb(*reduce_chunks(across, *chunks), c, n, m)


def segment_factors_zero_state(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, scores: Tensor, *, eps: float
) -> tuple[Tensor, ...]:
    """Like `segment_factors` for a zero initial state; call `final_state_` after `inter_chunk_states` to obtain c.

    c is then the last chunk's summary absorbed into the state before that chunk, which reads two summaries instead of
    all. Returns P, q_gated, W, dC, n, m, and keep and add (G, 1) for `final_state_`.
    """
    within, igate = log_decay_prefixes(fgate.to(state_dtype(q.dtype))), igate.to(state_dtype(q.dtype))
    chunks, _, _ = summaries(k, v, igate, within)
    inter = inter_chunk_weights(within[..., -1], across_chunks(within), chunks.M, torch.zeros_like(chunks.M[:, :1]))
    n_before = torch.bmm(inter.W, chunks.dn)
    P, q_gated = _weights_and_gated_q(q, igate, within, inter, scores, n_before, eps)
    F_, M, m_before = log_decay(within[..., -1:, -1]), chunks.M[:, -1:], inter.m_before[:, -1:]
    m = torch.maximum(F_ + m_before, M)
    keep, add = exp_or_zero(F_ + m_before - zero_if_empty(m)), exp_or_zero(M - zero_if_empty(m))
    n = keep * n_before[:, -1] + add * chunks.dn[:, -1]
    return P, q_gated, inter.W.to(product_dtype(q.dtype)), chunks.dC, n, m, keep, add


def final_state_(dC: Tensor, C_before: Tensor, keep: Tensor, add: Tensor, c: Tensor) -> tuple[()]:
    """Write c after a segment of `segment_factors_zero_state` into c (G, DHQK, DHHV).

    dC, C_before: (G, NC, DHQK, DHHV); keep, add: (G, 1).
    """
    c.copy_(keep[..., None] * C_before[:, -1].to(keep.dtype) + add[..., None] * dC[:, -1].to(add.dtype))
    return ()


def prefers_zero_state(device: str) -> bool:
    """Return whether `segment_factors_zero_state` is faster for a zero initial state.

    It is on CUDA, where a pass over all summaries reads memory. On the CPU they are in the cache, and c is needed
    before h, to test whether it is finite.
    """
    return device == "cuda"


def segment_factors_single_chunk(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, scores: Tensor, *, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Like `segment_factors` for one chunk (NC = 1) and a zero initial state: there is no inter-chunk term.

    Returns P (G, L, L), with ``h = P v``, and the state after the segment.
    """
    wide = state_dtype(q.dtype)
    within, igate = log_decay_prefixes(fgate.to(wide)), igate.to(wide)
    intra = intra_chunk_log_weights(igate, within, torch.zeros_like(igate[..., 0]))
    P = scores * q.shape[-1] ** -0.5 * intra.weights()
    P = P * _inverse_denominator(P.sum(-1), intra, eps)[..., None]
    (m, dC, dn), _, _ = summaries(k, v, igate, within, least=log_decay(within[..., -1]))
    return P.to(q.dtype).flatten(0, 1), dC[:, 0].to(wide), dn[:, 0], m


def factors_from_summary(
    q: Tensor, igate: Tensor, fgate: Tensor, scores: Tensor, M: Tensor, dn: Tensor, n: Tensor, m: Tensor, *, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return P, q_gated and W of `segment_factors`, given the chunk summaries M and dn of `summarize`."""
    wide = state_dtype(q.dtype)
    within = log_decay_prefixes(fgate.to(wide))
    inter = inter_chunk_weights(within[..., -1], across_chunks(within), M, m)
    P, q_gated = _weights_and_gated_q(q, igate.to(wide), within, inter, scores, n_before_chunks(inter, dn, n), eps)
    return P, q_gated, inter.with_state().to(product_dtype(q.dtype))


def _weights_and_gated_q(
    q: Tensor, igate: Tensor, within: Tensor, inter: InterChunkWeights, scores: Tensor, n_before: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    scale = q.shape[-1] ** -0.5
    q_wide = q.to(state_dtype(q.dtype))
    intra = intra_chunk_log_weights(igate, within, inter.m_before)
    P = scores * scale * intra.weights()
    w = intra.w_state() * scale
    qn = (q_wide * n_before[..., None, :]).sum(-1)
    r = _inverse_denominator(P.sum(-1) + w * qn, intra, eps)
    P, q_gated = P * r[..., None], q_wide * (w * r)[..., None]
    return P.to(q.dtype).flatten(0, 1), q_gated.to(product_dtype(q.dtype)).flatten(0, 1)


def _inverse_denominator(total: Tensor, intra: IntraChunkLogWeights, eps: float) -> Tensor:
    """Return 1/denominator (G, NC, L); total: the sum of all weights."""
    return 1 / (torch.maximum(total.abs(), floor(intra.m)) + eps)


def inter_chunk_states(W: Tensor, dC: Tensor, c: Tensor | None) -> Tensor:
    """Return the inter-chunk states C_before (G, NC, DHQK, DHHV); W, dC: of `segment_factors`.

    c: before the segment, written over the last chunk of dC; None for a zero initial state.
    Computed outside the compiled graph, where Inductor would copy all of dC to change one chunk.
    """
    if c is not None:
        dC[:, -1].copy_(c)
    return torch.bmm(W, dC.flatten(2)).view(dC.shape)


def write_output_(P: Tensor, q_gated: Tensor | None, C_before: Tensor | None, v: Tensor, h: Tensor) -> None:
    """Write ``q_gated C_before + P v`` into h (G*NC, L, DHHV); v (G, NC, L, DHHV), C_before of `inter_chunk_states`.

    q_gated and C_before are None after `segment_factors_single_chunk`. Computed outside the compiled graph, where
    Inductor would copy the second product to add it to the first.
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
    C_before = columns(W, sources.flatten(2)).view(-1, *c.shape[1:])
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
