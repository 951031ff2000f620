"""The tokens of a window, their gates, and the recurrence within its chunks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_xlstm_ops.maths.decay import NEG_INF
from torch_xlstm_ops.maths.shapes import state_dtype
from torch_xlstm_ops.maths.slstm.cell import accumulate, gate_factors, one_if_zero

LEAST = -1e30  # the stabiliser of what adds nothing; finite, so that differences are numbers
TOKEN, RESET, PAD = 0, 1, 2  # codes of a mask: a token, one that starts afresh, no token


class Gates(NamedTuple):
    """The gates of one token of each chunk, (G, NC, NH, DH), wide."""

    igate: Tensor
    log_f: Tensor
    z: Tensor
    o: Tensor
    fgate: Tensor


class Window(NamedTuple):
    """What gives the gates of a window's tokens."""

    x: Tensor
    b: Tensor
    start: Tensor  # R y before the first token, (G, NH, 4, DH); without products, the guess of R y of every token
    products: Tensor | None  # R y of each token, (NH, G, NC, L, 4, DH)
    mask: Tensor | None

    @classmethod
    def of(cls, x: Tensor, b: Tensor, start: Tensor, rest: Sequence[Tensor]) -> Window:
        """Tell products and mask, both optional, by their number of axes."""
        by_axes = {t.dim(): t for t in rest}
        return cls(x, b, start, by_axes.get(6), by_axes.get(3))

    def gates(self, t: int) -> Gates:
        """Return the gates of token t of every chunk; a PAD neither forgets nor adds."""
        wide = state_dtype(self.x.dtype)
        start = self.start.transpose(1, 2).to(wide)[:, None]  # (G, 1, 4, NH, DH)
        if self.products is None:
            product = start
        elif t:
            product = self.products[:, :, :, t - 1].permute(1, 2, 3, 0, 4).to(wide)
        else:
            ends = self.products[:, :, :-1, -1].permute(1, 2, 3, 0, 4).to(wide)
            product = torch.cat([start, ends], 1)
        if self.mask is not None:
            product = torch.where(is_(self.mask, t, RESET)[..., None], 0.0, product)
        igate, fgate, z, o = (self.x[:, :, t].to(wide) + self.b.to(wide) + product).unbind(2)
        if self.mask is not None:
            pad = is_(self.mask, t, PAD)
            igate, fgate = torch.where(pad, NEG_INF, igate), torch.where(pad, -NEG_INF, fgate)
        if self.x.dtype == wide:
            log_f, z = F.logsigmoid(fgate), torch.tanh(z)
        else:  # absolute errors of 1e-7, and a third of the instructions
            log_f, z = fgate.clamp(max=0) - torch.log(1 + torch.exp(-fgate.abs())), 2 * torch.sigmoid(2 * z) - 1
        return Gates(igate, log_f, z, torch.sigmoid(o), fgate)


class Step(NamedTuple):
    """What the recurrence does at one token of every chunk."""

    y: Tensor
    c: Tensor
    n: Tensor
    m: Tensor
    n_before: Tensor
    igate: Tensor
    keep: Tensor
    add: Tensor
    z: Tensor
    o: Tensor
    fgate: Tensor


def walk(window: Window, states: Sequence[Tensor], floor: float) -> Iterator[Step]:
    """Run the recurrence's own cells through the tokens of every chunk."""
    c, n, m = states
    for t in range(window.x.shape[2]):
        if window.mask is not None:
            c, n, m = (torch.where(is_(window.mask, t, RESET), 0.0, s) for s in (c, n, m))
        g = window.gates(t)
        keep, add, m = gate_factors(g.igate, g.log_f, n, m)
        n_before = n
        c, n = accumulate(keep, add, g.z, c, n, floor)
        yield Step(g.o * c / one_if_zero(n), c, n, m, n_before, g.igate, keep, add, g.z, g.o, g.fgate)


def is_(mask: Tensor, t: int, code: int) -> Tensor:
    """Return where token t of a chunk is of a kind, to be broadcast over heads and channels."""
    return (mask[:, :, t] == code)[:, :, None, None]


def join(tensors: Iterable[Tensor], dim: int) -> Tensor:
    """Return what `torch.stack` does, written so that a compiler sees each tensor's place in the result."""
    return torch.cat([t.unsqueeze(dim) for t in tensors], dim)
