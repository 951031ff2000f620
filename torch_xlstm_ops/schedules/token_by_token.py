"""One task token by token, forward and backward: for the schedule `recurrent`, and for NaN and infinity on the CPU.

In a matrix product 0 * NaN carries a NaN or an infinity to earlier tokens and past closed gates. In the recurrence it
reaches only the tokens and states that depend on it.

A trace shows these as the phases ``token_by_token`` and ``token_by_token_backward``, inside the task's own span.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from torch_xlstm_ops import trace
from torch_xlstm_ops.kernels.mlstm import Kernels, State
from torch_xlstm_ops.schedules.plan import Segment
from torch_xlstm_ops.schedules.slicing import OP, Rows


def step_through(kernels: Kernels, rows: Rows, band: slice, segment: Segment, state: State) -> State:
    """Run one task: write its slice of h and return the state after it."""
    for t, (h, *after) in _steps(kernels, rows, band, range(segment.start, segment.stop), state):
        rows.h[None, band, t], state = h, after
    return [t[0] for t in state] if segment.stop > segment.start else state


def fall_back(kernels: Kernels, rows: Rows, band: slice, segment: Segment, state: State | None) -> State:
    """Run one task whose chunkwise result is not finite, as `step_through`. state: None for zeros."""
    with _span(rows, band, segment, "token_by_token"):
        return step_through(kernels, rows, band, segment, rows.zero_state(band) if state is None else state)


def state_after(kernels: Kernels, rows: Rows, band: slice, segment: Segment, state: State) -> State:
    """Return only the state after a task."""
    with _span(rows, band, segment, "token_by_token"):
        return _states(kernels, rows, band, range(segment.start, segment.stop), state)[-1]


def gradient(
    kernels: Kernels, rows: Rows, band: slice, segment: Segment, state: State, dh: Tensor, dstate: State
) -> tuple[list[Tensor], State]:
    """Return a task's gradients of the streams (G, tokens, ...) and of the state before it.

    state: before the task; dh: (R, S, DHHV), of the whole call; dstate: gradient of the state after the task. States
    are computed twice, for sqrt(tokens) tokens at a time, so that few are held at once.
    """
    part_length = max(1, math.isqrt(segment.stop - segment.start))
    parts = [
        range(start, min(start + part_length, segment.stop))
        for start in range(segment.start, segment.stop, part_length)
    ]
    gradients = [torch.empty_like(t[band, segment.start:segment.stop]) for t in rows.streams]
    with _span(rows, band, segment, "token_by_token_backward"):
        before = [state]
        for tokens in parts[:-1]:
            before.append(_states(kernels, rows, band, tokens, before[-1])[-1])
        for tokens in reversed(parts):
            states = _states(kernels, rows, band, tokens[:-1], before.pop())
            for t in reversed(tokens):
                found = kernels.step_gradient([*_token(rows, band, t), *states.pop(), dh[band, t], *dstate])
                for whole, one in zip(gradients, found[:5], strict=True):
                    whole[:, t - segment.start] = one.view(whole[:, 0].shape)
                dstate = list(found[5:])
    return gradients, dstate


def _span(rows: Rows, band: slice, segment: Segment, phase: str) -> AbstractContextManager[object]:
    if not trace.active():
        return nullcontext()
    plan = rows.plan
    return trace.span(
        OP, schedule=str(plan.schedule), phase=phase, band=plan.bands.index(band),
        segment=plan.segments.index(segment), device=rows.streams[0].device,
    )


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
