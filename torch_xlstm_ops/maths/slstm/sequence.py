"""The sLSTM over a block of T steps: the forward loop, the layout of R, and the replay for the backward pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_xlstm_ops.maths.products import accepts_product
from torch_xlstm_ops.maths.shapes import state_dtype
from torch_xlstm_ops.maths.slstm.cell import (
    Product,
    accumulate,
    bmm_in_dtype,
    gate_factors,
    preactivations,
    step,
    write_,
    zero_where_reset,
)


def block_(
    x: Tensor, r: Tensor, b: Tensor, h_before: Tensor, c: Tensor, n: Tensor, m: Tensor,
    h: Tensor, y_after: Tensor, c_after: Tensor, n_after: Tensor, m_after: Tensor, reset: Tensor | None = None,
    *, floor: float, product: Product,
) -> tuple[()]:
    """Run the T steps of a block, unrolled; write h (T, B, NH, DH) and the state after the block.

    x: (T, B, 4, NH, DH); h_before: y in x's dtype, the operand of R; reset: (T, B).
    """
    y = h_before
    for t in range(x.shape[0]):
        if reset is not None:
            y, c, n, m = (zero_where_reset(reset[t], s) for s in (y, c, n, m))
        y, c, n, m = step(x[t], r, b, y, c, n, m, floor=floor, product=product)
        h[t].copy_(y)
    return write_((y_after, c_after, n_after, m_after), (y, c, n, m))


def weights(r: Tensor, product: Product, dtype: torch.dtype) -> Tensor:
    """Lay out r (4, NH, DH_out, DH_in) for `block_`, in the dtype of the product."""
    if product is Product.FUSED:
        return r.to(dtype).contiguous()
    _, NH, DH, _ = r.shape
    return r.to(dtype).permute(1, 3, 0, 2).reshape(NH, DH, 4 * DH).contiguous()


def weights_backward(r: Tensor, product: Product, dtype: torch.dtype) -> Tensor:
    """Lay out r (4, NH, DH_out, DH_in) for `block_backward_`."""
    if product is Product.FUSED:
        return r.to(dtype).mT.contiguous()
    _, NH, DH, _ = r.shape
    return r.to(dtype).transpose(0, 1).reshape(NH, 4 * DH, DH).contiguous()


def recurrent_products(h_before: Tensor, r: Tensor) -> Tensor:
    """Return R h (N, NH, 4, DH), in the states' dtype, of all tokens at once; h_before: (N, NH, DH)."""
    N, NH, DH = h_before.shape
    packed, wide = weights(r, Product.MATMUL, r.dtype), state_dtype(r.dtype)
    operand = h_before.to(r.dtype).transpose(0, 1)
    out = torch.empty(N, NH, 4 * DH, dtype=wide, device=r.device)
    into = out.transpose(0, 1)
    if r.dtype == wide and accepts_product(into):
        torch.bmm(operand, packed, out=into)
    else:
        into.copy_(bmm_in_dtype(operand, packed, wide))
    return out.view(N, NH, 4, DH)


def activate_(
    x: Tensor, products: Tensor, b: Tensor, log_f: Tensor, igate: Tensor, z: Tensor, o: Tensor, not_f: Tensor,
) -> tuple[()]:
    """Compute the gates of all tokens from their recurrent products; no state is needed.

    x: (N, 4, NH, DH); products: (N, NH, 4, DH). Writes log_f, the input gate's
    pre-activation, tanh(z), sigmoid(o) and sigmoid(-f), each (N, NH, DH).
    """
    gates = preactivations(x, b, products.unbind(2), state_dtype(x.dtype))
    found = F.logsigmoid(gates[1]), gates[0], torch.tanh(gates[2]), torch.sigmoid(gates[3]), torch.sigmoid(-gates[1])
    return write_((log_f, igate, z, o, not_f), found)


def replay_(
    log_f: Tensor, igate: Tensor, z: Tensor, c_before: Tensor, n_before: Tensor, m: Tensor, c: Tensor, n: Tensor,
    reset: Tensor | None = None, *, floor: float,
) -> tuple[()]:
    """Recompute the cell states of a block and write the factors that the gradient needs.

    log_f, igate, z: (T, B, NH, DH), of `activate_`; the first two are overwritten by keep and add, the factors of the
    old state and of the token. m: (B, NH, DH), updated. c, n: (T, B, NH, DH), receive the state after each step.
    reset: (T, B).
    """
    state = c_before, n_before, m
    for t in range(z.shape[0]):
        c_last, n_last, m_last = state if reset is None else (zero_where_reset(reset[t], s) for s in state)
        keep, add, m_new = gate_factors(igate[t], log_f[t], n_last, m_last)
        c_new, n_new = accumulate(keep, add, z[t], c_last, n_last, floor)
        write_([into[t] for into in (log_f, igate, c, n)], (keep, add, c_new, n_new))
        state = c_new, n_new, m_new
    return write_((m,), state[2:])
