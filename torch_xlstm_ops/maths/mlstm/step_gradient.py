"""The gradient of one mLSTM step: used for NaN and infinity, which matrix products would carry to other tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_xlstm_ops.maths.decay import NEG_INF, zero_if_empty
from torch_xlstm_ops.maths.mlstm.recurrence import FLOOR, floor
from torch_xlstm_ops.maths.shapes import state_dtype


def step_gradient(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, c: Tensor, n: Tensor, m: Tensor,
    dh: Tensor, dc: Tensor, dn: Tensor, dm: Tensor, *, eps: float,
) -> tuple[Tensor, ...]:
    """Return the gradients of a step's arguments, equal to autograd's for `recurrence.step`, NaN included.

    Arguments as of `step`, and the gradients of its results. All in the states' dtype.
    """
    wide = state_dtype(q.dtype)
    q, k, v, igate, fgate, dh = (t.to(wide) for t in (q, k, v, igate, fgate, dh))
    closed = fgate == NEG_INF
    c, n = torch.where(closed[..., None], 0.0, c), torch.where(closed, 0.0, n)
    carried = torch.where(closed, NEG_INF, F.logsigmoid(fgate) + m)
    m_new = torch.maximum(carried, igate)
    base = zero_if_empty(m_new)
    forget, add = torch.exp(carried - base), torch.exp(igate - base)
    scale = q.shape[-1] ** -0.5
    q_scaled, k_gated = q * scale, add * k
    c_new = forget[..., None] * c + k_gated[..., None] * v[..., None, :]
    n_new = forget * n + k_gated

    read, total = (q_scaled[..., None] * c_new).sum(-2), (q_scaled * n_new).sum(-1, keepdim=True)
    low = floor(m_new)
    denominator = torch.maximum(total.abs(), low) + eps
    dread = dh / denominator
    ddenominator = -(dread * read).sum(-1, keepdim=True) / denominator
    to_total, to_low = _shares(total.abs(), low)
    dtotal = torch.where(to_total > 0, to_total * ddenominator * total.sign(), 0.0)
    dlow = torch.where((to_low > 0) & (-m_new <= FLOOR[wide]), -to_low * ddenominator * low, 0.0)

    dq = scale * ((c_new * dread[..., None, :]).sum(-1) + n_new * dtotal)
    dc, dn = dc + q_scaled[..., None] * dread[..., None, :], dn + q_scaled * dtotal
    dk_gated = (dc * v[..., None, :]).sum(-1) + dn
    dforget = forget * ((dc * c).sum((-2, -1), keepdim=True)[..., 0] + (dn * n).sum(-1, keepdim=True))
    dadd = add * (dk_gated * k).sum(-1, keepdim=True)
    dm = torch.where(m_new == NEG_INF, 0.0, dm + dlow - dforget - dadd)
    to_carried, to_igate = _shares(carried, igate)
    dcarried = dforget + torch.where(to_carried > 0, to_carried * dm, 0.0)
    digate = dadd + torch.where(to_igate > 0, to_igate * dm, 0.0)
    return (
        dq, add * dk_gated, (k_gated[..., None] * dc).sum(-2), digate,
        torch.where(closed, 0.0, dcarried) * torch.sigmoid(-fgate),
        torch.where(closed[..., None], 0.0, forget[..., None] * dc), torch.where(closed, 0.0, forget * dn),
        torch.where(closed, 0.0, dcarried),
    )


def _shares(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return the shares of a maximum's gradient that its arguments receive, as in torch.maximum: NaN gets all."""
    tie = left == right
    to_left, to_right = (~less for less in (left < right, right < left))
    return torch.where(tie, 0.5, to_left.to(left.dtype)), torch.where(tie, 0.5, to_right.to(left.dtype))
