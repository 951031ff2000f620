"""Rows that start afresh at some tokens, as packed documents do: the same rows with a token in front of each start."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The gates of an inserted token, which forgets everything and leaves c = 0, n = 0, m = 0; and of what fills up a row
# that has fewer of them than another, and changes nothing.
_IGATE = (0.0, -math.inf)
_FGATE = (-math.inf, math.inf)


class Packing:
    """Where the tokens of (B, S) go when a token is inserted before each that `reset` (B, S), bool, marks.

    The inserted token closes the forget gate and adds nothing at weight one, which is the state a sequence starts
    from. So every schedule, gradient and device is exact at a reset. Reads one number back from the device.
    """

    def __init__(self, reset: Tensor) -> None:
        starts = reset.cumsum(1)
        self._at = torch.arange(reset.shape[1], device=reset.device) + starts  # (B, S), where each token goes
        self._tokens = reset.shape[1] + int(starts[:, -1:].amax()) if reset.numel() else 0
        marked = torch.zeros(reset.shape[0], self._tokens, dtype=torch.bool, device=reset.device)
        self._starts = marked.scatter_(1, (self._at - 1).clamp(min=0), reset)  # a token's neighbour before it, if reset

    def spread(
        self, q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the streams (B, NH, S, ...) with the inserted tokens."""
        igate, fgate = (
            self.spread_one(t, fill).masked_fill_(self._starts[:, None], start)
            for t, start, fill in ((igate, *_IGATE), (fgate, *_FGATE))
        )
        return self.spread_one(q), self.spread_one(k), self.spread_one(v), igate, fgate

    def spread_one(self, t: Tensor, fill: float = 0.0) -> Tensor:
        """Return `t` (B, NH, S, ...) with `fill` for the inserted tokens."""
        out = t.new_full((*t.shape[:2], self._tokens, *t.shape[3:]), fill)
        return out.scatter_(2, self._index(t), t)

    def gather(self, t: Tensor) -> Tensor:
        """Return (B, NH, S, ...) without the inserted tokens."""
        return t.gather(2, self._index(t))

    def _index(self, t: Tensor) -> Tensor:
        B, S = self._at.shape
        return self._at.view(B, 1, S, *[1] * (t.dim() - 3)).expand(B, t.shape[1], S, *t.shape[3:])
