"""The sLSTM cell: one step, the recurrence over a sequence, and the parts of a step that other functions share."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_xlstm_ops.maths.decay import NEG_INF
from torch_xlstm_ops.maths.shapes import state_dtype


class Product(str, Enum):
    """How a block multiplies by R, and so the layout of R (`weights`, `weights_backward`)."""

    MATMUL = "matmul"  # one batched product a step, (NH, DH_in, 4 DH_out)
    FUSED = "fused"  # sums that fuse with the cell into one kernel a step, (4, NH, DH_out, DH_in)


def step(
    x: Tensor, r: Tensor, b: Tensor, y: Tensor, c: Tensor, n: Tensor, m: Tensor, *, floor: float, product: Product
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Advance the recurrence by one token.

        m' = i where n == 0 else max(i, log_f + m)                              y' = sigmoid(o) c' / n'
        c' = exp(log_f + m - m') c + exp(i - m') tanh(z)                        n' likewise with 1, at least `floor`

    x: (B, 4, NH, DH); r: as `weights` lays it out; b: (4, NH, DH); y, c, n, m: (B, NH, DH). Returns y, c, n, m.
    """
    wide = state_dtype(x.dtype)
    igate, fgate, zgate, ogate = preactivations(x, b, recurrent_product(y.to(x.dtype), r, wide, product), wide)
    keep, add, m = gate_factors(igate, F.logsigmoid(fgate), n, m)
    c, n = accumulate(keep, add, torch.tanh(zgate), c, n, floor)
    return torch.sigmoid(ogate) * c / one_if_zero(n), c, n, m


def recurrent(
    x: Tensor, r: Tensor, b: Tensor, y: Tensor, c: Tensor, n: Tensor, m: Tensor, reset: Tensor | None = None,
    *, floor: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run `step` over the S tokens of x (B, S, 4, NH, DH): the reference that every other form must equal.

    r: (4, NH, DH, DH) [gate, head, out, in]; reset: (B, S), true where a row starts from the zero state at a token.
    Returns h (B, S, NH, DH) in x's dtype and y, c, n, m.
    """
    h = []
    for t in range(x.shape[1]):
        if reset is not None:
            y, c, n, m = (zero_where_reset(reset[:, t], s) for s in (y, c, n, m))
        y, c, n, m = step(x[:, t], r, b, y, c, n, m, floor=floor, product=Product.FUSED)
        h.append(y.to(x.dtype))
    return torch.stack(h, 1) if h else torch.empty_like(x[:, :, 0]), y, c, n, m


def preactivations(x: Tensor, b: Tensor, products: Sequence[Tensor], wide: torch.dtype) -> list[Tensor]:
    """Return ``x + R y + b`` for each gate; products: R y, four (B, NH, DH)."""
    return [x[:, gate].to(wide) + b[gate].to(wide) + products[gate] for gate in range(4)]


def gate_factors(igate: Tensor, log_f: Tensor, n: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the factors of the old state and of the new token, both at most 1, and m after the step."""
    carried = log_f + m
    m = torch.where(n == 0, igate, torch.maximum(igate, carried))
    m = torch.where(m == NEG_INF, 0.0, m)  # nothing kept, nothing added: -inf - -inf would be NaN
    return torch.exp((carried - m).clamp(max=0)), torch.exp(igate - m), m


def accumulate(keep: Tensor, add: Tensor, z: Tensor, c: Tensor, n: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Return c and n after the step; n is at least `floor`."""
    c, n = keep * c + add * z, keep * n + add
    return c, torch.maximum(n, torch.full_like(n, floor)) if floor else n


def recurrent_product(y: Tensor, r: Tensor, wide: torch.dtype, product: Product) -> Sequence[Tensor]:
    """Return R y for each gate: four (B, NH, DH)."""
    if product is Product.FUSED:
        return [(r[gate].to(wide) * y.to(wide)[:, :, None, :]).sum(-1) for gate in range(4)]
    B, NH, DH = y.shape
    return bmm_in_dtype(y.transpose(0, 1), r, wide).view(NH, B, 4, DH).permute(2, 1, 0, 3).unbind(0)


def bmm_in_dtype(left: Tensor, r: Tensor, wide: torch.dtype) -> Tensor:
    """Return ``left @ r``, multiplied in r's dtype and accumulated in `wide`."""
    left = left.to(r.dtype)
    return torch.bmm(left, r) if r.dtype == wide else torch.bmm(left, r, out_dtype=wide)


def one_if_zero(n: Tensor) -> Tensor:
    """Replace the normaliser 0 of an empty cell by 1, so that its output is 0."""
    return torch.where(n == 0, 1.0, n)


def zero_where_reset(reset: Tensor, state: Tensor) -> Tensor:
    """Return the state (B, NH, DH), zero in the rows where reset (B) is true."""
    return torch.where(reset[:, None, None], 0.0, state)


def write_(into: Sequence[Tensor], values: Sequence[Tensor]) -> tuple[()]:
    """Copy each value into its target."""
    for target, value in zip(into, values, strict=True):
        target.copy_(value)
    return ()
