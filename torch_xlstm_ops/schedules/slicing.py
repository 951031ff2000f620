"""Slices of one task, a segment of a band: its part of the streams, its part of h, its state."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_xlstm_ops.kernels.layout import lay_out
from torch_xlstm_ops.kernels.mlstm import State, empty_state
from torch_xlstm_ops.maths.mlstm import PADDING
from torch_xlstm_ops.maths.products import accepts_product
from torch_xlstm_ops.schedules.plan import Plan, Segment

OP = "mlstm_chunkwise"  # its name in traces


class Rows:
    """The streams of a call with batch and heads joined, R rows of S tokens, cut into tasks."""

    def __init__(self, plan: Plan, streams: Sequence[Tensor]) -> None:
        self.plan, self.segments = plan, plan.segments
        self._given = streams

    @functools.cached_property
    def streams(self) -> list[Tensor]:
        """q, k, v, igate, fgate (R, S, ...), views where strides allow."""
        return [t.flatten(0, 1) for t in self._given]

    @functools.cached_property
    def h(self) -> Tensor:
        """h (R, S, DHHV), allocated when a task first writes to it, after it has freed its chunk summaries."""
        v = self._given[2]
        return v.new_empty(self.plan.rows, self.plan.tokens, v.shape[-1])

    def take(self, index: int, band: slice, segment: Segment) -> Tensor:
        """Return a task's part of a stream, contiguous and padded: (G, NC, L, ...)."""
        stream = self.streams[index]
        if band.stop - band.start != stream.shape[0] or segment.stop - segment.start != stream.shape[1]:
            stream = stream[band, segment.start:segment.stop]
        return self._chunked(stream, segment, PADDING[index])

    def take_all(self, band: slice, segment: Segment) -> list[Tensor]:
        """Return a task's part of q, k, v, igate, fgate."""
        if band.stop - band.start == self.plan.rows:
            tokens = slice(segment.start, segment.stop)
            found = lay_out([t[:, :, tokens] for t in self._given], segment.chunks, self.plan.chunk_size)
            if found is not None:
                return found
        return [self.take(index, band, segment) for index in range(len(self.streams))]

    def gradient(self, dh: Tensor, band: slice, segment: Segment) -> Tensor:
        """Return a task's part of the gradient of h (R, S, DHHV), padded with zeros."""
        return self._chunked(dh[band, segment.start:segment.stop], segment, 0.0)

    def put(self, whole: Tensor, band: slice, segment: Segment, part: Tensor) -> None:
        """Write a task's part (G, NC, L, ...) into its slice of `whole` (R, S, ...), without its padding."""
        tokens = segment.stop - segment.start
        whole[band, segment.start:segment.stop] = part.flatten(1, 2)[:, :tokens]

    def place(self, whole: Tensor, band: slice, segment: Segment) -> Tensor | None:
        """Return a task's slice of `whole` (R, S, ...) as (G, NC, L, ...), or None where it has no memory of its own.

        That is one block without padding, in which a matrix product may be written.
        """
        part = whole[band, segment.start:segment.stop]
        L = self.plan.chunk_size
        if part.shape[1] != segment.chunks * L or not part.is_contiguous() or not accepts_product(part):
            return None
        return part.view(part.shape[0], segment.chunks, L, *part.shape[2:])

    def output(self, band: slice, segment: Segment) -> OutputSlice:
        """Return where a task writes its h."""
        return OutputSlice(self, band, segment)

    def zero_state(self, band: slice) -> State:
        """Return the state of a band before the first token."""
        return empty_state(self._given, band.stop - band.start, zero=True)

    def _chunked(self, part: Tensor, segment: Segment, padding: float) -> Tensor:
        L = self.plan.chunk_size
        missing = segment.chunks * L - part.shape[1]
        if missing:
            part = F.pad(part, (0, 0) * (part.dim() - 2) + (0, missing), value=padding)
        return part.contiguous().view(part.shape[0], segment.chunks, L, *part.shape[2:])


class OutputSlice:
    """A task's slice of h: written directly where it is one block of memory, else through a temporary."""

    def __init__(self, rows: Rows, band: slice, segment: Segment) -> None:
        self._rows, self._band, self._segment = rows, band, segment
        self._temporary: Tensor | None = None

    def begin(self) -> Tensor:
        """Return memory for h (G*NC, L, DHHV)."""
        segment, L, h = self._segment, self._rows.plan.chunk_size, self._rows.h
        place = self._rows.place(h, self._band, segment)
        if place is None:
            self._temporary = place = h.new_empty(self._band.stop - self._band.start, segment.chunks, L, h.shape[-1])
        return place.flatten(0, 1)

    def end(self) -> None:
        """Copy a temporary into the slice."""
        if self._temporary is not None:
            self._rows.put(self._rows.h, self._band, self._segment, self._temporary)
            self._temporary = None


class StreamGradients:
    """The gradients of a call's streams (R, S, ...), put together from those of its tasks.

    The gradient of the only task is taken as it is.
    """

    def __init__(self, rows: Rows) -> None:
        plan = rows.plan
        self._rows, self._only = rows, len(plan.bands) == len(plan.segments) == 1
        self.whole = [] if self._only else [
            torch.empty_like(t, memory_format=torch.contiguous_format) for t in rows.streams
        ]

    def memory(self, band: slice, segment: Segment) -> list[Tensor]:
        """Return a task's slices of the gradients of q, k, v (G, NC, L, D), to compute them there.

        Empty where they have no memory of their own, as of `Rows.place`.
        """
        places = [self._rows.place(whole, band, segment) for whole in self.whole[:3]] if not self._only else [None]
        return [place for place in places if place is not None] if None not in places else []

    def put(self, index: int, band: slice, segment: Segment, part: Tensor) -> None:
        """Write the gradient of a task's stream (G, T, ...), of its tokens and maybe padding after them.

        The only task puts the gradients of its streams in order.
        """
        part = part[:, : segment.stop - segment.start]
        if self._only:
            self.whole.append(part.to(self._rows.streams[index].dtype).contiguous())
            return
        target = self.whole[index][band, segment.start:segment.stop]
        if part.data_ptr() != target.data_ptr():  # else it was computed there
            target.copy_(part)


def write_band(whole: State, band: slice, state: Sequence[Tensor]) -> None:
    """Write a band's state into that of all rows."""
    for all_rows, part in zip(whole, state, strict=True):
        all_rows[band] = part
