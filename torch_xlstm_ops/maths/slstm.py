"""sLSTM mathematics: the step, a block of steps and its gradient, and the recurrent oracle.

Gates are pre-activations in the order i f z o: ``g = x_t + R y + b`` per head. A state (y, c, n, m) stands for
``c * exp(m)``, ``n * exp(m)``; where n is 0 the cell is fresh and m means nothing. Inside a block time leads:
x (T, B, 4, NH, DH). Source: Beck et al. 2024, "xLSTM" (sLSTM, stabilised form).

The backward pass knows y (it is h), so it finds every R y with one large product over time (`recurrent_products`), what
they do to the cells, all at once (`activate_`) and then step by step (`replay_`), and runs back through time without an
exponential (`block_backward_`); the gradients of R and b are again sums over time (`weight_gradients`).

A function whose name ends in _ writes its results into its arguments; those are what is compiled (`axes`). None writes
over what a product reads or follows: in a kernel that reduces, other threads may still be reading it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_xlstm_ops.maths.shapes import state_dtype

NEG_INF = float("-inf")


class Product(str, Enum):
    """How a block multiplies by R, and the layout of R that this wants (`weights`, `weights_backward`)."""

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
    igate, fgate, zgate, ogate = _preactivations(x, b, _recur(y.to(x.dtype), r, wide, product), wide)
    keep, add, m = _weigh(igate, F.logsigmoid(fgate), n, m)
    c, n = _accumulate(keep, add, torch.tanh(zgate), c, n, floor)
    return torch.sigmoid(ogate) * c / _nonzero(n), c, n, m


def recurrent(
    x: Tensor, r: Tensor, b: Tensor, y: Tensor, c: Tensor, n: Tensor, m: Tensor, reset: Tensor | None = None,
    *, floor: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run `step` over the S tokens of x (B, S, 4, NH, DH): the definition that everything else must equal.

    r: (4, NH, DH, DH) [gate, head, out, in]; reset: (B, S), true where a row starts afresh at a token.
    Returns h (B, S, NH, DH) in x's dtype and y, c, n, m.
    """
    h = []
    for t in range(x.shape[1]):
        if reset is not None:
            y, c, n, m = (_unless(reset[:, t], s) for s in (y, c, n, m))
        y, c, n, m = step(x[:, t], r, b, y, c, n, m, floor=floor, product=Product.FUSED)
        h.append(y.to(x.dtype))
    return torch.stack(h, 1) if h else torch.empty_like(x[:, :, 0]), y, c, n, m


def block_(
    x: Tensor, r: Tensor, b: Tensor, h_before: Tensor, c: Tensor, n: Tensor, m: Tensor,
    h: Tensor, y_after: Tensor, c_after: Tensor, n_after: Tensor, m_after: Tensor, reset: Tensor | None = None,
    *, floor: float, product: Product,
) -> tuple[()]:
    """Run the T steps of a block, unrolled, into h (T, B, NH, DH) and the state after it.

    x: (T, B, 4, NH, DH); h_before: y in x's dtype, which is all that R sees of it; reset: (T, B).
    """
    y = h_before
    for t in range(x.shape[0]):
        if reset is not None:
            y, c, n, m = (_unless(reset[t], s) for s in (y, c, n, m))
        y, c, n, m = step(x[t], r, b, y, c, n, m, floor=floor, product=product)
        h[t].copy_(y)
    return _write((y_after, c_after, n_after, m_after), (y, c, n, m))


def weights(r: Tensor, product: Product, dtype: torch.dtype) -> Tensor:
    """Lay out r (4, NH, DH_out, DH_in) for `block_`, in the dtype that the product reads."""
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
    """Return R h for every token at once. h_before: (N, NH, DH); r: (4, NH, DH, DH). Returns (N, NH, 4, DH), wide."""
    N, NH, DH = h_before.shape
    packed, wide = weights(r, Product.MATMUL, r.dtype), state_dtype(r.dtype)
    operand = h_before.to(r.dtype).transpose(0, 1)
    out = torch.empty(N, NH, 4 * DH, dtype=wide, device=r.device)
    if r.dtype == wide:
        torch.bmm(operand, packed, out=out.transpose(0, 1))
    else:
        out.transpose(0, 1).copy_(_bmm(operand, packed, wide))
    return out.view(N, NH, 4, DH)


def activate_(
    x: Tensor, products: Tensor, b: Tensor, log_f: Tensor, igate: Tensor, z: Tensor, o: Tensor, not_f: Tensor,
) -> tuple[()]:
    """Find what tokens do to their cells, whose recurrent products are known: all of it that needs no state.

    x: (N, 4, NH, DH); products: (N, NH, 4, DH). Writes the logarithm of the forget gate, the input gate, tanh(z),
    sigmoid(o) and sigmoid(-f), (N, NH, DH).
    """
    gates = _preactivations(x, b, products.unbind(2), state_dtype(x.dtype))
    found = F.logsigmoid(gates[1]), gates[0], torch.tanh(gates[2]), torch.sigmoid(gates[3]), torch.sigmoid(-gates[1])
    return _write((log_f, igate, z, o, not_f), found)


