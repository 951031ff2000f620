"""The gradient of an sLSTM block: a loop back through time, and sums over time for R and b."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_xlstm_ops.maths.products import sum_over_terms
from torch_xlstm_ops.maths.shapes import state_dtype
from torch_xlstm_ops.maths.slstm.cell import Product, bmm_in_dtype, one_if_zero, write_, zero_where_reset


def block_backward_(
    dh: Tensor, keep: Tensor, add: Tensor, z: Tensor, o: Tensor, not_f: Tensor,
    c_before: Tensor, n_before: Tensor, c: Tensor, n: Tensor, r: Tensor, *gradients: Tensor,
    floor: float, product: Product,
) -> tuple[()]:
    """Run back through a block: its gradient, linear in dh and in the gradients from after the block.

    dh: (T, B, NH, DH), in the states' dtype; keep, add, z, o, not_f, c, n: of `activate_` and `replay_`; c_before,
    n_before: as c, n but before each step; r: as `weights_backward` lays it out.
    gradients: read, (B, NH, DH): of the gates i f z o of the token after the block, then of c, n, m after the block;
    written: of the gates (T, B, NH, DH), then of c, n, m before the block; last, if rows are reset, the mask
    (T + 1, B), which includes the token after the block.
    """
    gates: Sequence[Tensor] = gradients[:4]
    dc, dn, dm = gradients[4:7]
    reset = gradients[14] if len(gradients) > 14 else None
    for t in reversed(range(dh.shape[0])):
        dy = operand_gradient(gates, r, dh.dtype, product)
        before, after = (c_before[t], n_before[t]), (c[t], n[t])
        if reset is not None:
            dy = zero_where_reset(reset[t + 1], dy)
            before = zero_where_reset(reset[t], before[0]), zero_where_reset(reset[t], before[1])
        factors = keep[t], add[t], z[t], o[t], not_f[t]
        incoming = dh[t] + dy, dc, dn, dm
        found, dc, dn, dm = _cell_backward(incoming, factors, before, after, floor)
        if reset is not None:
            # Zero where no gradient arrives: a document that the loss does not use may hold NaN.
            idle = (incoming[0] == 0) & (incoming[1] == 0) & (incoming[2] == 0) & (incoming[3] == 0)
            found = [torch.where(idle, 0.0, gate) for gate in found]
            dc, dn, dm = (torch.where(idle | reset[t, :, None, None], 0.0, s) for s in (dc, dn, dm))
        gates = [gate.to(gradients[0].dtype) for gate in found]
        write_([into[t] for into in gradients[7:11]], gates)
    return write_(gradients[11:14], (dc, dn, dm))


def operand_gradient(gates: Sequence[Tensor], r: Tensor, wide: torch.dtype, product: Product) -> Tensor:
    """Return the gradient of y (B, NH, DH), in `wide`, from those of the four gates (B, NH, DH), through R y."""
    if product is Product.FUSED:
        terms = [r[gate].to(wide) * gates[gate][:, :, None, :].to(wide) for gate in range(4)]
        return (terms[0] + terms[1] + terms[2] + terms[3]).sum(-1)
    B, NH, DH = gates[0].shape
    return bmm_in_dtype(torch.stack(list(gates), 2).transpose(0, 1).reshape(NH, B, 4 * DH), r, wide).transpose(0, 1)


def weight_gradients(dgates: Tensor, h_before: Tensor) -> tuple[Tensor, Tensor]:
    """Return dr (4, NH, DH, DH) and db (4, NH, DH) from the gates' (4, N, NH, DH) and R's operands (N, NH, DH)."""
    operand = h_before.transpose(0, 1)
    dr = torch.stack([sum_over_terms(gate.permute(1, 2, 0), operand) for gate in dgates])
    return dr, dgates.sum(1, dtype=state_dtype(dgates.dtype))


def _cell_backward(
    grads: tuple[Tensor, Tensor, Tensor, Tensor], factors: Sequence[Tensor], before: tuple[Tensor, Tensor],
    after: tuple[Tensor, Tensor], floor: float,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Return the gradients of the four gates and of c, n, m before the cell, from those of y, c, n, m after it."""
    dy, dc, dn, dm = grads
    keep, add, z, o, not_f = factors
    (c_before, n_before), (c, n) = before, after
    fresh = n_before == 0

    h = o * c / one_if_zero(n)
    dogate = dy * h * (1 - o)
    dc = dc + dy * o / one_if_zero(n)
    dn = dn - torch.where(n == 0, 0.0, dy * h / one_if_zero(n))
    if floor:
        unfloored = keep * n_before + add
        dn = dn * share(unfloored > floor, unfloored == floor)

    # Gradients of the exponents log_f + m - m' and i - m'; the first is clamped at 0 where the cell is empty. The
    # argument of the maximum m' is the one whose exponent is 0 (its factor 1); at a tie both are.
    dcarried = (dc * c_before + dn * n_before) * keep
    digate = (dc * z + dn) * add
    dcarried = torch.where(fresh & (keep == 1), 0.0, dcarried)
    dm = dm - dcarried - digate
    from_carried, from_igate = (keep == 1) & ~fresh, add == 1
    digate = digate + dm * share(from_igate, from_igate & from_carried)
    dcarried = dcarried + dm * share(from_carried, from_igate & from_carried)
    return [digate, dcarried * not_f, dc * add * (1 - z * z), dogate], dc * keep, dn * keep, dcarried


def share(takes: Tensor, tie: Tensor) -> Tensor:
    """Return the share of a maximum's gradient that an argument receives, as in torch.maximum."""
    return torch.where(tie, 0.5, torch.where(takes, 1.0, 0.0))
