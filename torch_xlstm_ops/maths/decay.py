"""Log decays between tokens: prefix sums of log forget gates whose differences stay exact, and their maxima."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST = {torch.float32: -80.0, torch.float64: -700.0}  # the logarithm of the least weight
NEG_INF = float("-inf")
GRID = 256.0  # multiples of 1/GRID add up exactly in float32 to +-65,536


def log_decay_prefixes(fgate: Tensor) -> Tensor:
    """Return the inclusive prefix sums over the last axis of log_f = logsigmoid(fgate), in three planes (3, ...).

    The planes are coarse, fine, and the count of closed gates (log_f = -inf). Differences of plain prefix sums lose a
    decay of 1e-6 behind a sum of -1e3. The coarse plane holds multiples of 1/GRID, which float32 adds without rounding;
    a closed gate is counted, not added, as -inf - -inf is no number.
    """
    log_f = F.logsigmoid(fgate)
    closed = log_f == NEG_INF
    log_f = torch.where(closed, 0.0, log_f)
    coarse = torch.round(log_f * GRID) / GRID
    # Stacked after the sums: Inductor writes a stack out, and computes these three inside its reduction.
    return torch.stack([prefix(part) for part in (coarse, log_f - coarse, closed.to(log_f.dtype))])


def prefix(terms: Tensor) -> Tensor:
    """Return the inclusive prefix sums over the last axis.

    On CUDA by a scan; elsewhere, where a scan is a call of its own, as a masked reduction, which fuses.
    """
    if terms.is_cuda:
        return terms.cumsum(-1)
    return torch.where(causal(terms.shape[-1], terms), terms[..., None, :], 0.0).sum(-1)


def across_chunks(within: Tensor) -> Tensor:
    """Return the prefix sums over chunks (3, ..., NC) of their decays.

    within: `log_decay_prefixes` of each chunk, (3, ..., NC, L).

    In float64 on CUDA, where a segment is long: beyond +-65,536 float32 would round them.
    """
    ends = within[..., -1]
    return prefix(ends.double() if ends.is_cuda else ends)


def suffix(terms: Tensor) -> Tensor:
    """Return the inclusive sums over the last axis from each element on."""
    if terms.is_cuda:
        return terms.flip(-1).cumsum(-1).flip(-1)
    return torch.where(causal(terms.shape[-1], terms).mT, terms[..., None, :], 0.0).sum(-1)


def prefix_and_suffix(earlier: Tensor, later: Tensor) -> Tensor:
    """Return, for each element of the last axis, the sum of `earlier` before it and of `later` from it on."""
    if later.is_cuda:  # F.pad would fix the sizes that a compile leaves free
        before = torch.cat([torch.zeros_like(earlier[..., :1]), earlier.cumsum(-1)[..., :-1]], -1)
        return before + suffix(later)
    ahead = causal(later.shape[-1], later).mT
    return torch.where(ahead, later[..., None, :], earlier[..., None, :]).sum(-1)


def log_decay(after: Tensor, before: Tensor | None = None) -> Tensor:
    """Return the log decay between two of `log_decay_prefixes`, -inf where a closed gate lies between them."""
    coarse, fine, closed = (after if before is None else after - before).unbind(0)
    return torch.where(closed == 0, coarse + fine, NEG_INF)


def causal(size: int, like: Tensor) -> Tensor:
    """Return the mask (size, size) of what a token sees: itself and what came before."""
    index = torch.arange(size, device=like.device)
    return index[None, :] <= index[:, None]


def exp_or_zero(log_weight: Tensor) -> Tensor:
    """Return exp(log_weight), relative to a largest of 1, and 0 where it is next to nothing.

    There numbers are denormal, with which a CPU's products take ten times as long.
    """
    return torch.where(log_weight < LEAST[log_weight.dtype], 0.0, torch.exp(log_weight))


def zero_if_empty(maximum: Tensor) -> Tensor:
    """Replace the maximum of nothing, -inf, by 0, so that -inf - maximum stays -inf."""
    return torch.where(maximum == NEG_INF, 0.0, maximum)


def constant_if_empty(maximum: Tensor) -> Tensor:
    """Return `maximum`, the state's m, with no gradient where it is the maximum of nothing, -inf."""
    return torch.where(maximum == NEG_INF, NEG_INF, maximum)
