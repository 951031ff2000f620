"""A bounded queue of tasks over bands and segments, on worker threads: for CPU cores, streams, and bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from torch_xlstm_ops.schedules import sequential
from torch_xlstm_ops.schedules.plan import Plan, Segment
from torch_xlstm_ops.schedules.queue import worker_threads
from torch_xlstm_ops.schedules.queue.band_queues import BandQueue, ScanQueue, SequentialQueue, State, Steps, Summary
from torch_xlstm_ops.schedules.queue.job import Job
from torch_xlstm_ops.schedules.sequential import OP
from torch_xlstm_ops.schedules.slicing import Kernels, Rows
from torch_xlstm_ops.schedules.token_by_token import finite_state, step_through


def forward(plan: Plan, kernels: Kernels, streams: Sequence[Tensor], state: State) -> tuple[Tensor, State]:
    """Return h (R, S, DHHV) and the last state; arguments as of `sequential.forward`."""
    if in_line(streams[0].device):
        return sequential.forward(plan, kernels, streams, state)
    rows = Rows(plan, streams)
    h = rows.h  # now: the tasks are on several threads
    lanes = [lane(plan, _steps(plan, kernels, rows, band), band, state) for band in plan.bands]
    Job(plan, lanes, h.device, OP, "forward").run()
    return h, state


def backward(
    plan: Plan, kernels: Kernels, streams: Sequence[Tensor], state: State, dh: Tensor, dstate: State,
    abandon: Callable[[], None] = lambda: None,
) -> tuple[list[Tensor], State]:
    """Return the gradients of the streams (R, S, ...) and of the initial state; arguments as of `sequential.backward`.

    abandon: as of `Job`.
    """
    if in_line(streams[0].device):
        return sequential.backward(plan, kernels, streams, state, dh, dstate)
    rows = Rows(plan, streams)
    gradients = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in rows.streams]
    lanes = [_lane_back(plan, kernels, rows, gradients, dh, band, state, dstate) for band in plan.bands]
    Job(plan, lanes, dh.device, OP, "backward", abandon).run()
    return gradients, dstate


def in_line(device: torch.device) -> bool:
    """Return whether no queue can be had here: on a worker, and while a CUDA graph is recorded."""
    return worker_threads.inside() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def _steps(plan: Plan, kernels: Kernels, rows: Rows, band: slice) -> Steps:
    segments = plan.segments
    return Steps(
        emit=lambda number, state: sequential.run(kernels, rows, band, segments[number], state),
        summarize=lambda number: finite(kernels.summarize(rows.take_all(band, segments[number])[1:])),
        absorb=lambda summary, state: absorb(kernels, summary, state),
        answer=lambda number, summary, state: _answer(kernels, rows, band, segments[number], summary, state),
    )


def lane(plan: Plan, steps: Steps, band: slice, whole: State) -> BandQueue:
    """Return the tasks of a band, which end by writing its last state into that of all rows."""
    count = len(plan.segments)
    if plan.scan_width > 1 and count > 1:
        first = [t[band].clone() for t in whole]  # the last state may be written while the first is still read
        return ScanQueue(count, plan.scan_width, first, steps, partial(_write, whole, band))
    current = [[t[band] for t in whole]]

    def work(number: int) -> None:
        current[0] = steps.emit(number, current[0])
        if number == count - 1:
            _write(whole, band, current[0])

    return SequentialQueue((number, partial(work, number)) for number in range(count))


def absorb(kernels: Kernels, summary: Summary, state: State) -> State:
    """Return the state after a segment from its summary; what is not finite ends at a closed gate (on the CPU)."""
    if not finite_state(state):
        cut = summary[0] == -math.inf  # (G, 1), whether the segment has a closed gate
        state = [torch.where(cut.view(-1, *[1] * (t.dim() - 1)), 0.0, t) for t in state]
    return list(kernels.absorb([*summary[:4], *state]))


def _answer(kernels: Kernels, rows: Rows, band: slice, segment: Segment, summary: Summary, state: State) -> None:
    """Write a summarised segment's h."""
    if not finite_state(state):
        step_through(kernels, rows, band, segment, state)
        return
    q, k, v, igate, fgate = rows.take_all(band, segment)
    (M, dC, dn), (c, n, m) = summary[4:], state
    P, q_gated, W = kernels.answers([q, k, igate, fgate, M, dn, n, m])
    sequential.emit(kernels, rows, band, segment, (P, q_gated, kernels.stand(W, dC, c), v))


def _lane_back(
    plan: Plan, kernels: Kernels, rows: Rows, gradients: list[Tensor], dh: Tensor, band: slice, state: State,
    whole: State,
) -> BandQueue:
    first, last = [t[band] for t in state], [t[band] for t in whole]
    found = sequential.BandGradient(kernels, rows, gradients, dh, band, first, last)
    count = len(plan.segments)
    forth = [(number, partial(found.advance, number)) for number in range(count - 1)]
    back: list[tuple[int, Callable[[], None]]] = [(n, partial(found.retreat, n)) for n in reversed(range(count))]
    return SequentialQueue([*forth, *back, (0, lambda: _write(whole, band, found.dstate))])


def finite(summary: Summary) -> Summary | None:
    """Return a summary unless it holds what is not finite, which a sum over tokens spreads too far (on the CPU)."""
    _, _, dC, dn, *_ = summary
    return summary if math.isfinite((dC.sum() + dn.sum()).item()) else None


def _write(whole: State, band: slice, state: State) -> None:
    for all_rows, part in zip(whole, state, strict=True):
        all_rows[band] = part