def replay_(
    log_f: Tensor, igate: Tensor, z: Tensor, c_before: Tensor, n_before: Tensor, m: Tensor, c: Tensor, n: Tensor,
    reset: Tensor | None = None, *, floor: float,
) -> tuple[()]:
    """Repeat the cells of a block of tokens, and write down what the gradient needs.

    log_f, igate, z: (T, B, NH, DH), of `activate_`; the first two become keep and add, the factors of the old state and
    of the token. m: (B, NH, DH), updated. c, n: (T, B, NH, DH), to hold the state after each step. reset: (T, B).
    """
    state = c_before, n_before, m
    for t in range(z.shape[0]):
        c_last, n_last, m_last = state if reset is None else (_unless(reset[t], s) for s in state)
        keep, add, m_new = _weigh(igate[t], log_f[t], n_last, m_last)
        c_new, n_new = _accumulate(keep, add, z[t], c_last, n_last, floor)
        _write([into[t] for into in (log_f, igate, c, n)], (keep, add, c_new, n_new))
        state = c_new, n_new, m_new
    return _write((m,), state[2:])


def block_backward_(
    dh: Tensor, keep: Tensor, add: Tensor, z: Tensor, o: Tensor, not_f: Tensor,
    c_before: Tensor, n_before: Tensor, c: Tensor, n: Tensor, r: Tensor, *gradients: Tensor,
    floor: float, product: Product,
) -> tuple[()]:
    """Run back through a block: its gradient, linear in dh and in those that come from after it.

    dh: (T, B, NH, DH), wide; keep, add, z, o, not_f, c, n: as `activate_` and `replay_` write them; c_before, n_before:
    as c, n but before each step; r: as `weights_backward` lays it out.
    gradients: of the token after the block, its gates i f z o, then c, n, m after the block, (B, NH, DH); to hold what
    is found, the gates' (T, B, NH, DH), then those of c, n, m before the block; and last, if a row is ever reset,
    the mask (T + 1, B), that token's too.
    """
    gates: Sequence[Tensor] = gradients[:4]
    dc, dn, dm = gradients[4:7]
    reset = gradients[14] if len(gradients) > 14 else None
    for t in reversed(range(dh.shape[0])):
        dy = operand_gradient(gates, r, dh.dtype, product)
        before, after = (c_before[t], n_before[t]), (c[t], n[t])
        if reset is not None:
            dy = _unless(reset[t + 1], dy)
            before = _unless(reset[t], before[0]), _unless(reset[t], before[1])
        factors = keep[t], add[t], z[t], o[t], not_f[t]
        wanted = dh[t] + dy, dc, dn, dm
        found, dc, dn, dm = _cell_backward(wanted, factors, before, after, floor)
        if reset is not None:
            # What nobody asks for is 0: a document that the loss does not look at may hold NaN.
            idle = (wanted[0] == 0) & (wanted[1] == 0) & (wanted[2] == 0) & (wanted[3] == 0)
            found = [torch.where(idle, 0.0, gate) for gate in found]
            dc, dn, dm = (torch.where(idle | reset[t, :, None, None], 0.0, s) for s in (dc, dn, dm))
        gates = [gate.to(gradients[0].dtype) for gate in found]
        _write([into[t] for into in gradients[7:11]], gates)
    return _write(gradients[11:14], (dc, dn, dm))


def operand_gradient(gates: Sequence[Tensor], r: Tensor, wide: torch.dtype, product: Product) -> Tensor:
    """Return the gradient of y (B, NH, DH), wide, from those of the four gates (B, NH, DH), through R y."""
    if product is Product.FUSED:
        terms = [r[gate].to(wide) * gates[gate][:, :, None, :].to(wide) for gate in range(4)]
        return (terms[0] + terms[1] + terms[2] + terms[3]).sum(-1)
    B, NH, DH = gates[0].shape
    return _bmm(torch.stack(list(gates), 2).transpose(0, 1).reshape(NH, B, 4 * DH), r, wide).transpose(0, 1)


def weight_gradients(dgates: Tensor, h_before: Tensor) -> tuple[Tensor, Tensor]:
    """Return dr (4, NH, DH, DH) and db (4, NH, DH) from the gates' (4, N, NH, DH) and R's operands (N, NH, DH)."""
    operand = h_before.transpose(0, 1)
    dr = torch.stack([torch.bmm(gate.permute(1, 2, 0), operand) for gate in dgates])
    return dr, dgates.sum(1, dtype=state_dtype(dgates.dtype))


def _preactivations(x: Tensor, b: Tensor, products: Sequence[Tensor], wide: torch.dtype) -> list[Tensor]:
    return [x[:, gate].to(wide) + b[gate].to(wide) + products[gate] for gate in range(4)]


