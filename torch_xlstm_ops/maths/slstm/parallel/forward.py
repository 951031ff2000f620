"""One round of the forward pass over all tokens of a window."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_xlstm_ops.maths.decay import NEG_INF
from torch_xlstm_ops.maths.slstm.parallel.window import PAD, RESET, Gates, Window, is_, walk

LEAST = -1e30  # the stabiliser of what adds nothing; finite, so that differences are numbers
CLOSED = -1e32  # the least logarithm of a forget gate: it forgets LEAST too, and sums of many are finite


def summarize(x: Tensor, b: Tensor, start: Tensor, *rest: Tensor, floor: float) -> tuple[Tensor, ...]:
    """Reduce each chunk to decay, M, dc, dn, and with a floor least and beyond, all (NC, G, NH, DH).

        m' = max(decay + m, M)        c' = exp(decay + m - m') c + exp(M - m') dc
        n' = exp(decay + m - m') n + exp(M - m') dn, at least exp(M - m') least,
             and at least exp(decay + m - m') floor + exp(M - m') beyond
    """
    window = Window.of(x, b, start, rest)
    mask = window.mask
    decay, M, dc, dn, least, beyond = _token_summary(window.gates(0), floor)
    if mask is not None:
        decay = torch.where(is_(mask, 0, RESET), NEG_INF, decay)
    for t in range(1, x.shape[1]):
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
    return (decay, M, dc, dn, least, beyond) if floor else (decay, M, dc, dn)


def _token_summary(g: Gates, floor: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the summary of one token; a forget gate that is NaN makes the cell NaN even after a reset."""
    M = g.igate.clamp(min=LEAST)
    add = torch.exp(g.igate - M)
    dc, dn = (torch.where(g.log_f.isnan(), g.log_f, part) for part in (add * g.z, add))
    return g.log_f.clamp(min=CLOSED), M, dc, dn, dn.clamp(min=floor), torch.zeros_like(add)


def group(decay: Tensor, M: Tensor, dc: Tensor, dn: Tensor, *rest: Tensor, floor: float) -> tuple[Tensor, ...]:
    """Reduce the summaries of K chunks each, (N, K, G, NH, DH), to summaries of them together, (N, G, NH, DH)."""
    parts = (decay, M, dc, dn, *rest)
    whole = [part[:, 0] for part in parts]
    for k in range(1, decay.shape[1]):
        before, this = whole, [part[:, k] for part in parts]
        carried = before[1] + this[0]
        M_new = torch.maximum(carried, this[1])
        keep, add = torch.exp(carried - M_new), torch.exp(this[1] - M_new)
        whole = [before[0] + this[0], M_new, keep * before[2] + add * this[2], keep * before[3] + add * this[3]]
        if floor:
            least = torch.maximum(keep * before[4] + add * this[3], add * this[4])
            whole += [least, keep * before[5] + add * this[3]]
        afresh = this[0] == NEG_INF
        whole = [torch.where(afresh, new, old) for new, old in zip(this, whole, strict=True)]
    return tuple(whole)


Cells = tuple[Tensor, Tensor, Tensor]  # c, n, m


def across(*tensors: Tensor, floor: float) -> tuple[Tensor, ...]:
    """Return c, n, m before each of K chunks, (N, K, G, NH, DH), and after the last, (N, G, NH, DH).

    tensors: the summaries of `summarize` or `group`, (N, K, G, NH, DH); c, n, m before, (N, G, NH, DH).
    """
    summaries, states = tensors[:-3], []
    cells: Cells = tensors[-3], tensors[-2], tensors[-1]
    for k in range(summaries[0].shape[1]):
        states.append(cells)
        cells = _advance(cells, [t[:, k] for t in summaries], floor)
    return *(torch.stack(each, 1) for each in zip(*states, strict=True)), *cells


def across_apart(*tensors: Tensor, floor: float, ends: bool) -> tuple[Tensor, ...]:
    """Return c, n, m before each of K chunks, and with `ends` after the last too: (N, K or K + 1, G, NH, DH).

    Arguments as of `across`. Each chunk walks by itself over those before it: three results, where `across` has three
    for each chunk, more than a Metal kernel can write.
    """
    summaries, (c, n, m) = tensors[:-3], (t[:, None] for t in tensors[-3:])
    cells: Cells = c, n, m
    before = summaries[0].shape[1] - (not ends)
    at = torch.arange(before + 1, device=cells[0].device)[:, None, None, None]
    for k in range(before):
        after = _advance(cells, [t[:, k, None] for t in summaries], floor)
        c, n, m = (torch.where(k < at, new, old) for new, old in zip(after, cells, strict=True))
        cells = c, n, m
    return cells


