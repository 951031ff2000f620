"""Segments one after another, each one compiled call: the default."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from torch_xlstm_ops import trace
from torch_xlstm_ops.schedules.plan import Plan, Segment
from torch_xlstm_ops.schedules.slicing import Kernels, Rows, Run
from torch_xlstm_ops.schedules.token_by_token import finite, gradient, state_after, step_through

OP = "mlstm_chunkwise"
Summary = tuple[Tensor, Tensor, Tensor, Tensor]  # F M dC dn
# P q_gated C_before v, the arguments of `write_output_`
Factors = tuple[Tensor, Tensor | None, Tensor | None, Tensor]


def forward(
    plan: Plan, kernels: Kernels, streams: Sequence[Tensor], state: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Return h (R, S, DHHV) and the last state.

    streams: q, k, v, igate, fgate as the op has them. state: c, n, m by row, fresh: they may be written.
    """
    rows = Rows(plan, streams)
    for index, band in enumerate(plan.bands):
        current = [t[band] for t in state]
        for number, segment in enumerate(plan.segments):
            if trace.active():
                with trace.span(OP, schedule=str(plan.schedule), band=index, segment=number, device=streams[2].device):
                    current = run(kernels, rows, band, segment, current)
            else:
                current = run(kernels, rows, band, segment, current)
        state = _keep(state, band, current)
    return rows.h, state


def run(kernels: Kernels, rows: Rows, band: slice, segment: Segment, state: list[Tensor]) -> list[Tensor]:
    """Compute one task: write its slice of h and return the state after it."""
    factors, new = _factors(kernels, rows.take_all(band, segment), state, first=segment.start == 0)
    if factors is None:
        return step_through(kernels, rows, band, segment, new)
    emit(kernels, rows, band, segment, factors)
    return new


def _factors(
    kernels: Kernels, streams: list[Tensor], state: list[Tensor], *, first: bool
) -> tuple[Factors | None, list[Tensor]]:
    """Return what a segment's h is the product of, and the state after it.

    On the CPU, where the state after it is not finite: None, and the state before it.
    """
    v = streams[2]
    if first and kernels.opening is not None:
        P, q_gated, W, dC, n, m, keep, add = kernels.opening(streams)
        C_before = kernels.stand(W, dC, None)
        kernels.close([dC, C_before, keep, add, state[0]])
        return (P, q_gated, C_before, v), [state[0], n, m]
    if kernels.single is not None:
        P, *new = kernels.single(streams)
        if finite(*new[:2]):
            return (P, None, None, v), new
        return None, [t.zero_() for t in state]
    P, q_gated, W, dC, *new = kernels.operands([*streams, *state])
    if finite(*new[:2]):
        return (P, q_gated, kernels.stand(W, dC, state[0]), v), new
    return None, state


def summaries(plan: Plan, kernels: Kernels, streams: Sequence[Tensor]) -> Iterator[Iterator[Summary]]:
    """Yield the monoid elements of each band's segments; arguments as of `forward`."""
    rows = Rows(plan, streams)
    for band in plan.bands:
        yield (_element(kernels.summarize(rows.take_all(band, segment)[1:])) for segment in plan.segments)


def _element(found: Sequence[Tensor]) -> Summary:
    F, M, dC, dn = found[:4]
    return F, M, dC, dn


def emit(kernels: Kernels, rows: Rows, band: slice, segment: Segment, factors: Factors) -> None:
    """Multiply a task's factors into its slice of h."""
    P, v = factors[0], factors[-1]
    slot = rows.slot(rows.h, band, segment)
    out = v.new_empty(P.shape[0], *v.shape[2:]) if slot is None else slot
    kernels.emit(*factors, out)
    if slot is None:
        rows.put(rows.h, band, segment, out.view(v.shape))


def backward(
    plan: Plan, kernels: Kernels, streams: Sequence[Tensor], state: list[Tensor], dh: Tensor, dstate: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the gradients of the streams (R, S, ...) and of the initial state, segments in reverse.

    Only the state at each boundary is kept; everything else is computed again.
    """
    rows = Rows(plan, streams)
    gradients = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in rows.streams]
    for index, band in enumerate(plan.bands):
        found = BandGradient(kernels, rows, gradients, dh, band, [t[band] for t in state], [t[band] for t in dstate])
        numbers = range(len(plan.segments))
        for number in numbers[:-1]:
            found.advance(number)
        for number in reversed(numbers):
            if trace.active():
                schedule = str(plan.schedule)
                with trace.span(OP, schedule=schedule, phase="backward", band=index, segment=number, device=dh.device):
                    found.retreat(number)
            else:
                found.retreat(number)
        dstate = _keep(dstate, band, found.dstate)
    return gradients, dstate


class BandGradient:
    """The backward pass of one band: forth over its segments but the last for the states between, and back over all."""

    def __init__(
        self, kernels: Kernels, rows: Rows, gradients: list[Tensor], dh: Tensor, band: slice, state: list[Tensor],
        dstate: list[Tensor],
    ) -> None:
        self._kernels, self._rows, self._gradients, self._dh, self._band = kernels, rows, gradients, dh, band
        self._before = [state]
        self.dstate = dstate  # after all segments, that of the initial state

    def advance(self, number: int) -> None:
        """Find the state after segment `number`."""
        segment, before = self._rows.segments[number], self._before[-1]
        state = list(self._kernels.after([*self._rows.take_all(self._band, segment)[1:], *before]))
        if not finite(*state[:2]):
            state = state_after(self._kernels, self._rows, self._band, segment, before)
        self._before.append(state)

    def retreat(self, number: int) -> None:
        """Write the gradients of segment `number`'s streams.

        On the CPU token by token where anything is not finite: that makes dq so, if it is not in the states.
        """
        rows, band, segment, state = self._rows, self._band, self._rows.segments[number], self._before.pop()
        streams, dh = rows.take_all(band, segment), rows.gradient(self._dh, band, segment)
        parts = self._kernels.backward([*streams, *state, dh, *self.dstate])
        step_gradient = self._kernels.step_gradient
        if step_gradient is not None and not finite(*state[:2], *self.dstate, parts[0][..., 0]):
            self._retreat_by_steps(step_gradient, segment, state)
            return
        for index, (whole, part) in enumerate(zip(self._gradients, parts[:5], strict=True)):
            all_of_it = part.shape[0] == whole.shape[0] and part.shape[1] * part.shape[2] == whole.shape[1]
            if all_of_it and part.dtype == whole.dtype:
                self._gradients[index] = part
            else:
                rows.put(whole, band, segment, part)
        self.dstate = list(parts[5:])

    def _retreat_by_steps(self, step_gradient: Run, segment: Segment, state: list[Tensor]) -> None:
        rows, band = self._rows, self._band
        found, self.dstate = gradient(
            self._kernels, step_gradient, rows, band, segment, state, self._dh, self.dstate
        )
        for index, part in enumerate(found):
            if part.shape == self._gradients[index].shape:
                self._gradients[index] = part
            else:
                self._gradients[index][band, segment.start:segment.stop] = part


def _keep(state: list[Tensor], band: slice, current: list[Tensor]) -> list[Tensor]:
    """Put a band's state into that of all rows."""
    if current[0].shape == state[0].shape:
        return current
    for whole, part in zip(state, current, strict=True):
        whole[band] = part
    return state
