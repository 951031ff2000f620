"""One round of the forward pass over all tokens of a window."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_xlstm_ops.maths.decay import NEG_INF
from torch_xlstm_ops.maths.slstm.parallel.scan import Cells, before_chunks
from torch_xlstm_ops.maths.slstm.parallel.window import LEAST, PAD, RESET, Gates, Window, is_, walk

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
    return (torch.stack([decay, M, dc, dn, least, beyond] if floor else [decay, M, dc, dn]),)


def _token_summary(g: Gates, floor: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the summary of one token; a forget gate that is NaN makes the cell NaN even after a reset."""
    M = g.igate.clamp(min=LEAST)
    add = torch.exp(g.igate - M)
    dc, dn = (torch.where(g.log_f.isnan(), g.log_f, part) for part in (add * g.z, add))
    return g.log_f.clamp(min=CLOSED), M, dc, dn, dn.clamp(min=floor), torch.zeros_like(add)


def emit(
    x: Tensor, b: Tensor, start: Tensor, c: Tensor, n: Tensor, m: Tensor, *rest: Tensor, floor: float,
    dtype: torch.dtype,
) -> tuple[Tensor]:
    """Return h (G, NC, L, NH, DH) by the recurrence within each chunk; c, n, m: before each, (G, NC, NH, DH).

    It is rounded to x's dtype, and returned in a dtype.
    """
    steps = walk(Window.of(x, b, start, rest), (c, n, m), floor)
    return (torch.stack([step.y.to(x.dtype).to(dtype) for step in steps], 2),)


def settle(
    x: Tensor, b: Tensor, start: Tensor, c: Tensor, n: Tensor, m: Tensor, *rest: Tensor, floor: float,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """Run `emit` as a last round; return h, and (G, NC, NH, DH), wide, y, c, n, m after each chunk.

    With a floor also return doubt: infinite for a cell that the summary does not describe, so that no certificate may
    be given, else 0.
    """
    window, found_h = Window.of(x, b, start, rest), []
    doubt = y = torch.zeros_like(c)
    for t, step in enumerate(walk(window, (c, n, m), floor)):
        y_new, doubtful = step.y, (step.igate == NEG_INF) & ((step.n_before == 0) | (step.keep == 0))
        if window.mask is not None:
            pad = is_(window.mask, t, PAD)
            y_new, doubtful = torch.where(pad, y, step.y), doubtful & ~pad
        y, doubt = y_new, torch.where(doubtful, -NEG_INF, doubt)
        found_h.append(step.y.to(x.dtype).to(dtype))
    return torch.stack(found_h, 2), y, step.c, step.n, step.m, *((doubt,) if floor else ())


def emit_across(
    x: Tensor, b: Tensor, start: Tensor, c: Tensor, n: Tensor, m: Tensor, chunks: Tensor, *rest: Tensor, floor: float,
    most: int, dtype: torch.dtype,
) -> tuple[Tensor]:
    """Run `emit` from summaries of the chunks, where that saves the launches of a scan.

    c, n, m, chunks, most: as of `before_chunks`. A chunk has an axis for its group, N, and one for its place in it, K:
    x (G, N, K, L, 4, NH, DH); rest, told apart by the number of axes: groups as of `before_chunks` (5), products
    (NH, G, N, K, L, 4, DH), mask (G, N, K, L).
    """
    return emit(*_by_chunk(x, b, start, (c, n, m), chunks, rest, most, floor), floor=floor, dtype=dtype)


def settle_across(
    x: Tensor, b: Tensor, start: Tensor, c: Tensor, n: Tensor, m: Tensor, chunks: Tensor, *rest: Tensor, floor: float,
    most: int, dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """Run `settle` with arguments as of `emit_across`."""
    return settle(*_by_chunk(x, b, start, (c, n, m), chunks, rest, most, floor), floor=floor, dtype=dtype)


def _by_chunk(
    x: Tensor, b: Tensor, start: Tensor, cells: Cells, chunks: Tensor, rest: Sequence[Tensor], most: int, floor: float
) -> list[Tensor]:
    """Return the arguments of `emit`, with one axis for all chunks."""
    by_axes = {t.dim(): t for t in rest}
    states = before_chunks(chunks, by_axes.get(5), cells, most, floor)
    products, mask = ([by_axes[axes].flatten(at, at + 1)] if axes in by_axes else [] for axes, at in ((7, 2), (4, 1)))
    return [x.flatten(1, 2), b, start, *states, *products, *mask]


def products(h: Tensor, r: Tensor, out: torch.dtype) -> Tensor:
    """Return R h for every token at once, in a dtype.

    h: (G, NC, L, NH, DH); r: (NH, DH, 4 DH), as `slstm.weights` lays it out. Returns (NH, G, NC, L, 4, DH).
    """
    G, NC, L, NH, DH = h.shape
    operand = h.view(G * NC * L, NH, DH).transpose(0, 1).to(r.dtype)
    found = torch.bmm(operand, r) if r.dtype == out else torch.bmm(operand, r, out_dtype=out)
    return found.view(NH, G, NC, L, 4, DH)