def _advance(cells: Cells, summary: Sequence[Tensor], floor: float) -> Cells:
    """Return c, n, m after a chunk, given its summary."""
    (c, n, m), (decay, M, dc, dn, *least_and_beyond) = cells, summary
    c, m = torch.where(n == 0, 0.0, c), torch.where(n == 0, LEAST, m)
    carried = decay + m
    m_new = torch.maximum(carried, M)
    keep, add = torch.exp(carried - m_new), torch.exp(M - m_new)
    n_new, n_afresh = keep * n + add * dn, dn
    if floor:
        least, beyond = least_and_beyond
        kept = torch.where(n == 0, 0.0, keep * floor + add * beyond)
        n_new, n_afresh = torch.maximum(torch.maximum(n_new, add * least), kept), least
    afresh = decay == NEG_INF
    c = torch.where(afresh, dc, keep * c + add * dc)
    n = torch.where(afresh, n_afresh, n_new)
    return c, n, torch.where(n == 0, 0.0, torch.where(afresh, M, m_new))


def emit(
    x: Tensor, b: Tensor, start: Tensor, c: Tensor, n: Tensor, m: Tensor, *rest: Tensor, floor: float,
    dtype: torch.dtype,
) -> tuple[Tensor]:
    """Return h (NC, L, G, NH, DH) by the recurrence within each chunk; c, n, m: before each, (NC, G, NH, DH).

    It is rounded to x's dtype, and returned in a dtype, that of the next product.
    """
    steps = walk(Window.of(x, b, start, rest), (c, n, m), floor)
    return (torch.stack([step.y.to(x.dtype).to(dtype) for step in steps], 1),)


def settle(
    x: Tensor, b: Tensor, start: Tensor, c: Tensor, n: Tensor, m: Tensor, h: Tensor, *rest: Tensor, floor: float
) -> tuple[Tensor, ...]:
    """Run `emit`, and tell what a last round has to: return h, and (NC, G, NH, DH), wide, y_after, change, size.

    h: that of the round before. y_after: y after each chunk. change: the sum over the chunk of the squares of what h
    moved by. size: that of its squares.
    """
    window, found_h = Window.of(x, b, start, rest), []
    moved = squares = y = torch.zeros_like(c)
    for t, step in enumerate(walk(window, (c, n, m), floor)):
        stored = step.y.to(x.dtype)
        found, before = stored.to(moved.dtype), h[:, t].to(moved.dtype)
        same = (found == before) | (found.isnan() & before.isnan())
        by = torch.where(same, 0.0, found - before)
        if floor:  # the summary does not describe such a cell, so no certificate may be given
            by = torch.where((step.igate == NEG_INF) & ((step.n_before == 0) | (step.keep == 0)), -NEG_INF, by)
        square = torch.where(found.isnan(), 0.0, found * found)
        y_new = step.y
        if window.mask is not None:
            pad = is_(window.mask, t, PAD)
            by, square = torch.where(pad, 0.0, by), torch.where(pad, 0.0, square)
            y_new = torch.where(pad, y, step.y)
        moved, squares, y = moved + by * by, squares + square, y_new
        found_h.append(stored)
    return torch.stack(found_h, 1), y, moved, squares


def products(h: Tensor, r: Tensor, out: torch.dtype) -> Tensor:
    """Return R h for every token at once, in a dtype.

    h: (NC, L, G, NH, DH); r: (NH, DH, 4 DH), as `slstm.weights` lays it out. Returns (NH, NC, L, G, 4, DH).
    """
    NC, L, G, NH, DH = h.shape
    operand = h.view(NC * L * G, NH, DH).transpose(0, 1).to(r.dtype)
    found = torch.bmm(operand, r) if r.dtype == out else torch.bmm(operand, r, out_dtype=out)
    return found.view(NH, NC, L, G, 4, DH)
