"""Log decays between tokens: prefix sums of log forget gates whose differences stay exact, and their maxima."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_LOG_WEIGHT = {torch.float32: -80.0, torch.float64: -700.0}
NEG_INF = float("-inf")
GRID = 256.0  # float32 adds multiples of 1/GRID exactly up to +-65,536


def log_decay_prefixes(fgate: Tensor) -> Tensor:
    """Return the inclusive prefix sums over the last axis of log_f = logsigmoid(fgate), in three planes (3, ...).

    The planes are coarse, fine, and the count of closed gates (log_f = -inf). Differences of plain prefix sums lose a
    decay of 1e-6 after a sum of -1e3. The coarse plane holds multiples of 1/GRID, which float32 adds without rounding;
    closed gates are counted, not added, as -inf - -inf is NaN.
    """
    log_f = F.logsigmoid(fgate)
    closed = log_f == NEG_INF
    log_f = torch.where(closed, 0.0, log_f)
    coarse = torch.round(log_f * GRID) / GRID
    # Stacked after the sums: Inductor materialises a stack, but fuses these three terms into its reduction.
    return torch.stack([prefix(part) for part in (coarse, log_f - coarse, closed.to(log_f.dtype))])


def prefix(terms: Tensor) -> Tensor:
    """Return the inclusive prefix sums over the last axis.

    A scan on CUDA; elsewhere a masked reduction, which fuses while a scan is a separate ATen call.
    """
    if terms.is_cuda:
        return terms.cumsum(-1)
    return torch.where(causal(terms.shape[-1], terms), terms[..., None, :], 0.0).sum(-1)


def across_chunks(within: Tensor) -> Tensor:
    """Return the prefix sums over chunks (3, ..., NC) of their decays.

    within: `log_decay_prefixes` of each chunk, (3, ..., NC, L).

    In float64 on CUDA, where segments are long and the sums exceed the +-65,536 that float32 adds exactly.
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
    if later.is_cuda:  # F.pad would specialise sizes that the compilation keeps dynamic
        before = torch.cat([torch.zeros_like(earlier[..., :1]), earlier.cumsum(-1)[..., :-1]], -1)
        return before + suffix(later)
    ahead = causal(later.shape[-1], later).mT
    return torch.where(ahead, later[..., None, :], earlier[..., None, :]).sum(-1)


def log_decay(after: Tensor, before: Tensor | None = None) -> Tensor:
    """Return the log decay between two positions of `log_decay_prefixes`, -inf if a gate between them is closed."""
    coarse, fine, closed = (after if before is None else after - before).unbind(0)
    return torch.where(closed == 0, coarse + fine, NEG_INF)


def causal(size: int, like: Tensor) -> Tensor:
    """Return the causal mask (size, size): true where column <= row."""
    index = torch.arange(size, device=like.device)
    return index[None, :] <= index[:, None]


def exp_or_zero(log_weight: Tensor) -> Tensor:
    """Return exp(log_weight), and 0 below MIN_LOG_WEIGHT.

    Weights are relative to a largest of 1; denormal ones would make a CPU's matrix products ten times slower.
    """
    return torch.where(log_weight < MIN_LOG_WEIGHT[log_weight.dtype], 0.0, torch.exp(log_weight))


def zero_if_empty(maximum: Tensor) -> Tensor:
    """Replace the maximum of an empty set, -inf, by 0, so that -inf - maximum stays -inf."""
    return torch.where(maximum == NEG_INF, 0.0, maximum)


def constant_if_empty(maximum: Tensor) -> Tensor:
    """Return `maximum`, the state's m, as a constant without gradient where it is -inf: the state is empty."""
    return torch.where(maximum == NEG_INF, NEG_INF, maximum)
