"""Rows that start afresh at some tokens, as packed documents do: the same rows with a token in front of each start.

`forward` and `backward` run an operator so. What is not finite stays in its document, however a device multiplies:
`Quarantine` keeps it out of the products, and writes NaN where the recurrence would have led it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Run = Callable[..., Sequence[Tensor]]

# The gates of an inserted token, which forgets everything and leaves c = 0, n = 0, m = 0; and of one that changes
# nothing, which fills up a row that has fewer starts than another.
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


class StaticPacking:
    """Do what `Packing` does with a token inserted before every token, one that changes nothing where none is marked.

    Twice the tokens, whatever `reset` holds: no value is read, nothing is written in place, and every operation has a
    derivative. For tracing, export and vmap.
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
    run: Run, reset: Tensor, streams: Sequence[Tensor], state: Sequence[Tensor | None], *, static: bool = False
) -> list[Tensor]:
    """Return h and the state after the last token of rows that start afresh where `reset` (B, S) says.

    run: the operator without resets, q k v igate fgate and perhaps c n m -> h c n m. state: c, n, m, or None each.
    static: use `StaticPacking`.
    """
    given = [t for t in state if t is not None]
    packing = StaticPacking(reset) if static else Packing(reset)
    if not _apart(reset, static):
        h, *after = run(*packing.spread(*streams), *given)
        return [packing.gather(h), *after]
    quarantine = Quarantine(reset, streams, given)
    h, *after = run(*packing.spread(*quarantine.clean(streams)), *quarantine.clean_state(given))
    return quarantine.spoil(packing.gather(h), after)


def backward(
    run: Run, reset: Tensor, gradients: Sequence[Tensor], streams: Sequence[Tensor], state: Sequence[Tensor | None]
) -> list[Tensor]:
    """Return the gradients of the streams and of the state before the first token of `forward`.

    run: the operator's backward pass without resets, dh dc dn dm q k v igate fgate and perhaps c n m -> their
    gradients. gradients: dh, dc, dn, dm. A document that they are all zero for has none, whatever it holds.
    """
    given, packing = [t for t in state if t is not None], Packing(reset)
    dh, *dstate = gradients
    if not _apart(reset):
        found = run(packing.spread_one(dh), *dstate, *packing.spread(*streams), *given)
        return _only_looked_at(reset, dh, dstate, [*(packing.gather(t) for t in found[:5]), *found[5:]])
    quarantine = Quarantine(reset, streams, given)
    dh, dstate = quarantine.clean_gradients(dh, dstate)
    clean = packing.spread(*quarantine.clean(streams))
    found = run(packing.spread_one(dh), *dstate, *clean, *quarantine.clean_state(given))
    return quarantine.spoil_gradients([packing.gather(t) for t in found[:5]], found[5:])


def _apart(reset: Tensor, static: bool = False) -> bool:
    """Return whether to use a `Quarantine`: where no schedule looks at data, to go token by token if need be."""
    return reset.numel() > 0 and (static or reset.device.type != "cpu")


def _only_looked_at(reset: Tensor, dh: Tensor, dstate: Sequence[Tensor], found: list[Tensor]) -> list[Tensor]:
    """Return the gradients found, zero in documents that are not looked at, if any is not finite (on the CPU)."""
    if math.isfinite(sum(t.sum(dtype=torch.float64).item() for t in found)) or not reset.numel():
        return found
    reset = reset[:, None]
    looked_at = _with_last((dh != 0).any(-1), _any(dstate, lambda t: t != 0))
    looked_at = _since_reset(looked_at, reset) | _until_reset(looked_at, reset)
    first = looked_at[..., 0] & ~reset[..., 0]
    return [
        *(torch.where(_over(looked_at, t), t, 0.0) for t in found[:5]),
        *(torch.where(_over(first, t), t, 0.0) for t in found[5:]),
    ]


