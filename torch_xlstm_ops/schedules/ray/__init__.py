"""The `ray` schedule: the tasks of the queued schedule, each run by a Ray actor on any machine.

The caller keeps the states between segments and sends them with the slices of the streams that a task reads. The h of a
segment with a summary is computed from the state before it, as the chunk summaries are larger than the streams.

The calling thread copies tensors on a GPU to the host once, and the results back, so that the threads that submit tasks
do not use the device: on MPS two threads that do can crash the process.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from torch_xlstm_ops.config import Config, Schedule
from torch_xlstm_ops.kernels.mlstm import Kernels, Run, State, empty_state
from torch_xlstm_ops.schedules import queue, sequential
from torch_xlstm_ops.schedules.plan import Machine, Plan, Shape, make
from torch_xlstm_ops.schedules.queue.band_queues import SegmentFunctions, Summary
from torch_xlstm_ops.schedules.queue.task_runner import TaskRunner
from torch_xlstm_ops.schedules.ray import actor_pool
from torch_xlstm_ops.schedules.slicing import OP, Rows

HOST = torch.device("cpu")


def forward(plan: Plan, kernels: Kernels, streams: Sequence[Tensor], state: State | None) -> tuple[Tensor, State]:
    """Return h (R, S, DHHV) and the last state; arguments as of `sequential.forward`."""
    if queue.must_run_sequentially(streams[0].device):
        return sequential.forward(plan, kernels, streams, state)
    device = streams[0].device
    pool = actor_pool.get(device.type, plan.workers)
    forward_task = pool.remote(partial(_forward_task, plan.chunk_size, kernels))
    summarize = pool.remote(partial(_summarize, kernels))
    streams = _to(streams, HOST)
    state = empty_state(streams, plan.rows, zero=True) if state is None else _to(state, HOST)
    rows, whole = Rows(plan, streams), empty_state(streams, plan.rows)
    h = streams[2].new_empty(plan.rows, plan.tokens, streams[2].shape[-1])
    queues = []
    for band in plan.bands:
        functions = _segment_functions(plan, kernels, rows, h, band, forward_task, summarize)
        queues.append(queue.band_queue(plan, functions, [t[band] for t in state], band, whole))
    TaskRunner(plan, queues, HOST, OP, "forward", pool.close).run()
    return h.to(device), _to(whole, device)


def backward(
    plan: Plan, kernels: Kernels, streams: Sequence[Tensor], state: State, dh: Tensor, dstate: State
) -> tuple[list[Tensor], State]:
    """Return the gradients of the streams (R, S, ...) and of the initial state; arguments as of
    `sequential.backward`.
    """
    if queue.must_run_sequentially(streams[0].device):
        return sequential.backward(plan, kernels, streams, state, dh, dstate)
    device = dh.device
    pool = actor_pool.get(device.type, plan.workers)
    remote_backward = _owned(pool.remote(kernels.backward))
    remote = kernels._replace(
        final_state=_owned(pool.remote(kernels.final_state)),
        backward=lambda args: remote_backward(args[:12]),  # an actor cannot write into memory of ours
    )
    gradients, first = queue.backward(plan, remote, _to(streams, HOST), _to(state, HOST), dh.to(HOST),
                                       _to(dstate, HOST), pool.close)
    return _to(gradients, device), _to(first, device)


def _segment_functions(
    plan: Plan, kernels: Kernels, rows: Rows, h: Tensor, band: slice, forward_task: Run, summarize: Run
) -> SegmentFunctions:
    def streams(number: int) -> list[Tensor]:
        segment = plan.segments[number]
        return [t[band, segment.start:segment.stop] for t in rows.streams]

    def forward(number: int, state: State | None) -> State:
        assert state is not None  # the caller fills in zeros
        h_part, *new = forward_task([*streams(number), *state])
        segment = plan.segments[number]
        h[band, segment.start:segment.stop] = h_part
        return [t.clone() for t in new]  # results are read-only memory of the store

    def summarize_finite(number: int) -> Summary | None:
        found = summarize(rows.take_all(band, plan.segments[number])[1:])
        return [t.clone() for t in found] or None

    def forward_from_summary(number: int, summary: Summary, state: State) -> None:
        forward(number, state)

    return SegmentFunctions(forward, summarize_finite, partial(queue.absorb, kernels), forward_from_summary)


def _to(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    return [t.to(device) for t in tensors]


def _owned(run: Run) -> Run:
    """Return a remote function whose results are copied out of the store."""
    return lambda tensors: [t.clone() for t in run(tensors)]


def _forward_task(chunk_size: int, kernels: Kernels, args: list[Tensor]) -> list[Tensor]:
    """Run one task on an actor: q, k, v, igate, fgate (G, T, ...), c, n, m (G, ...) -> h (G, T, DHHV), c, n, m."""
    q, k, v, igate, fgate, *state = args
    settings = Config(Schedule.INDUCTOR, chunk_size=chunk_size)
    (G, T, DHQK), DHHV = q.shape, v.shape[-1]
    plan = make(Shape(G, T, DHQK, DHHV), q.device.type, settings, Machine(torch.get_num_threads()))
    h, state = sequential.forward(plan, kernels, [t[None] for t in (q, k, v, igate, fgate)], state)
    return [h, *state]


def _summarize(kernels: Kernels, args: list[Tensor]) -> Sequence[Tensor]:
    """Return the monoid element F, M, dC, dn of one task, on an actor; nothing if it is not finite."""
    return queue.finite_or_none(kernels.summarize(args)[:4]) or ()
