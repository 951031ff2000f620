"""The tokens of a window in reverse: what the gradient needs of each.

The gradient of y_t is dh_t plus, through R, the gradient of the gates of token t + 1. Given a guess of the latter, the
gradients of c, n, m are linear scans backwards in time with known factors, channel by channel; they give the gradients
of the gates, a better guess.

The cells after a token contribute dc, dn, and w, the part of the gradient of m that c and n do not account for:
dm = dc c + dn n + w. Without a floor only the gradient of the final m makes a w.

`Factors` are those of `backward.record`, (7, G, NC, L, NH, DH), wide. Optional arguments of a round, told apart by
their number of axes, are the gradients of each token's operand of R, (NH, G, NC, L, DH), and two masks: of each token,
and of the token after it. With masks, a gradient of 0 stays 0 though the cell may hold NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops.maths.slstm.cell import one_if_zero
from torch_xlstm_ops.maths.slstm.gradient import share
from torch_xlstm_ops.maths.slstm.parallel.window import PAD, RESET, is_


class Factors(NamedTuple):
    """What the gradient needs of the forward pass, for each token."""

    keep: Tensor
    add: Tensor
    z: Tensor
    o: Tensor
    not_f: Tensor
    c: Tensor
    n: Tensor


class Token(NamedTuple):
    """One token of every chunk, on the way back."""

    t: int
    dy: Tensor
    f: Factors
    c_before: Tensor
    n_before: Tensor
    share: Tensor | None  # of dn that passes the floor; None without one
    unfloored: Tensor | None
    carried: Tensor  # of w: to the m before
    taken: Tensor  # of w: to the input gate
    pad: Tensor | None
    reset: Tensor | None


def backwards(
    dh: Tensor, factors: Factors, cells: Tensor, rest: Sequence[Tensor], floor: float
) -> Iterator[Token]:
    """Go through the tokens of every chunk, the last first; cells: c, n, m before it, (3, G, NC, NH, DH)."""
    masks = [t for t in rest if t.dim() == 3]
    for t in reversed(range(dh.shape[2])):
        dy, pad, reset = dh[:, :, t], None, None
        if len(rest) > len(masks):
            dy = dy + _asked(rest[0], t, masks).to(dh.dtype)
        if masks:
            pad, reset = is_(masks[0], t, PAD), is_(masks[0], t, RESET)
        f = Factors(*(factor[:, :, t] for factor in factors))
        before = (factors.c[:, :, t - 1], factors.n[:, :, t - 1]) if t else (cells[0], cells[1])
        if reset is not None and pad is not None:
            dy = torch.where(pad, 0.0, dy)
            before = torch.where(reset, 0.0, before[0]), torch.where(reset, 0.0, before[1])
        passes = unfloored = None
        if floor:
            unfloored = f.keep * before[1] + f.add
            passes = share(unfloored > floor, unfloored == floor)
            passes = passes if pad is None else torch.where(pad, 1.0, passes)
        from_carried, from_igate = (f.keep == 1) & (before[1] != 0), f.add == 1
        tie = from_carried & from_igate
        yield Token(t, dy, f, *before, passes, unfloored, share(from_carried, tie), share(from_igate, tie), pad, reset)


def _asked(products: Tensor, t: int, masks: Sequence[Tensor]) -> Tensor:
    """Return what the tokens after each chunk's token t ask of its y, (G, NC, NH, DH)."""
    if t < products.shape[3] - 1:
        asked = products[:, :, :, t + 1].permute(1, 2, 0, 3)
    else:
        starts = products[:, :, 1:, 0].permute(1, 2, 0, 3)
        asked = torch.cat([starts, torch.zeros_like(products[:, :, 0, 0].transpose(0, 1)[:, None])], 1)
    return torch.where(is_(masks[1], t, RESET), 0.0, asked) if masks else asked


def times(factor: Tensor, gradient: Tensor, masked: bool) -> Tensor:
    """Multiply; if `masked`, a gradient of 0 stays 0 whatever the factor is."""
    return torch.where(gradient == 0, 0.0, factor * gradient) if masked else factor * gradient


def from_y(token: Token) -> tuple[Tensor, Tensor, Tensor]:
    """Return what dy asks of c and n, and of w where a floor keeps n from following them."""
    masked, f = token.reset is not None, token.f
    to_c = times(f.o / one_if_zero(f.n), token.dy, masked)
    to_n = torch.where(f.n == 0, 0.0, -times(f.c / one_if_zero(f.n), to_c, masked))
    if token.share is None or token.unfloored is None:
        return to_c, to_n, torch.zeros_like(to_c)
    return to_c, to_n, -times(f.c, to_c, masked) - times(token.share * token.unfloored, to_n, masked)


def has_masks(rest: Sequence[Tensor]) -> bool:
    return any(t.dim() == 3 for t in rest)
