"""The `queued` schedule: tasks over bands and segments on worker threads, with a limit of tasks in flight."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from torch_xlstm_ops.kernels.mlstm import Kernels, State, empty_state
from torch_xlstm_ops.maths.nonfinite import finite_state
from torch_xlstm_ops.schedules import sequential
from torch_xlstm_ops.schedules.plan import Plan, Segment
from torch_xlstm_ops.schedules.queue import worker_threads
from torch_xlstm_ops.schedules.queue.band_queues import (
    BandQueue,
    ScanQueue,
    SegmentFunctions,
    SequentialQueue,
    Summary,
)
from torch_xlstm_ops.schedules.queue.task_runner import TaskRunner
from torch_xlstm_ops.schedules.slicing import OP, Rows, StreamGradients, write_band
from torch_xlstm_ops.schedules.token_by_token import fall_back


def forward(plan: Plan, kernels: Kernels, streams: Sequence[Tensor], state: State | None) -> tuple[Tensor, State]:
    """Return h (R, S, DHHV) and the last state; arguments as of `sequential.forward`."""
    if must_run_sequentially(streams[0].device):
        return sequential.forward(plan, kernels, streams, state)
    rows = Rows(plan, streams)
    h = rows.h  # allocated here, as tasks run on several threads
    whole = empty_state(streams, plan.rows)
    queues = []
    for band in plan.bands:
        first = None if state is None else [t[band] for t in state]
        queues.append(band_queue(plan, _segment_functions(plan, kernels, rows, band), first, band, whole))
    TaskRunner(plan, queues, h.device, OP, "forward").run()
    return h, whole


def backward(
    plan: Plan, kernels: Kernels, streams: Sequence[Tensor], state: State, dh: Tensor, dstate: State,
    cancel_remote: Callable[[], None] = lambda: None,
) -> tuple[list[Tensor], State]:
    """Return the gradients of the streams (R, S, ...) and of the initial state; arguments as of `sequential.backward`.

    cancel_remote: as of `TaskRunner`.
    """
    if must_run_sequentially(streams[0].device):
        return sequential.backward(plan, kernels, streams, state, dh, dstate)
    rows = Rows(plan, streams)
    gradients = StreamGradients(rows)
    queues = [_backward_queue(plan, kernels, rows, gradients, dh, band, state, dstate) for band in plan.bands]
    TaskRunner(plan, queues, dh.device, OP, "backward", cancel_remote).run()
    return gradients.whole, dstate


def must_run_sequentially(device: torch.device) -> bool:
    """Return whether no queue can be used: on a worker thread, and while a CUDA graph is captured."""
    return worker_threads.is_worker() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def _segment_functions(plan: Plan, kernels: Kernels, rows: Rows, band: slice) -> SegmentFunctions:
    segments = plan.segments
    return SegmentFunctions(
        forward=lambda number, state: sequential.run(kernels, rows, band, segments[number], state),
        summarize=lambda number: finite_or_none(kernels.summarize(rows.take_all(band, segments[number])[1:])),
        absorb=lambda summary, state: absorb(kernels, summary, state),
        forward_from_summary=lambda number, summary, state: _forward_summarised(
            kernels, rows, band, segments[number], summary, state
        ),
    )


def band_queue(
    plan: Plan, functions: SegmentFunctions, first: State | None, band: slice, whole: State
) -> BandQueue:
    """Return the tasks of a band.

    first: the state before them, None for zeros. whole: the state of all rows, into which they write the final state.
    """
    count, write = len(plan.segments), partial(write_band, whole, band)
    if plan.scan_width > 1 and count > 1:
        zeros = [torch.zeros_like(t[band]) for t in whole]
        return ScanQueue(count, plan.scan_width, zeros if first is None else first, functions, write)
    current = [first]

    def work(number: int) -> None:
        after = functions.forward(number, current[0])
        current[0] = after
        if number == count - 1:
            write(after)

    return SequentialQueue((number, partial(work, number)) for number in range(count))


def absorb(kernels: Kernels, summary: Summary, state: State) -> State:
    """Return the state after a segment from its summary; on the CPU a closed gate drops NaN and infinity."""
    if not finite_state(state):
        cut = summary[0] == -math.inf  # (G, 1), rows in which the segment has a closed gate
        state = [torch.where(cut.view(-1, *[1] * (t.dim() - 1)), 0.0, t) for t in state]
    return list(kernels.absorb([*summary[:4], *state]))


def _forward_summarised(
    kernels: Kernels, rows: Rows, band: slice, segment: Segment, summary: Summary, state: State
) -> None:
    """Write the h of a segment whose summary is known."""
    if finite_state(state):
        kernels.forward_from_summary(rows.take_all(band, segment), summary, state, rows.output(band, segment))
    else:
        fall_back(kernels, rows, band, segment, state)


def _backward_queue(
    plan: Plan, kernels: Kernels, rows: Rows, gradients: StreamGradients, dh: Tensor, band: slice, state: State,
    whole: State,
) -> BandQueue:
    first, last = [t[band] for t in state], [t[band] for t in whole]
    found = sequential.BandGradient(kernels, rows, gradients, dh, band, first, last)
    count = len(plan.segments)
    forth = [(number, partial(found.advance, number)) for number in range(count - 1)]
    back: list[tuple[int, Callable[[], None]]] = [(n, partial(found.retreat, n)) for n in reversed(range(count))]
    return SequentialQueue([*forth, *back, (0, lambda: write_band(whole, band, found.dstate))])


def finite_or_none(summary: Summary) -> Summary | None:
    """Return the summary, or None if it is not finite: a sum over tokens spreads NaN too far (used on the CPU)."""
    _, _, dC, dn, *_ = summary
    return summary if math.isfinite((dC.sum() + dn.sum()).item()) else None