def _weigh(igate: Tensor, log_f: Tensor, n: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the factors of the old state and of the new token, neither above 1, and the stabiliser after the step."""
    carried = log_f + m
    m = torch.where(n == 0, igate, torch.maximum(igate, carried))
    m = torch.where(m == NEG_INF, 0.0, m)  # nothing kept, nothing added: the cell is fresh, and -inf - -inf no number
    return torch.exp((carried - m).clamp(max=0)), torch.exp(igate - m), m


def _accumulate(keep: Tensor, add: Tensor, z: Tensor, c: Tensor, n: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    c, n = keep * c + add * z, keep * n + add
    return c, torch.maximum(n, torch.full_like(n, floor)) if floor else n


def _cell_backward(
    grads: tuple[Tensor, Tensor, Tensor, Tensor], factors: Sequence[Tensor], before: tuple[Tensor, Tensor],
    after: tuple[Tensor, Tensor], floor: float,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Return the gradients of the four gates and of c, n, m before the cell, from those of y, c, n, m after it."""
    dy, dc, dn, dm = grads
    keep, add, z, o, not_f = factors
    (c_before, n_before), (c, n) = before, after
    fresh = n_before == 0

    h = o * c / _nonzero(n)
    dogate = dy * h * (1 - o)
    dc = dc + dy * o / _nonzero(n)
    dn = dn - torch.where(n == 0, 0.0, dy * h / _nonzero(n))
    if floor:
        unfloored = keep * n_before + add
        dn = dn * _share(unfloored > floor, unfloored == floor)

    # Gradients of the exponents log_f + m - m' and i - m'; the first is cut off at 0 where the cell is fresh. The
    # exponent that is 0 (its factor 1) is the one that m' took its maximum from; both are, at a tie.
    dcarried = (dc * c_before + dn * n_before) * keep
    digate = (dc * z + dn) * add
    dcarried = torch.where(fresh & (keep == 1), 0.0, dcarried)
    dm = dm - dcarried - digate
    from_carried, from_igate = (keep == 1) & ~fresh, add == 1
    digate = digate + dm * _share(from_igate, from_igate & from_carried)
    dcarried = dcarried + dm * _share(from_carried, from_igate & from_carried)
    return [digate, dcarried * not_f, dc * add * (1 - z * z), dogate], dc * keep, dn * keep, dcarried


def _share(takes: Tensor, tie: Tensor) -> Tensor:
    """Return the part of a maximum's gradient that an argument takes, as torch.maximum divides it."""
    return torch.where(tie, 0.5, torch.where(takes, 1.0, 0.0))


def _recur(y: Tensor, r: Tensor, wide: torch.dtype, product: Product) -> Sequence[Tensor]:
    """Return R y for each gate: four (B, NH, DH)."""
    if product is Product.FUSED:
        return [(r[gate].to(wide) * y.to(wide)[:, :, None, :]).sum(-1) for gate in range(4)]
    B, NH, DH = y.shape
    return _bmm(y.transpose(0, 1), r, wide).view(NH, B, 4, DH).permute(2, 1, 0, 3).unbind(0)


def _bmm(left: Tensor, r: Tensor, wide: torch.dtype) -> Tensor:
    """Multiply in r's dtype and accumulate in the wide one."""
    left = left.to(r.dtype)
    return torch.bmm(left, r) if r.dtype == wide else torch.bmm(left, r, out_dtype=wide)


def _nonzero(n: Tensor) -> Tensor:
    """Replace the normaliser of a cell that holds nothing, 0, by 1, so that its output is 0."""
    return torch.where(n == 0, 1.0, n)


def _unless(reset: Tensor, state: Tensor) -> Tensor:
    """Return the state (B, NH, DH), zero in the rows where reset (B) is true."""
    return torch.where(reset[:, None, None], 0.0, state)


def _write(into: Sequence[Tensor], values: Sequence[Tensor]) -> tuple[()]:
    for target, value in zip(into, values, strict=True):
        target.copy_(value)
    return ()


_CELLS, _TOKENS, _GATES, _BIAS, _RESET = "G NH DH", "T G NH DH", "T G 4 NH DH", "4 NH DH", "T G"
_WEIGHTS = {  # by what AXES has in their place
    Product.MATMUL: {"R": "NH K N", "R backward": "NH N K"},
    Product.FUSED: dict.fromkeys(("R", "R backward"), "4 NH DH DH"),
}
# The functions that are compiled, with the axes of their arguments; `axes` fills in those of R and of a mask.
AXES = {
    step: ("G 4 NH DH", "R", _BIAS, *[_CELLS] * 4),
    block_: (_GATES, "R", _BIAS, *[_CELLS] * 4, _TOKENS, *[_CELLS] * 4),
    activate_: ("G 4 NH DH", "G NH 4 DH", _BIAS, *[_CELLS] * 5),
    replay_: (*[_TOKENS] * 3, *[_CELLS] * 3, *[_TOKENS] * 2),
    block_backward_: (*[_TOKENS] * 10, "R backward", *[_CELLS] * 7, *[_TOKENS] * 4, *[_CELLS] * 3),
}


def axes(fn: Callable[..., tuple[Tensor, ...]], product: Product, reset: bool) -> tuple[str, ...]:
    """Return the axes of the arguments of a function that is compiled; the batch, G, stays symbolic."""
    filled = tuple(_WEIGHTS[product].get(names, names) for names in AXES[fn])
    return (*filled, _RESET) if reset else filled
