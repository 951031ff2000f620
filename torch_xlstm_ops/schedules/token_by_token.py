"""One task token by token, forward and back: the schedule `recurrent`, and on the CPU what is not finite.

In a matrix product 0 * NaN carries a NaN or an infinity to earlier tokens and past closed gates; in the recurrence it
touches what follows from it alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from torch_xlstm_ops.maths.shapes import state_dtype
from torch_xlstm_ops.schedules.plan import Segment
from torch_xlstm_ops.schedules.slicing import Kernels, Rows, Run

State = list[Tensor]


def finite(*tensors: Tensor) -> bool:
    """Return whether all is finite; elsewhere than on the CPU True, as looking would stall the device."""
    if tensors[0].device.type != "cpu":
        return True
    return math.isfinite(sum(t.sum(dtype=state_dtype(t.dtype)).item() for t in tensors))


def finite_state(state: State) -> bool:
    """Return whether c, n, m are finite, or m -inf; as of `finite`."""
    c, n, m = state
    return finite(c, n, m.clamp(min=0))


def step_through(kernels: Kernels, rows: Rows, band: slice, segment: Segment, state: State) -> State:
    """Compute one task: write its slice of h and return the state after it."""
    for t, (h, *after) in _steps(kernels, rows, band, range(segment.start, segment.stop), state):
        rows.h[None, band, t], state = h, after
    return [t[0] for t in state] if segment.stop > segment.start else state


def state_after(kernels: Kernels, rows: Rows, band: slice, segment: Segment, state: State) -> State:
    """Return only the state after a task."""
    return _states(kernels, rows, band, range(segment.start, segment.stop), state)[-1]


def gradient(
    kernels: Kernels, step_gradient: Run, rows: Rows, band: slice, segment: Segment, state: State, dh: Tensor,
    dstate: State,
) -> tuple[list[Tensor], State]:
    """Return a task's gradients of the streams (G, tokens, ...) and of the state before it.

    state: before the task; dh: (R, S, DHHV), of all; dstate: of the state after the task. States are computed twice,
    for some tokens at a time, so that few are held at once.
    """
    stretch = max(1, math.isqrt(segment.stop - segment.start))
    stretches = [
        range(start, min(start + stretch, segment.stop)) for start in range(segment.start, segment.stop, stretch)
    ]
    before = [state]
    for tokens in stretches[:-1]:
        before.append(_states(kernels, rows, band, tokens, before[-1])[-1])
    found = [torch.empty_like(t[band, segment.start:segment.stop]) for t in rows.streams]
    for tokens in reversed(stretches):
        states = _states(kernels, rows, band, tokens[:-1], before.pop())
        for t in reversed(tokens):
            parts = step_gradient([*_token(rows, band, t), *states.pop(), dh[band, t], *dstate])
            for whole, part in zip(found, parts[:5], strict=True):
                whole[:, t - segment.start] = part.view(whole[:, 0].shape)
            dstate = list(parts[5:])
    return found, dstate


def _states(kernels: Kernels, rows: Rows, band: slice, tokens: Iterable[int], state: State) -> list[State]:
    """Return the state before the first of the tokens and after each."""
    return [state, *([t[0] for t in after] for _, (_, *after) in _steps(kernels, rows, band, tokens, state))]


def _steps(
    kernels: Kernels, rows: Rows, band: slice, tokens: Iterable[int], state: State
) -> Iterator[tuple[int, Sequence[Tensor]]]:
    """Yield each token and h, c, n, m after it, in the step's shapes: one batch entry, G heads."""
    state = [t[None] for t in state]
    for t in tokens:
        results = kernels.step([*(x[None].contiguous() for x in _token(rows, band, t)), *state])
        state = list(results[1:])
        yield t, results


def _token(rows: Rows, band: slice, t: int) -> list[Tensor]:
    q, k, v, igate, fgate = (s[band, t] for s in rows.streams)
    return [q, k, v, igate[..., None], fgate[..., None]]
