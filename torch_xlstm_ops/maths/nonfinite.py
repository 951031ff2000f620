"""NaN and infinity: whether there are any, and how they stay within their document.

A matrix product would carry them to other documents, as 0 * NaN is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torch_xlstm_ops.maths.shapes import state_dtype

# The gates of a token that changes nothing: it adds nothing and keeps everything.
IDENTITY_IGATE, IDENTITY_FGATE = -math.inf, math.inf


def identity_where(skipped: Tensor, igate: Tensor, fgate: Tensor) -> tuple[Tensor, Tensor]:
    """Return gates (..., S) with which skipped tokens change nothing; skipped: bool, broadcast to them."""
    return igate.masked_fill(skipped, IDENTITY_IGATE), fgate.masked_fill(skipped, IDENTITY_FGATE)


class NonFiniteMask:
    """Which tokens (B, NH, S) and states (B, NH) of packed rows are not finite, or follow one in their document.

    They are replaced before the matrix products, and NaN is written afterwards from each to its document's end, into
    every element.
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
        self._affected = _since_reset(torch.cat([first, self._token[..., 1:]], -1), self._reset)

    def mask_streams(self, streams: Sequence[Tensor]) -> list[Tensor]:
        """Return the streams with identity tokens in place of those that are not finite."""
        q, k, v, igate, fgate = streams
        q = q.masked_fill(_broadcast(self._q, q), 0.0)
        k, v = (t.masked_fill(_broadcast(self._token, t), 0.0) for t in (k, v))
        return [q, k, v, *identity_where(self._token, igate, fgate)]

    def mask_state(self, state: Sequence[Tensor]) -> list[Tensor]:
        """Return c, n, m with the initial state in place of one that is not finite."""
        return [t.masked_fill(_broadcast(self._state, t), 0.0) for t in state]

    def restore(self, h: Tensor, state: Sequence[Tensor]) -> list[Tensor]:
        """Return h and the state after the last token, NaN where they follow from what was replaced."""
        h = h.masked_fill(_broadcast(self._affected | self._q, h), math.nan)
        return [h, *(t.masked_fill(_broadcast(self._affected[..., -1], t), math.nan) for t in state)]

    def mask_gradients(self, dh: Tensor, dstate: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return the results' gradients, zero for results that are not finite; remember what those affect."""
        bad_token = self._affected | self._q | ~_finite(dh)
        bad_state = self._affected[..., -1] | _any(dstate, lambda t: ~t.isfinite())
        used = bad_token & (dh != 0).any(-1)
        self._bad_gradient = _until_reset(
            _or_last(used, bad_state & _any(dstate, lambda t: t != 0)), self._reset
        )
        dh = dh.masked_fill(_broadcast(bad_token, dh), 0.0)
        return dh, [t.masked_fill(_broadcast(bad_state, t), 0.0) for t in dstate]

    def restore_gradients(self, gradients: Sequence[Tensor], dstate: Sequence[Tensor]) -> list[Tensor]:
        """Return the streams' and initial state's gradients, NaN where a later result with a gradient is not finite."""
        first = self._bad_gradient[..., 0] & ~self._reset[..., 0]
        return [
            *(t.masked_fill(_broadcast(self._bad_gradient, t), math.nan) for t in gradients),
            *(t.masked_fill(_broadcast(first, t), math.nan) for t in dstate),
        ]


def zero_unused_documents(reset: Tensor, dh: Tensor, dstate: Sequence[Tensor], found: list[Tensor]) -> list[Tensor]:
    """Return the gradients, zeroed (if any is not finite) in documents whose results get no gradient; for the CPU."""
    if math.isfinite(sum(t.sum(dtype=torch.float64).item() for t in found)) or not reset.numel():
        return found
    reset = reset[:, None]
    used = _or_last((dh != 0).any(-1), _any(dstate, lambda t: t != 0))
    used = _since_reset(used, reset) | _until_reset(used, reset)
    first = used[..., 0] & ~reset[..., 0]
    return [
        *(torch.where(_broadcast(used, t), t, 0.0) for t in found[:5]),
        *(torch.where(_broadcast(first, t), t, 0.0) for t in found[5:]),
    ]


def _finite(t: Tensor) -> Tensor:
    return t.isfinite().all(-1)


def _any(state: Sequence[Tensor], found: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the rows (B, NH) where `found` holds for any element of a state c, n, m."""
    c, n, m = (found(t).any(-1) for t in state)
    return c.any(-1) | n | m


def _or_last(tokens: Tensor, last: Tensor) -> Tensor:
    """Return the mask `tokens` (B, NH, S) with `last` (B, NH) added to the last token."""
    return torch.cat([tokens[..., :-1], tokens[..., -1:] | last[..., None]], -1)


def _broadcast(mask: Tensor, t: Tensor) -> Tensor:
    """Return a mask of the first axes of `t` so that it broadcasts over the others."""
    return mask.reshape(*mask.shape, *[1] * (t.dim() - mask.dim()))


def _since_reset(marked: Tensor, reset: Tensor) -> Tensor:
    """Return for each token (B, NH, S) whether one is marked from its document's start to itself; reset: (B, 1, S)."""
    count = marked.cumsum(-1)
    before = torch.where(reset, count - marked.to(count.dtype), 0)  # 0, the minimum, where no document starts
    return count > before.cummax(-1).values


def _until_reset(marked: Tensor, reset: Tensor) -> Tensor:
    """Return for each token (B, NH, S) whether one is marked from itself to its document's end; reset: (B, 1, S)."""
    ends = torch.cat([reset[..., 1:], torch.ones_like(reset[..., :1])], -1)
    return _since_reset(marked.flip(-1), ends.flip(-1)).flip(-1)


def finite(*tensors: Tensor) -> bool:
    """Return whether all values are finite; True on other devices than the CPU, as reading them would synchronise."""
    if tensors[0].device.type != "cpu":
        return True
    return math.isfinite(sum(t.sum(dtype=state_dtype(t.dtype)).item() for t in tensors))


def finite_state(state: Sequence[Tensor]) -> bool:
    """Return whether c, n, m are finite, or m -inf; as of `finite`."""
    c, n, m = state
    return finite(c, n, m.clamp(min=0))
