"""The mLSTM step, and the recurrence: the reference for every other form."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_xlstm_ops.maths.decay import NEG_INF, constant_if_empty, zero_if_empty
from torch_xlstm_ops.maths.shapes import state_dtype

COLUMN = 128  # tokens of a chunk, or rows of a large c, that one CUDA reduction sums
LARGE = 1 << 23  # elements of c that exceed the cache of a GPU
FLOOR = {torch.float32: 80.0, torch.float64: 700.0}  # the largest exponent in `floor`


def step(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, c: Tensor, n: Tensor, m: Tensor, *, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Advance the recurrence by one token.

        m' = max(log_f + m, igate)
        c' = exp(log_f + m - m') c + exp(igate - m') k v^T          n' likewise with k
        h  = (q DHQK^-1/2 . c') / (max(|q DHQK^-1/2 . n'|, exp(-m')) + eps)

    q, k: (..., DHQK); v: (..., DHHV); igate, fgate: (..., 1); c: (..., DHQK, DHHV); n: (..., DHQK); m: (..., 1).
    m and the gates may be -inf: a state with m = -inf is empty. A closed gate (log_f = -inf) makes the old state empty,
    even if it holds NaN. If nothing is kept and nothing added, the new state is empty: c = n = 0, m = -inf.
    Returns h in v's dtype and the new c, n, m.
    """
    return _step(_update, q, k, v, igate, fgate, c, n, m, eps)


def advance(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, c: Tensor, n: Tensor, m: Tensor, *, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute a `step` in the form to be compiled; on CUDA a large c comes in parts (..., DHQK/COLUMN, COLUMN, DHHV).

    A reduction kernel holds whole columns; with shorter ones it handles more adjacent columns and reads memory in
    longer runs. The parts are one block of memory, but joining them within the graph would write c twice.
    """
    return _step(_update_parts if _comes_in_parts(c) else _update, q, k, v, igate, fgate, c, n, m, eps)


_Update = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _step(
    update: _Update, q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, c: Tensor, n: Tensor, m: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = state_dtype(q.dtype)
    fgate, igate = fgate.to(wide), igate.to(wide)
    closed = fgate == NEG_INF
    c, n = torch.where(closed[..., None], 0.0, c), torch.where(closed, 0.0, n)
    carried = torch.where(closed, NEG_INF, F.logsigmoid(fgate) + m)
    m_new = constant_if_empty(torch.maximum(carried, igate))
    base = zero_if_empty(m_new)
    forget, add = torch.exp(carried - base), torch.exp(igate - base)
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
    """Like `_update`, with c in parts."""
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
    """Compute a `step`, write the new state over c, n, m, and return h."""
    h, *new = advance(q, k, v, igate, fgate, c, n, m, eps=eps)
    write_state_((c, n, m), new)
    return (h,)


def write_state_(state: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    """Write a new state, of `step` or `advance`, over c, n, m (B, NH, ...), in the form to be compiled."""
    (c, n, m), (c_new, n_new, m_new) = state, new
    if c.device.type != "cpu":
        c, c_new = (_in_parts(c) if c_new.dim() > c.dim() else c).mT, c_new.mT  # in the layout in which it is computed
        # As a reduction, m is stored by the kernel that updates n after all its threads have read the old m.
        m_new = m_new.expand_as(n).amax(-1, keepdim=True)
    for old, value in zip((c, n, m), (c_new, n_new, m_new), strict=True):
        old.copy_(value)


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, c: Tensor, n: Tensor, m: Tensor, *, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run `step` over the S tokens of a sequence (..., S, D): the reference that every other form must equal."""
    h = []
    for t in range(q.shape[-2]):
        gates = igate[..., t, None], fgate[..., t, None]
        h_t, c, n, m = step(q[..., t, :], k[..., t, :], v[..., t, :], *gates, c, n, m, eps=eps)
        h.append(h_t)
    return torch.stack(h, -2) if h else torch.empty_like(v), c, n, m


def floor(m: Tensor) -> Tensor:
    """Return exp(-m), clamped to be finite: 1/denominator is then almost 0, and its gradient not 0 * inf."""
    return torch.exp((-m).clamp(max=FLOOR[m.dtype]))
