"""The inter-chunk level: the summary of each chunk, and the weights of summaries in the states before later chunks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops.maths.decay import NEG_INF, constant_if_empty, exp_or_zero, log_decay, zero_if_empty
from torch_xlstm_ops.maths.mlstm.recurrence import COLUMN


class Summaries(NamedTuple):
    """The monoid elements of the chunks of a segment, without their decay F."""

    M: Tensor  # (G, NC)
    dC: Tensor  # (G, NC, DHQK, DHHV)
    dn: Tensor  # (G, NC, DHQK)


def summaries(
    k: Tensor, v: Tensor, igate: Tensor, within: Tensor, least: Tensor | None = None
) -> tuple[Summaries, Tensor, Tensor]:
    """Summarise each chunk, with weights relative to its largest, M; within: `log_decay_prefixes` of its tokens.

    least: (G, NC), a lower bound of M. Returns the summaries, the weights (G, NC, L), and k_gated (G, NC, DHQK, L).
    """
    gate, M = _input_weights(igate, within, least)
    k_gated, dn = _gated(k, gate)
    dC = torch.bmm(k_gated.flatten(0, 1), v.to(k_gated.dtype).flatten(0, 1))
    return Summaries(M, dC.view(*k_gated.shape[:3], v.shape[-1]), dn), gate, k_gated


def _gated(k: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Return k times the gate, transposed (G, NC, DHQK, L), in the dtype of products, and its sum over the tokens."""
    product = product_dtype(k.dtype)
    if k.device.type != "mps":
        k_gated = k.to(gate.dtype) * gate[..., None]
        return k_gated.to(product).mT, sum_tokens(k_gated)
    # In Metal, Inductor stores and sums k_gated in one kernel only along the last axis. Without contiguous() it would
    # copy k_gated where it is returned.
    k_gated = k.to(gate.dtype).mT * gate[..., None, :]
    return k_gated.to(product).contiguous(), k_gated.sum(-1)


def sum_tokens(terms: Tensor) -> Tensor:
    """Return the sum over the tokens of each chunk, (..., L, D) -> (..., D).

    On CUDA in parts of COLUMN tokens, for the reason given at `advance`.
    """
    if terms.is_cuda and terms.shape[-2] > COLUMN and terms.shape[-2] % COLUMN == 0:
        terms = torch.unflatten(terms, -2, (-1, COLUMN)).sum(-2)
    return terms.sum(-2)


def _input_weights(igate: Tensor, within: Tensor, least: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the weight of each token in its chunk's summary (G, NC, L), relative to the largest, and M (G, NC)."""
    log_weight = log_decay(within[..., -1:], within) + igate
    M = log_weight.amax(-1)
    if least is not None:
        M = torch.maximum(M, least)
    return exp_or_zero(log_weight - zero_if_empty(M)[..., None]), M


class InterChunkWeights(NamedTuple):
    """Weights of the chunk summaries and of the segment's incoming state in the state before each chunk."""

    W: Tensor  # (G, NC, NC), strictly lower triangular
    w_state: Tensor  # (G, NC)
    m_before: Tensor  # (G, NC), the log of the largest
    from_chunk: Tensor  # (G, NC, NC), log weights
    from_state: Tensor  # (G, NC), log weights

    def with_state(self) -> Tensor:
        """Return W with w_state in the last column, which is unused: no chunk follows the last."""
        chunk = torch.arange(self.W.shape[-1], device=self.W.device)
        return torch.where(chunk == self.W.shape[-1] - 1, self.w_state[..., None], self.W)


def inter_chunk_weights(F_: Tensor, across: Tensor, M: Tensor, m: Tensor) -> InterChunkWeights:
    """Return the inter-chunk weights; F_: the chunks' decays (3, G, NC); across: of `across_chunks`."""
    chunk = torch.arange(M.shape[-1], device=M.device)
    before = across - F_
    from_state = log_decay(before).to(M.dtype) + m
    from_chunk = log_decay(before[..., :, None], across[..., None, :]).to(M.dtype) + M[..., None, :]
    from_chunk = torch.where(chunk[None, :] < chunk[:, None], from_chunk, NEG_INF)
    m_before = torch.maximum(from_chunk.amax(-1), from_state)
    base = zero_if_empty(m_before)
    W = exp_or_zero(from_chunk - base[..., None])
    return InterChunkWeights(W, exp_or_zero(from_state - base), m_before, from_chunk, from_state)


def n_before_chunks(inter: InterChunkWeights, dn: Tensor, n: Tensor) -> Tensor:
    """Return n before each chunk, (G, NC, DHQK)."""
    return torch.bmm(inter.W, dn) + inter.w_state[..., None] * n[:, None]


def reduce_chunks(across: Tensor, M: Tensor, dC: Tensor, dn: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compose the monoid elements of the chunks of a segment into one."""
    from_chunk = log_decay(across[..., -1:], across).to(M.dtype) + M
    M_all = from_chunk.amax(-1, keepdim=True)
    share = exp_or_zero(from_chunk - zero_if_empty(M_all))
    dC_all = (share[..., None, None] * dC.to(M.dtype)).sum(1)
    return log_decay(across[..., -1:]).to(M.dtype), M_all, dC_all, (share[..., None] * dn).sum(1)


def absorb(
    F_: Tensor, M: Tensor, dC: Tensor, dn: Tensor, c: Tensor, n: Tensor, m: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the state after a segment from its monoid element and the state before it.

        m' = max(F + m, M)      c' = exp(F + m - m') c + exp(M - m') dC          n' likewise
    """
    m_new = constant_if_empty(torch.maximum(F_ + m, M))
    base = zero_if_empty(m_new)
    keep, add = exp_or_zero(F_ + m - base), exp_or_zero(M - base)
    return keep[..., None] * c + add[..., None] * dC, keep * n + add * dn, m_new


def combine(
    first: tuple[Tensor, Tensor, Tensor, Tensor], second: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compose the monoid elements of two segments, `first` before `second` in time; exactly associative."""
    (F_first, M, dC, dn), (F_second, M_second, dC_second, dn_second) = first, second
    M_new = torch.maximum(F_second + M, M_second)
    base = zero_if_empty(M_new)
    keep, add = torch.exp(F_second + M - base), torch.exp(M_second - base)
    dC_new = keep[..., None] * dC + add[..., None] * dC_second
    return F_first + F_second, M_new, dC_new, keep * dn + add * dn_second


def product_dtype(stream: torch.dtype) -> torch.dtype:
    """Return the dtype for products with states: the range of float16 is too small for sums over a segment."""
    return torch.float32 if stream == torch.float16 else stream
