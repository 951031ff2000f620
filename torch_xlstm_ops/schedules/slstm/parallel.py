"""One window of an sLSTM parallel in time: a fixed number of rounds, forward or backward, without synchronising."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops.kernels.slstm_parallel import GROUP, Kernels

Results = tuple[Tensor, ...]
RESET = 1  # of a mask, as in the maths


class Window(NamedTuple):
    """Tokens that are solved together, and the number of chunks that hold them."""

    start: int
    length: int
    chunks: int

    @property
    def at(self) -> slice:
        return slice(self.start, self.start + self.length)


def windows(S: int, L: int, longest: int) -> list[Window]:
    """Cut S tokens into windows of at most `longest`, in few different numbers of chunks of L."""
    return [
        Window(start, min(longest, S - start), _chunks(min(longest, S - start), L)) for start in range(0, S, longest)
    ]


def _chunks(tokens: int, L: int) -> int:
    """Return how many chunks hold so many tokens: a power of 2 up to GROUP, beyond it what full groups hold."""
    chunks, multiple = -(-tokens // L), GROUP
    if chunks <= GROUP:
        return 1 << (chunks - 1).bit_length()
    while chunks > GROUP * multiple:  # groups of groups
        multiple *= GROUP
    return -(-chunks // multiple) * multiple


def forward_window(
    kernels: Kernels, rounds: int, length: int, x: Tensor, r: Tensor, b: Tensor, y: Tensor, c: Tensor, n: Tensor,
    m: Tensor, *mask: Tensor,
) -> Results:
    """Return h (G, NC, L, NH, DH), y, c, n, m after `length` tokens, the error's estimate and the residual.

    x: (G, NC, L, 4, NH, DH); r: (NH, DH, 4 DH); mask: (G, NC, L), if given. rounds: 2 at least.
    """
    start, cells = _start(kernels, y.to(x.dtype), r), torch.stack([c, n, m])
    K = min(x.shape[1], GROUP)

    def cut(t: Tensor, at: int = 1) -> Tensor:
        """Give what has chunks an axis for their groups, where the kernel walks over these."""
        return torch.unflatten(t, at, (-1, K)) if kernels.walking else t

    products: list[Tensor] = []
    h: Tensor | None = None
    moved = []
    for left in reversed(range(rounds)):
        if h is not None:
            products = [kernels.products(h, r, left > 1)]
        summary = kernels.summarize([x, b, start, *products, *mask])[0]
        args = [cut(x), b, start, *_before(kernels, summary, cells)]
        rest = [*(cut(t, 2) for t in products), *(cut(t) for t in mask)]
        if left > 1:
            h = kernels.emit([*args, *rest])[0]
            continue
        before = torch.zeros_like(x[:, :, :, 0]) if h is None else h
        h, after = kernels.settle([*args, *rest])
        change, size = kernels.movement([h, before, *mask, *after[4:]])
        moved.append(change)
    assert h is not None  # as there are two rounds
    last = (length - 1) // x.shape[2]
    return h.to(x.dtype), *after[:4, :, last].contiguous(), *kernels.judge([moved[1], moved[0], size])


def replay_window(
    kernels: Kernels, x: Tensor, h: Tensor, r: Tensor, b: Tensor, y: Tensor, c: Tensor, n: Tensor, m: Tensor,
    *mask: Tensor,
) -> Results:
    """Return c, n, m after a window whose h (G, NC, L, NH, DH) are known; y: what R is multiplied with at first."""
    summary = kernels.summarize([x, b, _start(kernels, y, r), kernels.products(h, r, False), *mask])[0]
    return _scan(kernels, summary, torch.stack([c, n, m]))[1].unbind()


def backward_window(
    kernels: Kernels, rounds: int, dh: Tensor, dc: Tensor, dn: Tensor, dm: Tensor, x: Tensor, h: Tensor,
    r: Tensor, r_back: Tensor, b: Tensor, y: Tensor, c: Tensor, n: Tensor, m: Tensor, *masks: Tensor,
) -> Results:
    """Return dgates (G, T, NH, 4, DH), dr, db, the gradients of y, c, n, m before, the error's estimate, the residual.

    dh: (G, NC, L, NH, DH), wide, with what comes after asks of the last y. y: what R is multiplied with at first.
    masks: of each token and of that after it.
    """
    mask = masks[:1]
    window = [x, b, _start(kernels, y, r)]
    products = [kernels.products(h, r, False), *mask]
    before, last = _scan(kernels, kernels.summarize([*window, *products])[0], torch.stack([c, n, m]))
    factors = kernels.record([*window, before, *products])[0]
    beyond = kernels.enter([dc, dn, dm, last])[0]

    asked: list[Tensor] = []
    dgates, moved = x.new_zeros(()), []
    for left in reversed(range(rounds)):
        if left < rounds - 1:
            asked = [kernels.operand_gradients(dgates, r_back, left > 1)]
        summary = kernels.summarize_back([dh, factors, before, *asked, *masks])[0]
        after, first = _scan_back(kernels, summary, beyond)
        found = kernels.emit_back([dh, factors, before, after, *asked, *masks])[0]
        if left <= 1:
            change, size = kernels.movement([found, dgates if dgates.dim() else torch.zeros_like(found)])
            moved.append(change)
        dgates = found
    judged = kernels.judge([moved[1], moved[0], size])
    dcells = kernels.leave([first, c, n])[0]
    dy = kernels.operand_gradients(dgates[:, :1, :1], r_back, False).flatten(1, 3).transpose(0, 1)
    h_before = torch.empty_like(h.flatten(1, 2))  # `torch.cat` takes longer on CUDA
    h_before[:, 0], h_before[:, 1:] = y, h.flatten(1, 2)[:, :-1]
    dgates = dgates.flatten(1, 2)
    if masks:
        reset = mask[0].flatten(1, 2) == RESET
        dy = torch.where(reset[:, 0, None, None], 0.0, dy)
        # Tokens whose gradient is 0 add nothing to those of R, though what R was multiplied with may be NaN.
        idle = (dgates == 0).all(-1).all(-1).all(-1)
        h_before = torch.where((idle | reset)[..., None, None], 0.0, h_before)
    dr, db = kernels.weight_gradients(dgates, h_before)
    return dgates, dr, db, dy.to(dc.dtype), *dcells, *judged


def _start(kernels: Kernels, y: Tensor, r: Tensor) -> Tensor:
    """Return R y (G, NH, 4, DH) of what R is multiplied with at first, (G, NH, DH)."""
    return kernels.products(y[:, None, None], r, False).flatten(1, 3).transpose(0, 1).contiguous()


def _before(kernels: Kernels, summary: Tensor, given: Tensor) -> list[Tensor]:
    """Return what `emit` and `settle` take of the cells before each chunk: the cells, or what these walk over."""
    if not kernels.walking:
        return [_scan(kernels, summary, given)[0]]
    NC = summary.shape[2]
    chunks = torch.unflatten(summary, 2, (-1, min(NC, GROUP)))
    if NC <= GROUP:
        return [given[:, :, None], chunks]
    groups = kernels.group([chunks])[0]
    if NC <= GROUP * GROUP:
        return [given[:, :, None], chunks, groups]
    return [_scan(kernels, groups, given)[0], chunks]


def _scan(kernels: Kernels, summary: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    """Return c, n, m before each chunk, (3, G, NC, NH, DH), and after the last, from those given before the first.

    summary: of the chunks, (4 or 6, G, NC, NH, DH). given: (3, G, NH, DH). More than GROUP chunks are taken in groups.
    """
    NC = summary.shape[2]
    if NC <= GROUP:
        before, after = kernels.across([summary[:, :, None], given[:, :, None]])
        return before[:, :, 0], after[:, :, 0]
    chunks = torch.unflatten(summary, 2, (-1, GROUP))
    ends, end = _scan(kernels, kernels.group([chunks])[0], given)
    return kernels.across([chunks, ends])[0].flatten(2, 3), end


def _scan_back(kernels: Kernels, summary: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    """Return dc, dn, w after each chunk, (3, G, NC, NH, DH), and before the first, from those given after the last.

    summary: of the chunks, (4 or 7, G, NC, NH, DH). given: (3, G, NH, DH). More than GROUP chunks are taken in groups.
    """
    NC = summary.shape[2]
    if NC <= GROUP:
        after, first = kernels.across_back([summary[:, :, None], given[:, :, None]])
        return after[:, :, 0], first[:, :, 0]
    chunks = torch.unflatten(summary, 2, (-1, GROUP))
    ends, end = _scan_back(kernels, kernels.group_back([chunks])[0], given)
    return kernels.across_back([chunks, ends])[0].flatten(2, 3), end
