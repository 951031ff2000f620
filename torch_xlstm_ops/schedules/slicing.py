"""What every schedule does with one (band, segment): take its slices, call compiled functions, put results back."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_xlstm_ops.maths.shapes import state_dtype
from torch_xlstm_ops.schedules.plan import Plan, Segment

Run = Callable[[list[Tensor]], Sequence[Tensor]]

# What a padding token holds, in the order q k v igate fgate: the monoid's identity.
_PADDING = (0.0, 0.0, 0.0, -math.inf, math.inf)


class Kernels(NamedTuple):
    """The compiled functions of an op, each called with one list of contiguous tensors; shapes as in `mlstm`."""

    operands: Run  # q k v igate fgate c n m -> P q_gated W dC c n m
    opening: Run | None  # of a call from an empty state: q k v igate fgate -> P q_gated W dC n m keep add
    single: Run | None  # all of a call from an empty state that is one chunk: q k v igate fgate -> P c n m
    stand: Callable[[Tensor, Tensor, Tensor | None], Tensor]  # W dC c -> C_before
    emit: Callable[[Tensor, Tensor | None, Tensor | None, Tensor, Tensor], None]  # P q_gated C_before v h
    close: Run  # dC C_before keep add c, which it writes
    step: Run  # q k v igate fgate c n m -> h c n m
    after: Run  # k v igate fgate c n m -> c n m
    backward: Run  # q k v igate fgate c n m dh dc dn dm -> their gradients
    summarize: Run  # k v igate fgate -> F M dC dn, and M dC dn of the chunks
    answers: Run  # q k igate fgate, M dn of the chunks, n m -> P q_gated W
    absorb: Run  # F M dC dn c n m -> c n m
    # One token's gradient: q k v igate fgate c n m dh dc dn dm -> theirs. Without it NaN spreads over segments.
    step_gradient: Run | None = None

    @property
    def read_state(self) -> bool:
        """Whether the state before a call is read, and not only written."""
        return self.opening is None and self.single is None


class Rows:
    """The streams of a call with batch and heads joined, R rows of S tokens, cut into tasks."""

    def __init__(self, plan: Plan, streams: Sequence[Tensor]) -> None:
        self.plan, self.segments = plan, plan.segments
        self.streams = [t.flatten(0, 1) for t in streams]  # (R, S, ...), a view where strides allow

    @functools.cached_property
    def h(self) -> Tensor:
        """h (R, S, DHHV), allocated when a task first writes to it and has let go of what it needs no more."""
        v = self.streams[2]
        return v.new_empty(self.plan.rows, self.plan.tokens, v.shape[-1])

    def take(self, index: int, band: slice, segment: Segment) -> Tensor:
        """Return a task's part of a stream, contiguous and padded: (G, NC, L, ...)."""
        stream = self.streams[index]
        if band.stop - band.start != stream.shape[0] or segment.stop - segment.start != stream.shape[1]:
            stream = stream[band, segment.start:segment.stop]
        return self._chunked(stream, segment, _PADDING[index])

    def take_all(self, band: slice, segment: Segment) -> list[Tensor]:
        """Return a task's part of q, k, v, igate, fgate."""
        return [self.take(index, band, segment) for index in range(len(self.streams))]

    def gradient(self, dh: Tensor, band: slice, segment: Segment) -> Tensor:
        """Return a task's part of the gradient of h (R, S, DHHV), padded with zeros."""
        return self._chunked(dh[band, segment.start:segment.stop], segment, 0.0)

    def _chunked(self, part: Tensor, segment: Segment, padding: float) -> Tensor:
        L = self.plan.chunk_size
        missing = segment.chunks * L - part.shape[1]
        if missing:
            part = F.pad(part, (0, 0) * (part.dim() - 2) + (0, missing), value=padding)
        return part.contiguous().view(part.shape[0], segment.chunks, L, *part.shape[2:])

    def put(self, whole: Tensor, band: slice, segment: Segment, part: Tensor) -> None:
        """Write a task's part (G, NC, L, ...) into its slice of `whole` (R, S, ...), without its padding."""
        tokens = segment.stop - segment.start
        whole[band, segment.start:segment.stop] = part.flatten(1, 2)[:, :tokens]

    def slot(self, whole: Tensor, band: slice, segment: Segment) -> Tensor | None:
        """Return a task's slice of `whole` as (G*NC, L, D) if it is one block of memory, to be written directly."""
        L = self.plan.chunk_size
        part = whole[band, segment.start:segment.stop]
        if part.shape[1] != segment.chunks * L or not part.is_contiguous():
            return None
        return part.view(-1, L, part.shape[-1])


def initial_state(q: Tensor, v: Tensor, state: Sequence[Tensor | None], *, read: bool = True) -> list[Tensor]:
    """Return c (R, DHQK, DHHV), n (R, DHQK), m (R, 1), contiguous and fresh: copies of `state`, or zeros.

    read: whether anyone reads them before they are written; else they hold anything.
    """
    B, NH, _, DHQK = q.shape
    sizes = ((B * NH, DHQK, v.shape[-1]), (B * NH, DHQK), (B * NH, 1))
    dtype = state_dtype(q.dtype)
    return [
        (torch.zeros if read else torch.empty)(size, dtype=dtype, device=q.device) if t is None
        else torch.empty(size, dtype=dtype, device=q.device).copy_(t.reshape(size))
        for size, t in zip(sizes, state, strict=True)
    ]
