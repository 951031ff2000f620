"""The scan of cells over chunks, from the first to the last."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from torch_xlstm_ops.maths.decay import NEG_INF
from torch_xlstm_ops.maths.slstm.parallel.window import LEAST

Cells = tuple[Tensor, Tensor, Tensor]  # c, n, m


def group(summaries: Tensor, *out: Tensor, floor: float) -> tuple[()]:
    """Reduce the summaries of K chunks each, (4 or 6, G, N, K, NH, DH), to those of them together.

    out: where to write each part, (G, N, NH, DH). A result that joins the parts could be computed four times.
    """
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
    for written, part in zip(out, whole, strict=True):
        written.copy_(part)
    return ()


def across(summaries: Tensor, c: Tensor, n: Tensor, m: Tensor, *, floor: float) -> tuple[Tensor, ...]:
    """Return c, n, m before each of K chunks, (G, N, K, NH, DH), and after the last, (G, N, NH, DH).

    summaries: of `summarize` or `group`, (4 or 6, G, N, K, NH, DH); c, n, m before the first chunk, (G, N, NH, DH).
    """
    states, cells = [], (c, n, m)
    for k in range(summaries.shape[3]):
        states.append(cells)
        cells = _advance(cells, summaries[:, :, :, k], floor)
    return *(torch.stack(each, 2) for each in zip(*states, strict=True)), *cells


def across_apart(summaries: Tensor, c: Tensor, n: Tensor, m: Tensor, *, floor: float, ends: bool) -> tuple[Tensor, ...]:
    """Return c, n, m before each of K chunks, and with `ends` after the last too: (G, N, K or K + 1, NH, DH).

    Arguments as of `across`. Each chunk walks by itself over those before it: three results, where `across` has three
    for each chunk, more than a Metal kernel can write.
    """
    before = summaries.shape[3] - (not ends)
    place = torch.arange(before + 1, device=c.device)[:, None, None]
    parts = (summaries[:, :, :, k, None] for k in range(before))
    return _walk((c[:, :, None], n[:, :, None], m[:, :, None]), parts, place, floor)


def before_chunks(chunks: Tensor, groups: Tensor | None, cells: Cells, most: int, floor: float) -> Cells:
    """Return c, n, m before each chunk, (G, N K, NH, DH); each chunk walks by itself over what is before it.

    chunks: the summaries of `summarize`, (4 or 6, G, N, K, NH, DH). cells: before each group, (G, N, NH, DH); if groups
    are given, before the first, (G, 1, NH, DH). groups: those of `group`, (4 or 6, G, N, NH, DH), at most `most`.
    """
    N, K = chunks.shape[2:4]
    place = torch.arange(N * K, device=chunks.device)[:, None, None]
    if groups is None:
        c, n, m = (_for_each_chunk(t, K) for t in cells)
    else:
        # Where there is no group g, no chunk is after it.
        each = (groups[:, :, _least(g, N - 1), None] for g in range(most - 1))
        c, n, m = _walk(cells, each, place // K, floor)
    parts = (_for_each_chunk(chunks[:, :, :, k], K) for k in range(K - 1))
    return _walk((c, n, m), parts, place % K, floor)


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