class Quarantine:
    """What is not finite in packed rows, by documents: which tokens (B, NH, S) and states (B, NH) hold it or follow.

    Selects replace it before the products and put NaN where it would have led: from its token to its document's end,
    in every element.
    """

    def __init__(self, reset: Tensor, streams: Sequence[Tensor], state: Sequence[Tensor]) -> None:
        q, k, v, igate, fgate = streams
        self._reset = reset[:, None]
        self._q = ~_finite(q)
        self._token = ~(_finite(k) & _finite(v) & (igate < math.inf)) | fgate.isnan()
        self._state = torch.zeros_like(self._token[..., 0])
        if state:
            self._state = ~(_finite(state[0]).all(-1) & _finite(state[1]) & (state[2][..., 0] < math.inf))
        first = self._token[..., :1] | (self._state[..., None] & ~self._reset[..., :1])
        self._spoilt = _since_reset(torch.cat([first, self._token[..., 1:]], -1), self._reset)

    def clean(self, streams: Sequence[Tensor]) -> list[Tensor]:
        """Return the streams with tokens that change nothing in place of those that are not finite."""
        q, k, v, igate, fgate = streams
        q = q.masked_fill(_over(self._q, q), 0.0)
        k, v = (t.masked_fill(_over(self._token, t), 0.0) for t in (k, v))
        return [q, k, v, igate.masked_fill(self._token, _IGATE[1]), fgate.masked_fill(self._token, _FGATE[1])]

    def clean_state(self, state: Sequence[Tensor]) -> list[Tensor]:
        """Return c, n, m with the initial state in place of one that is not finite."""
        return [t.masked_fill(_over(self._state, t), 0.0) for t in state]

    def spoil(self, h: Tensor, state: Sequence[Tensor]) -> list[Tensor]:
        """Return h and the state after the last token, NaN where they follow from what was replaced."""
        h = h.masked_fill(_over(self._spoilt | self._q, h), math.nan)
        return [h, *(t.masked_fill(_over(self._spoilt[..., -1], t), math.nan) for t in state)]

    def clean_gradients(self, dh: Tensor, dstate: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return the gradients of the results with zeros for results that are not finite, which are remembered."""
        lost_token = self._spoilt | self._q | ~_finite(dh)
        lost_state = self._spoilt[..., -1] | _any(dstate, lambda t: ~t.isfinite())
        looked_at = lost_token & (dh != 0).any(-1)
        self._lost = _until_reset(
            _with_last(looked_at, lost_state & _any(dstate, lambda t: t != 0)), self._reset
        )
        dh = dh.masked_fill(_over(lost_token, dh), 0.0)
        return dh, [t.masked_fill(_over(lost_state, t), 0.0) for t in dstate]

    def spoil_gradients(self, gradients: Sequence[Tensor], dstate: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients of streams and initial state, NaN where a later result looked at is not finite."""
        first = self._lost[..., 0] & ~self._reset[..., 0]
        return [
            *(t.masked_fill(_over(self._lost, t), math.nan) for t in gradients),
            *(t.masked_fill(_over(first, t), math.nan) for t in dstate),
        ]


def _finite(t: Tensor) -> Tensor:
    return t.isfinite().all(-1)


def _any(state: Sequence[Tensor], found: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the rows (B, NH) where any element of a state c, n, m is `found`."""
    c, n, m = (found(t).any(-1) for t in state)
    return c.any(-1) | n | m


def _with_last(tokens: Tensor, last: Tensor) -> Tensor:
    """Return the mask `tokens` (B, NH, S) with `last` (B, NH) added to the last token."""
    return torch.cat([tokens[..., :-1], tokens[..., -1:] | last[..., None]], -1)


def _over(mask: Tensor, t: Tensor) -> Tensor:
    """Return a mask of the first axes of `t` so that it broadcasts over the others."""
    return mask.reshape(*mask.shape, *[1] * (t.dim() - mask.dim()))


def _since_reset(marked: Tensor, reset: Tensor) -> Tensor:
    """Return for each token (B, NH, S) whether one is marked from its document's start to itself; reset: (B, 1, S)."""
    count = marked.cumsum(-1)
    before = torch.where(reset, count - marked.to(count.dtype), 0)  # 0, the least, where no document starts
    return count > before.cummax(-1).values


def _until_reset(marked: Tensor, reset: Tensor) -> Tensor:
    """Return for each token (B, NH, S) whether one is marked from itself to its document's end; reset: (B, 1, S)."""
    ends = torch.cat([reset[..., 1:], torch.ones_like(reset[..., :1])], -1)
    return _since_reset(marked.flip(-1), ends.flip(-1)).flip(-1)
