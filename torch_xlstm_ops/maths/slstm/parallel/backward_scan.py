"""The scan of gradients over chunks, from the last to the first."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_xlstm_ops.maths.slstm.parallel.backward_tokens import Factors, backwards, from_y, has_masks, times
from torch_xlstm_ops.maths.slstm.parallel.window import join

CUT = -1.0  # as keep of a chunk: a reset in it keeps what comes from after it, NaN too, from what is before


def summarize_back(dh: Tensor, factors: Tensor, cells: Tensor, *rest: Tensor, floor: float) -> tuple[Tensor]:
    """Reduce each chunk to what it does to the gradients that come from after it, (4 or 7, G, NC, NH, DH).

    dc' = keep dc + sc, dn' = keep_n dn + sn, w' = keep_w w + from_n dn + sw. Returns keep, sc, sn, keep_w, and with a
    floor keep_n, from_n, sw. Where the chunk has a reset, keep is CUT.
    """
    masked = has_masks(rest)
    sc = sn = sw = from_n = torch.zeros_like(cells[0])
    kept = kept_n = kept_w = torch.ones_like(cells[0])
    for token in backwards(dh, Factors(*factors.unbind()), cells, rest, floor):
        f = token.f
        to_c, to_n, to_w = from_y(token)
        if token.share is not None and token.unfloored is not None:
            slack = f.n - token.share * token.unfloored
            sw = token.carried * (sw + times(slack, sn, masked) + to_w)
            from_n = token.carried * (from_n + slack * kept_n)
            kept_n = f.keep * token.share * kept_n
            sn = times(f.keep * token.share, sn + to_n, masked)
        else:
            sn = times(f.keep, sn + to_n, masked)
        before = kept
        sc, kept, kept_w = times(f.keep, sc + to_c, masked), f.keep * kept, token.carried * kept_w
        if token.reset is not None:
            sc, sn, sw = (torch.where(token.reset, 0.0, s) for s in (sc, sn, sw))
            kept, kept_n, kept_w, from_n = _unless(token.reset | (before == CUT), kept, kept_n, kept_w, from_n)
    return (join([kept, sc, sn, kept_w, *([kept_n, from_n, sw] if floor else [])], 0),)


def group_back(summaries: Tensor, *, floor: float, masked: bool) -> tuple[Tensor]:
    """Reduce the summaries of K chunks each, (4 or 7, G, N, K, NH, DH), to those of them together (G, N, NH, DH)."""
    last = summaries.shape[3] - 1
    whole = [*summaries[:, :, :, last].unbind()]
    for k in reversed(range(last)):
        this = summaries[:, :, :, k].unbind()
        keep_n = this[4] if floor else this[0]
        found = [
            this[0] * whole[0], times(this[0], whole[1], masked) + this[1],
            times(keep_n, whole[2], masked) + this[2], this[3] * whole[3],
        ]
        if floor:
            from_n = this[3] * whole[5] + this[5] * whole[4]
            to_w = times(this[3], whole[6], masked) + times(this[5], whole[2], masked) + this[6]
            found += [keep_n * whole[4], from_n, to_w]
        if masked:
            cut = this[0] == CUT
            found = [torch.where(cut, alone, f) for alone, f in zip(this, found, strict=True)]
            factors = (0, 4, 3, 5) if floor else (0, 3)
            kept = _unless(cut | (whole[0] == CUT), *(found[i] for i in factors))
            for i, factor in zip(factors, kept, strict=True):
                found[i] = factor
        whole = found
    return (join(whole, 0),)


def _unless(cut: Tensor, keep: Tensor, *factors: Tensor) -> list[Tensor]:
    """Return factors, with CUT and 0 in their places where a reset is between."""
    return [torch.where(cut, CUT, keep), *(torch.where(cut, 0.0, factor) for factor in factors)]


def across_back(summaries: Tensor, after: Tensor, *, floor: float, masked: bool) -> tuple[Tensor, Tensor]:
    """Return dc, dn, w from after each of K chunks, (3, G, N, K, NH, DH), and from the first on, (3, G, N, NH, DH).

    summaries: of `summarize_back` or `group_back`, (4 or 7, G, N, K, NH, DH). after: dc, dn, w from after the last.
    """
    keep, sc, sn, keep_w, *rest = summaries.unbind()
    dc, dn, w = after.unbind()
    states = []
    for k in reversed(range(keep.shape[2])):
        states.append((dc, dn, w))
        if masked:
            dc, dn, w = (torch.where(keep[:, :, k] == CUT, 0.0, s) for s in (dc, dn, w))
        w = times(keep_w[:, :, k], w, masked)
        if floor:
            w = w + times(rest[1][:, :, k], dn, masked) + rest[2][:, :, k]
        dc = times(keep[:, :, k], dc, masked) + sc[:, :, k]
        dn = times(rest[0][:, :, k] if floor else keep[:, :, k], dn, masked) + sn[:, :, k]
    return join([join(each, 2) for each in zip(*reversed(states), strict=True)], 0), join([dc, dn, w], 0)
