"""Bands and segments on Ray actors: the queue of the queued schedule, each task done by a process, of any machine.

The caller keeps every state between segments and sends it with the slice of the streams that a task reads. A segment
that was summed up ahead is computed again from the state before it: its chunks' summaries are larger than its streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from torch_xlstm_ops.config import Config, Schedule
from torch_xlstm_ops.schedules import inductor, queued
from torch_xlstm_ops.schedules.inductor import OP
from torch_xlstm_ops.schedules.job import Job
from torch_xlstm_ops.schedules.lanes import State, Steps, Summary
from torch_xlstm_ops.schedules.plan import Machine, Plan, Shape, make
from torch_xlstm_ops.schedules.ray import actors
from torch_xlstm_ops.schedules.tasks import Kernels, Rows, Run


def forward(plan: Plan, kernels: Kernels, streams: Sequence[Tensor], state: State) -> tuple[Tensor, State]:
    """Return h (R, S, DHHV) and the last state; arguments as of `inductor.forward`."""
    if queued.in_line(streams[0].device):
        return inductor.forward(plan, kernels, streams, state)
    pool = actors.get(streams[0].device.type, plan.workers)
    run = pool.remote(partial(_run, plan.chunk_size, kernels))
    summarize = pool.remote(partial(_summarize, kernels))
    rows = Rows(plan, streams)
    h = streams[2].new_empty(plan.rows, plan.tokens, streams[2].shape[-1])
    lanes = [queued.lane(plan, _steps(plan, kernels, rows, h, band, run, summarize), band, state)
             for band in plan.bands]
    Job(plan, lanes, h.device, OP, "forward", pool.close).run()
    return h, state


def backward(
    plan: Plan, kernels: Kernels, streams: Sequence[Tensor], state: State, dh: Tensor, dstate: State
) -> tuple[list[Tensor], State]:
    """Return the gradients of the streams (R, S, ...) and of the initial state; arguments as of `inductor.backward`."""
    if queued.in_line(streams[0].device):
        return inductor.backward(plan, kernels, streams, state, dh, dstate)
    device = dh.device
    pool = actors.get(device.type, plan.workers)
    remote = kernels._replace(
        after=_owned(pool.remote(kernels.after), device), backward=_owned(pool.remote(kernels.backward), device)
    )
    return queued.backward(plan, remote, streams, state, dh, dstate, pool.close)


def _steps(
    plan: Plan, kernels: Kernels, rows: Rows, h: Tensor, band: slice, run: Run, summarize: Run
) -> Steps:
    device = h.device

    def streams(number: int) -> list[Tensor]:
        segment = plan.segments[number]
        return [t[band, segment.start:segment.stop] for t in rows.streams]

    def emit(number: int, state: State) -> State:
        found, *new = run([*streams(number), *state])
        segment = plan.segments[number]
        h[band, segment.start:segment.stop] = found
        return [_own(t, device) for t in new]

    def sum_up(number: int) -> Summary | None:
        found = summarize(rows.take_all(band, plan.segments[number])[1:])
        return [_own(t, device) for t in found] or None

    def answer(number: int, summary: Summary, state: State) -> None:
        emit(number, state)

    return Steps(emit, sum_up, lambda summary, state: list(kernels.absorb([*summary, *state])), answer)


def _own(t: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of ours from one that lies in the store."""
    return t.to(device, copy=True)


def _owned(run: Run, device: torch.device) -> Run:
    return lambda tensors: [_own(t, device) for t in run(tensors)]


def _run(chunk_size: int, kernels: Kernels, args: list[Tensor]) -> list[Tensor]:
    """Compute one task, on an actor: q, k, v, igate, fgate (G, T, ...), c, n, m (G, ...) -> h (G, T, DHHV), c, n, m."""
    q, k, v, igate, fgate, *state = args
    settings = Config(Schedule.INDUCTOR, chunk_size=chunk_size)
    (G, T, DHQK), DHHV = q.shape, v.shape[-1]
    plan = make(Shape(G, T, DHQK, DHHV), q.device.type, settings, Machine(torch.get_num_threads()))
    h, state = inductor.forward(plan, kernels, [t[None] for t in (q, k, v, igate, fgate)], [t.clone() for t in state])
    return [h, *state]


def _summarize(kernels: Kernels, args: list[Tensor]) -> Sequence[Tensor]:
    """Reduce one task to its monoid element F, M, dC, dn, on an actor; nothing where it is not finite."""
    return queued.finite(kernels.summarize(args)[:4]) or ()
