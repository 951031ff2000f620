"""One round of the backward pass over all tokens of a window."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from torch_xlstm_ops.maths.slstm.cell import one_if_zero
from torch_xlstm_ops.maths.slstm.parallel.backward_tokens import Factors, backwards, from_y, has_masks, times
from torch_xlstm_ops.maths.slstm.parallel.window import Window, join, walk


def record(
    x: Tensor, b: Tensor, start: Tensor, cells: Tensor, *rest: Tensor, floor: float
) -> tuple[Tensor]:
    """Return the `Factors` of every token, (7, G, NC, L, NH, DH); cells: before each chunk, (3, G, NC, NH, DH)."""
    found = [
        Factors(step.keep, step.add, step.z, step.o, torch.sigmoid(-step.fgate), step.c, step.n)
        for step in walk(Window.of(x, b, start, rest), cells.unbind(), floor)
    ]
    return (join([join(each, 2) for each in zip(*found, strict=True)], 0),)


def emit_back(
    dh: Tensor, factors: Tensor, cells: Tensor, after: Tensor, *rest: Tensor, floor: float, dtype: torch.dtype
) -> tuple[Tensor]:
    """Return the gradients of the gates i f z o, (G, NC, L, NH, 4, DH), in a dtype.

    cells: c, n, m before each chunk, after: the gradients dc, dn, w that come from after it, (3, G, NC, NH, DH).
    """
    found = [gates for _, gates in _gates(dh, Factors(*factors.unbind()), cells, after.unbind(), rest, floor)]
    return (join([join([t.to(dtype) for t in gates], 3) for gates in reversed(found)], 2),)


def _gates(
    dh: Tensor, factors: Factors, cells: Tensor, after: Sequence[Tensor], rest: Sequence[Tensor], floor: float
) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield each token, the last first, with the gradients of its gates i f z o, (G, NC, NH, DH) each."""
    dc, dn, w = after
    for token in backwards(dh, factors, cells, rest, floor):
        f, dy = token.f, token.dy
        idle = (dy == 0) & (dc == 0) & (dn == 0) & (w == 0)
        to_c, to_n, to_w = from_y(token)
        if token.share is not None and token.unfloored is not None:
            w = w + times(f.n - token.share * token.unfloored, dn, has_masks(rest)) + to_w
        dc, dn = dc + to_c, dn + to_n
        if token.share is not None:
            dn = dn * token.share
        found = [
            f.add * (dc * f.z + dn) + w * token.taken,
            (f.keep * (dc * token.c_before + dn * token.n_before) + w * token.carried) * f.not_f,
            dc * f.add * (1 - f.z * f.z),
            dy * (f.c / one_if_zero(f.n)) * f.o * (1 - f.o),
        ]
        dc, dn, w = f.keep * dc, f.keep * dn, token.carried * w
        if token.reset is not None and token.pad is not None:
            found = [torch.where(idle | token.pad, 0.0, gate) for gate in found]
            dc, dn, w = (torch.where(idle | token.reset, 0.0, s) for s in (dc, dn, w))
        yield token.t, found


def operand_gradients(dgates: Tensor, r: Tensor, out: torch.dtype) -> Tensor:
    """Return what R y asks of the gradient of y for every token at once, in a dtype.

    dgates: (G, NC, L, NH, 4, DH); r: (NH, 4 DH, DH), as `slstm.weights_backward` lays it out.
    Returns (NH, G, NC, L, DH).
    """
    G, NC, L, NH, _, DH = dgates.shape
    operand = dgates.reshape(G * NC * L, NH, 4 * DH).transpose(0, 1).to(r.dtype)
    found = torch.bmm(operand, r) if r.dtype == out else torch.bmm(operand, r, out_dtype=out)
    return found.view(NH, G, NC, L, DH)


def enter(dc: Tensor, dn: Tensor, dm: Tensor, cells: Tensor, *, masked: bool) -> tuple[Tensor]:
    """Return dc, dn, w, (3, G, NH, DH), after the last cell, whose gradients are dc, dn, dm, and its state c, n, m."""
    c, n, _ = cells.unbind()
    return (join([dc, dn, dm - times(c, dc, masked) - times(n, dn, masked)], 0),)


def leave(gradients: Tensor, c: Tensor, n: Tensor, *, masked: bool) -> tuple[Tensor]:
    """Return dc, dn, dm before the first cell, (3, G, NH, DH), whose state is c, n; where it is fresh, dm is 0.

    gradients: dc, dn, w, (3, G, NH, DH).
    """
    dc, dn, w = gradients.unbind()
    return (join([dc, dn, torch.where(n == 0, 0.0, w + times(c, dc, masked) + times(n, dn, masked))], 0),)
