"""Packed documents: insert a token that resets the state in front of each document, and run the operator on that.

NaN and infinity stay within their document: `NonFiniteMask` takes them out of the matrix products and then writes NaN
where the recurrence would have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torch_xlstm_ops.maths.nonfinite import IDENTITY_FGATE, IDENTITY_IGATE, NonFiniteMask, zero_unused_documents

Operator = Callable[..., Sequence[Tensor]]

# The gates of a reset token, which leaves c = 0, n = 0, m = 0; and of an identity token, which pads rows with fewer
# documents.
_IGATE = (0.0, IDENTITY_IGATE)
_FGATE = (-math.inf, IDENTITY_FGATE)


class Packing:
    """Positions of the tokens of (B, S) after inserting one before each that `reset` (B, S), bool, marks.

    The inserted token closes the forget gate and adds zero with weight one: the state after it is the initial state.
    So every schedule, gradient and device is exact at a reset. Synchronises with the device once, for the length.
    """

    def __init__(self, reset: Tensor) -> None:
        starts = reset.cumsum(1)
        self._at = torch.arange(reset.shape[1], device=reset.device) + starts  # (B, S), the new position of each token
        self._tokens = reset.shape[1] + int(starts[:, -1:].amax()) if reset.numel() else 0
        marked = torch.zeros(reset.shape[0], self._tokens, dtype=torch.bool, device=reset.device)
        self._starts = marked.scatter_(1, (self._at - 1).clamp(min=0), reset)  # the position before a reset

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


class StaticPacking:
    """Like `Packing`, but insert a token before every token: a reset token, or an identity token.

    The length is 2 S for any `reset`; no operation synchronises or writes in place, and each has a derivative. For
    tracing, export and vmap.
    """

    def __init__(self, reset: Tensor) -> None:
        self._reset = reset

    def spread(
        self, q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the streams (B, NH, 2 S, ...) with the inserted tokens."""
        gates = [
            self._pairs(torch.where(self._reset[:, None], start, fill).to(t.dtype).expand(t.shape), t)
            for t, (start, fill) in ((igate, _IGATE), (fgate, _FGATE))
        ]
        return self.spread_one(q), self.spread_one(k), self.spread_one(v), gates[0], gates[1]

    def spread_one(self, t: Tensor) -> Tensor:
        """Return `t` (B, NH, S, ...) with zeros for the inserted tokens."""
        return self._pairs(torch.zeros_like(t), t)

    def gather(self, t: Tensor) -> Tensor:
        """Return (B, NH, S, ...) without the inserted tokens."""
        return torch.unflatten(t, 2, (-1, 2))[:, :, :, 1]

    def _pairs(self, inserted: Tensor, t: Tensor) -> Tensor:
        return torch.stack([inserted, t], 3).flatten(2, 3)


def forward(
    run: Operator, reset: Tensor, streams: Sequence[Tensor], state: Sequence[Tensor | None], *, static: bool = False
) -> list[Tensor]:
    """Return h and the state after the last token, with rows reset before the tokens that `reset` (B, S) marks.

    run: the operator without resets, q k v igate fgate [c n m] -> h c n m. state: c, n, m, or None each.
    static: use `StaticPacking`.
    """
    given = [t for t in state if t is not None]
    packing = StaticPacking(reset) if static else Packing(reset)
    if not _uses_mask(reset, static):
        h, *after = run(*packing.spread(*streams), *given)
        return [packing.gather(h), *after]
    mask = NonFiniteMask(reset, streams, given)
    h, *after = run(*packing.spread(*mask.mask_streams(streams)), *mask.mask_state(given))
    return mask.restore(packing.gather(h), after)


def backward(
    run: Operator, reset: Tensor, gradients: Sequence[Tensor], streams: Sequence[Tensor], state: Sequence[Tensor | None]
) -> list[Tensor]:
    """Return the gradients of the streams and of the state before the first token of `forward`.

    run: the operator's backward pass without resets, dh dc dn dm q k v igate fgate [c n m] -> their gradients.
    gradients: dh, dc, dn, dm. A document for which they are all zero gets zero gradients, even if it holds NaN.
    """
    given, packing = [t for t in state if t is not None], Packing(reset)
    dh, *dstate = gradients
    if not _uses_mask(reset):
        found = run(packing.spread_one(dh), *dstate, *packing.spread(*streams), *given)
        return zero_unused_documents(reset, dh, dstate, [*(packing.gather(t) for t in found[:5]), *found[5:]])
    mask = NonFiniteMask(reset, streams, given)
    dh, dstate = mask.mask_gradients(dh, dstate)
    clean = packing.spread(*mask.mask_streams(streams))
    found = run(packing.spread_one(dh), *dstate, *clean, *mask.mask_state(given))
    return mask.restore_gradients([packing.gather(t) for t in found[:5]], found[5:])


def _uses_mask(reset: Tensor, static: bool = False) -> bool:
    """Return whether to use a `NonFiniteMask`: off the CPU and in tracing, where no schedule tests for NaN itself."""
    return reset.numel() > 0 and (static or reset.device.type != "cpu")
