"""The scan of cells over chunks, from the first to the last."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from torch_xlstm_ops.maths.decay import NEG_INF
from torch_xlstm_ops.maths.slstm.parallel.window import LEAST, join

Cells = tuple[Tensor, Tensor, Tensor]  # c, n, m


def group(summaries: Tensor, *, floor: float) -> tuple[Tensor]:
    """Reduce the summaries of K chunks each, (4 or 6, G, N, K, NH, DH), to those of them together (G, N, NH, DH)."""
    whole = [*summaries[:, :, :, 0].unbind()]
    for k in range(1, summaries.shape[3]):
        before, this = whole, summaries[:, :, :, k].unbind()
        carried = before[1] + this[0]
        M_new = torch.maximum(carried, this[1])
        keep, add = torch.exp(carried - M_new), torch.exp(this[1] - M_new)
        whole = [before[0] + this[0], M_new, keep * before[2] + add * this[2], keep * before[3] + add * this[3]]
        if floor:
            least = torch.maximum(keep * before[4] + add * this[3], add * this[4])
            whole += [least, keep * before[5] + add * this[3]]
        afresh = this[0] == NEG_INF
        whole = [torch.where(afresh, new, old) for new, old in zip(this, whole, strict=True)]
    return (join(whole, 0),)


def across(summaries: Tensor, cells: Tensor, *, floor: float) -> tuple[Tensor, Tensor]:
    """Return c, n, m before each of K chunks, (3, G, N, K, NH, DH), and after the last, (3, G, N, NH, DH).

    summaries: of `summarize` or `group`, (4 or 6, G, N, K, NH, DH). cells: before the first chunk, (3, G, N, NH, DH).
    """
    states = [_cells(cells)]
    for k in range(summaries.shape[3]):
        states.append(_advance(states[-1], summaries[:, :, :, k], floor))
    *before, after = states
    return join([join(each, 2) for each in zip(*before, strict=True)], 0), join(after, 0)


def before_chunks(chunks: Tensor, groups: Tensor | None, cells: Tensor, most: int, floor: float) -> Cells:
    """Return c, n, m before each chunk, (G, N K, NH, DH); each chunk walks by itself over what is before it.

    chunks: the summaries of `summarize`, (4 or 6, G, N, K, NH, DH). cells: before each group, (3, G, N, NH, DH); if
    groups are given, before the first, (3, G, 1, NH, DH). groups: of `group`, (4 or 6, G, N, NH, DH), at most `most`.
    """
    N, K = chunks.shape[2:4]
    place = torch.arange(N * K, device=chunks.device)[:, None, None]
    if groups is None:
        c, n, m = _cells(_for_each_chunk(cells, K))
    else:
        # Where there is no group g, no chunk is after it.
        each = (groups[:, :, _least(g, N - 1), None] for g in range(most - 1))
        c, n, m = _walk(_cells(cells), each, place // K, floor)
    parts = (_for_each_chunk(chunks[:, :, :, k], K) for k in range(K - 1))
    return _walk((c, n, m), parts, place % K, floor)


def _cells(cells: Tensor) -> Cells:
    c, n, m = cells.unbind()
    return c, n, m


def _for_each_chunk(t: Tensor, K: int) -> Tensor:
    """Repeat what is of a group, (..., N, NH, DH), for its K chunks: (..., N K, NH, DH)."""
    return t.unsqueeze(-3).expand(*t.shape[:-2], K, *t.shape[-2:]).flatten(-4, -3)


def _least(a: int, b: int) -> int:
    """Return the least of two sizes; of symbolic ones, whose order Python's `min` would record as a condition."""
    return torch.sym_min(a, b)  # type: ignore[no-untyped-call, no-any-return]  # torch annotates nothing of it


def _walk(cells: Cells, parts: Iterable[Tensor], place: Tensor, floor: float) -> Cells:
    """Return c, n, m after as many of the parts, given by their summaries, as are before a place."""
    c, n, m = cells
    for k, part in enumerate(parts):
        after = _advance((c, n, m), part, floor)
        c, n, m = (torch.where(k < place, new, old) for new, old in zip(after, (c, n, m), strict=True))
    return c, n, m


def _advance(cells: Cells, summary: Tensor, floor: float) -> Cells:
    """Return c, n, m after a chunk, given its summary, (4 or 6, G, N, ...)."""
    (c, n, m), (decay, M, dc, dn, *least_and_beyond) = cells, summary.unbind()
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
