"""One round of the forward pass over all tokens of a window."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_xlstm_ops.maths.decay import NEG_INF
from torch_xlstm_ops.maths.slstm.parallel.scan import Cells, before_chunks
from torch_xlstm_ops.maths.slstm.parallel.window import LEAST, PAD, RESET, Gates, Window, is_, join, walk

CLOSED = -1e32  # the least logarithm of a forget gate: it forgets LEAST too, and sums of many are finite


def summarize(x: Tensor, b: Tensor, start: Tensor, *rest: Tensor, floor: float) -> tuple[Tensor]:
    """Reduce each chunk to decay, M, dc, dn, and with a floor least and beyond: (4 or 6, G, NC, NH, DH).

        m' = max(decay + m, M)        c' = exp(decay + m - m') c + exp(M - m') dc
        n' = exp(decay + m - m') n + exp(M - m') dn, at least exp(M - m') least,
             and at least exp(decay + m - m') floor + exp(M - m') beyond
    """
    window = Window.of(x, b, start, rest)
    mask = window.mask
    decay, M, dc, dn, least, beyond = _token_summary(window.gates(0), floor)
    if mask is not None:
        decay = torch.where(is_(mask, 0, RESET), NEG_INF, decay)
    for t in range(1, x.shape[2]):
        g = window.gates(t)
        log_f = g.log_f.clamp(min=CLOSED)
        M_new = torch.maximum(M + log_f, g.igate).clamp(min=LEAST)
        keep, add = torch.exp(M + log_f - M_new), torch.exp(g.igate - M_new)
        decay, M, dc, dn = decay + log_f, M_new, keep * dc + add * g.z, keep * dn + add
        if floor:
            least, beyond = torch.clamp(keep * least + add, min=floor), keep * beyond + add
        if mask is not None:
            reset, alone = is_(mask, t, RESET), _token_summary(g, floor)
            decay = torch.where(reset, NEG_INF, decay)
            M, dc, dn, least, beyond = (
                torch.where(reset, new, old)
                for new, old in zip(alone[1:], (M, dc, dn, least, beyond), strict=True)
            )
    return (join([decay, M, dc, dn, least, beyond] if floor else [decay, M, dc, dn], 0),)


def _token_summary(g: Gates, floor: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the summary of one token; a forget gate that is NaN makes the cell NaN even after a reset."""
    M = g.igate.clamp(min=LEAST)
    add = torch.exp(g.igate - M)
    dc, dn = (torch.where(g.log_f.isnan(), g.log_f, part) for part in (add * g.z, add))
    return g.log_f.clamp(min=CLOSED), M, dc, dn, dn.clamp(min=floor), torch.zeros_like(add)


def emit(
    x: Tensor, b: Tensor, start: Tensor, cells: Tensor, *rest: Tensor, floor: float, dtype: torch.dtype
) -> tuple[Tensor]:
    """Return h (G, NC, L, NH, DH) by the recurrence within each chunk; cells: c, n, m before it, (3, G, NC, NH, DH).

    It is rounded to x's dtype, and returned in a dtype.
    """
    return _emit(Window.of(x, b, start, rest), cells.unbind(), floor, dtype)


def settle(
    x: Tensor, b: Tensor, start: Tensor, cells: Tensor, *rest: Tensor, floor: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Run `emit` as a last round; return h, and y, c, n, m after each chunk, (4 or 5, G, NC, NH, DH), wide.

    With a floor there follows doubt: infinite for a cell that the summary does not describe, so that no certificate may
    be given, else 0.
    """
    return _settle(Window.of(x, b, start, rest), cells.unbind(), floor, dtype)


def emit_across(
    x: Tensor, b: Tensor, start: Tensor, cells: Tensor, chunks: Tensor, *rest: Tensor, floor: float, most: int,
    dtype: torch.dtype,
) -> tuple[Tensor]:
    """Run `emit` from summaries of the chunks, where that saves the launches of a scan.

    cells, chunks, most: as of `before_chunks`. A chunk has an axis for its group, N, and one for its place in it, K:
    x (G, N, K, L, 4, NH, DH); rest, told apart by the number of axes: groups as of `before_chunks` (5), products
    (NH, G, N, K, L, 4, DH), mask (G, N, K, L).
    """
    return _emit(*_by_chunk(x, b, start, cells, chunks, rest, most, floor), floor, dtype)


def settle_across(
    x: Tensor, b: Tensor, start: Tensor, cells: Tensor, chunks: Tensor, *rest: Tensor, floor: float, most: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Run `settle` with arguments as of `emit_across`."""
    return _settle(*_by_chunk(x, b, start, cells, chunks, rest, most, floor), floor, dtype)


def _emit(window: Window, cells: Sequence[Tensor], floor: float, dtype: torch.dtype) -> tuple[Tensor]:
    return (join([step.y.to(window.x.dtype).to(dtype) for step in walk(window, cells, floor)], 2),)


def _settle(window: Window, cells: Sequence[Tensor], floor: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    h, doubt, y = [], torch.zeros_like(cells[0]), torch.zeros_like(cells[0])
    for t, step in enumerate(walk(window, cells, floor)):
        y_new, doubtful = step.y, (step.igate == NEG_INF) & ((step.n_before == 0) | (step.keep == 0))
        if window.mask is not None:
            pad = is_(window.mask, t, PAD)
            y_new, doubtful = torch.where(pad, y, step.y), doubtful & ~pad
        y, doubt = y_new, torch.where(doubtful, -NEG_INF, doubt)
        h.append(step.y.to(window.x.dtype).to(dtype))
    return join(h, 2), join([y, step.c, step.n, step.m, *([doubt] if floor else [])], 0)


def _by_chunk(
    x: Tensor, b: Tensor, start: Tensor, cells: Tensor, chunks: Tensor, rest: Sequence[Tensor], most: int, floor: float
) -> tuple[Window, Cells]:
    """Return the tokens with one axis for all chunks, and c, n, m before each chunk."""
    by_axes = {t.dim(): t for t in rest}
    states = before_chunks(chunks, by_axes.get(5), cells, most, floor)
    products, mask = (by_axes[axes].flatten(at, at + 1) if axes in by_axes else None for axes, at in ((7, 2), (4, 1)))
    return Window(x.flatten(1, 2), b, start, products, mask), states


def products(h: Tensor, r: Tensor, out: torch.dtype) -> Tensor:
    """Return R h for every token at once, in a dtype.

    h: (G, NC, L, NH, DH); r: (NH, DH, 4 DH), as `slstm.weights` lays it out. Returns (NH, G, NC, L, 4, DH).
    """
    G, NC, L, NH, DH = h.shape
    operand = h.view(G * NC * L, NH, DH).transpose(0, 1).to(r.dtype)
    found = torch.bmm(operand, r) if r.dtype == out else torch.bmm(operand, r, out_dtype=out)
    return found.view(NH, G, NC, L, 4, DH)
