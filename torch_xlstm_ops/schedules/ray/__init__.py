"""Bands and segments on Ray actors: the queue of the queued schedule, each task done by a process, of any machine.

The caller keeps every state between segments and sends it with the slice of the streams that a task reads. A segment
that was summed up ahead is computed again from the state before it: its chunks' summaries are larger than its streams.

What is on a GPU is copied to the host by the calling thread, once, and the results back: no thread that hands out tasks
touches the device, which on MPS can crash the process where two do.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from torch_xlstm_ops.config import Config, Schedule
from torch_xlstm_ops.schedules import queue, sequential
from torch_xlstm_ops.schedules.plan import Machine, Plan, Shape, make
from torch_xlstm_ops.schedules.queue.band_queues import State, Steps, Summary
from torch_xlstm_ops.schedules.queue.job import Job
from torch_xlstm_ops.schedules.ray import actors
from torch_xlstm_ops.schedules.sequential import OP
from torch_xlstm_ops.schedules.slicing import Kernels, Rows, Run

HOST = torch.device("cpu")


def forward(plan: Plan, kernels: Kernels, streams: Sequence[Tensor], state: State) -> tuple[Tensor, State]:
    """Return h (R, S, DHHV) and the last state; arguments as of `sequential.forward`."""
    if queue.in_line(streams[0].device):
        return sequential.forward(plan, kernels, streams, state)
    device = streams[0].device
    pool = actors.get(device.type, plan.workers)
    run = pool.remote(partial(_run, plan.chunk_size, kernels))
    summarize = pool.remote(partial(_summarize, kernels))
    streams, state = _to(streams, HOST), _to(state, HOST)
    rows = Rows(plan, streams)
    h = streams[2].new_empty(plan.rows, plan.tokens, streams[2].shape[-1])
    lanes = [queue.lane(plan, _steps(plan, kernels, rows, h, band, run, summarize), band, state)
             for band in plan.bands]
    Job(plan, lanes, HOST, OP, "forward", pool.close).run()
    return h.to(device), _to(state, device)


def backward(
    plan: Plan, kernels: Kernels, streams: Sequence[Tensor], state: State, dh: Tensor, dstate: State
) -> tuple[list[Tensor], State]:
    """Return the gradients of the streams (R, S, ...) and of the initial state; arguments as `sequential.backward`."""
    if queue.in_line(streams[0].device):
        return sequential.backward(plan, kernels, streams, state, dh, dstate)
    device = dh.device
    pool = actors.get(device.type, plan.workers)
    remote = kernels._replace(after=_owned(pool.remote(kernels.after)), backward=_owned(pool.remote(kernels.backward)))
    gradients, first = queue.backward(plan, remote, _to(streams, HOST), _to(state, HOST), dh.to(HOST),
                                       _to(dstate, HOST), pool.close)
    return _to(gradients, device), _to(first, device)


def _steps(
    plan: Plan, kernels: Kernels, rows: Rows, h: Tensor, band: slice, run: Run, summarize: Run
) -> Steps:
    def streams(number: int) -> list[Tensor]:
        segment = plan.segments[number]
        return [t[band, segment.start:segment.stop] for t in rows.streams]

    def emit(number: int, state: State) -> State:
        found, *new = run([*streams(number), *state])
        segment = plan.segments[number]
        h[band, segment.start:segment.stop] = found
        return [t.clone() for t in new]  # what is found lies in the store

    def sum_up(number: int) -> Summary | None:
        found = summarize(rows.take_all(band, plan.segments[number])[1:])
        return [t.clone() for t in found] or None

    def answer(number: int, summary: Summary, state: State) -> None:
        emit(number, state)

    return Steps(emit, sum_up, lambda summary, state: queue.absorb(kernels, summary, state), answer)


def _to(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    return [t.to(device) for t in tensors]


def _owned(run: Run) -> Run:
    """Return a remote function whose results are ours, not the store's."""
    return lambda tensors: [t.clone() for t in run(tensors)]


def _run(chunk_size: int, kernels: Kernels, args: list[Tensor]) -> list[Tensor]:
    """Compute one task, on an actor: q, k, v, igate, fgate (G, T, ...), c, n, m (G, ...) -> h (G, T, DHHV), c, n, m."""
    q, k, v, igate, fgate, *state = args
    settings = Config(Schedule.INDUCTOR, chunk_size=chunk_size)
    (G, T, DHQK), DHHV = q.shape, v.shape[-1]
    plan = make(Shape(G, T, DHQK, DHHV), q.device.type, settings, Machine(torch.get_num_threads()))
    h, state = sequential.forward(plan, kernels, [t[None] for t in (q, k, v, igate, fgate)], [t.clone() for t in state])
    return [h, *state]


def _summarize(kernels: Kernels, args: list[Tensor]) -> Sequence[Tensor]:
    """Reduce one task to its monoid element F, M, dC, dn, on an actor; nothing where it is not finite."""
    return queue.finite(kernels.summarize(args)[:4]) or ()
