"""The `inductor` schedule, the default: segments one after another, each with a few compiled calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from torch_xlstm_ops import trace
from torch_xlstm_ops.kernels.mlstm import Kernels, State, empty_state
from torch_xlstm_ops.maths.nonfinite import finite
from torch_xlstm_ops.schedules.plan import Plan, Segment
from torch_xlstm_ops.schedules.slicing import OP, Rows, StreamGradients, write_band
from torch_xlstm_ops.schedules.token_by_token import fall_back, gradient, state_after

Summary = tuple[Tensor, Tensor, Tensor, Tensor]  # F M dC dn


def forward(plan: Plan, kernels: Kernels, streams: Sequence[Tensor], state: State | None) -> tuple[Tensor, State]:
    """Return h (R, S, DHHV) and the final state.

    streams: q, k, v, igate, fgate (B, NH, S, ...). state: c, n, m by rows; None for zeros.
    """
    rows, bands = Rows(plan, streams), plan.bands
    whole: State = []
    for index, band in enumerate(bands):
        current = None if state is None else [t[band] for t in state]
        for number, segment in enumerate(plan.segments):
            if trace.active():
                with trace.span(OP, schedule=str(plan.schedule), band=index, segment=number, device=streams[2].device):
                    current = run(kernels, rows, band, segment, current)
            else:
                current = run(kernels, rows, band, segment, current)
        assert current is not None  # a call without tokens does not come here
        if len(bands) == 1:
            return rows.h, current
        whole = whole or empty_state(streams, plan.rows)
        write_band(whole, band, current)
    return rows.h, whole


def run(kernels: Kernels, rows: Rows, band: slice, segment: Segment, state: State | None) -> State:
    """Run one task: write its slice of h and return the state after it. state: None for zeros."""
    after = kernels.forward(rows.take_all(band, segment), state, rows.output(band, segment))
    return fall_back(kernels, rows, band, segment, state) if after is None else after


def summaries(plan: Plan, kernels: Kernels, streams: Sequence[Tensor]) -> Iterator[Iterator[Summary]]:
    """Yield the monoid elements of each band's segments; arguments as of `forward`."""
    rows = Rows(plan, streams)
    for band in plan.bands:
        yield (_element(kernels.summarize(rows.take_all(band, segment)[1:])) for segment in plan.segments)


def _element(found: Sequence[Tensor]) -> Summary:
    F, M, dC, dn = found[:4]
    return F, M, dC, dn


def backward(
    plan: Plan, kernels: Kernels, streams: Sequence[Tensor], state: State, dh: Tensor, dstate: State
) -> tuple[list[Tensor], State]:
    """Return the gradients of the streams (R, S, ...) and of the initial state, segments in reverse.

    Only the states between segments are kept; all else is recomputed.
    """
    rows = Rows(plan, streams)
    gradients = StreamGradients(rows)
    whole: State = []
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
        if len(plan.bands) == 1:
            return gradients.whole, found.dstate
        whole = whole or empty_state(streams, plan.rows)
        write_band(whole, band, found.dstate)
    return gradients.whole, whole


class BandGradient:
    """The backward pass of one band: forward over all segments but the last for the states, and back over all."""

    def __init__(
        self, kernels: Kernels, rows: Rows, gradients: StreamGradients, dh: Tensor, band: slice, state: State,
        dstate: State,
    ) -> None:
        self._kernels, self._rows, self._gradients, self._dh, self._band = kernels, rows, gradients, dh, band
        self._before = [state]
        self.dstate = dstate  # after all segments, the gradient of the initial state

    def advance(self, number: int) -> None:
        """Compute the state after segment `number`."""
        segment, before = self._rows.segments[number], self._before[-1]
        state = list(self._kernels.final_state([*self._rows.take_all(self._band, segment)[1:], *before]))
        if not finite(*state[:2]):
            state = state_after(self._kernels, self._rows, self._band, segment, before)
        self._before.append(state)

    def retreat(self, number: int) -> None:
        """Write the gradients of segment `number`'s streams.

        On the CPU token by token where a value is not finite: dq then is not, if the states are.
        """
        rows, band, segment, state = self._rows, self._band, self._rows.segments[number], self._before.pop()
        streams, dh = rows.take_all(band, segment), rows.gradient(self._dh, band, segment)
        memory = self._gradients.memory(band, segment)
        parts = self._kernels.backward([*streams, *state, dh, *self.dstate, *memory])
        if finite(*state[:2], *self.dstate, parts[0][..., 0]):
            self.dstate = list(parts[5:])
            parts = [t.flatten(1, 2) for t in parts[:5]]
        else:
            parts, self.dstate = gradient(self._kernels, rows, band, segment, state, self._dh, self.dstate)
        for index, part in enumerate(parts):
            self._gradients.put(index, band, segment, part)
