"""The mLSTM over a sequence, and its gradient."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from torch_xlstm_ops import config, trace
from torch_xlstm_ops.config import Schedule
from torch_xlstm_ops.maths import mlstm, packing
from torch_xlstm_ops.maths.shapes import EPS, state_dtype
from torch_xlstm_ops.ops.mlstm.arguments import Gradients, split
from torch_xlstm_ops.ops.mlstm.dispatch import Dispatch, dispatch
from torch_xlstm_ops.ops.operator import without_view
from torch_xlstm_ops.runtime import compiler, devices
from torch_xlstm_ops.runtime.cuda_graphs import Compute, CudaGraphs
from torch_xlstm_ops.schedules import sequential

Results = tuple[Tensor, ...]

graphs = CudaGraphs(first_calls=32, allowed=config.cuda_graphs)
compiler.forget_with(graphs.clear)


def run(
    *tensors: Tensor | None, chunk_size: int | None = None, schedule: str | None = None, eps: float = EPS
) -> Results:
    """Return h and the state c, n, m after a sequence; tensors: q k v igate fgate c? n? m? reset?."""
    arguments = split(tensors)
    streams, state, reset = arguments
    if reset is not None:
        arguments.check(eps)
        without_reset = functools.partial(run, chunk_size=chunk_size, schedule=schedule, eps=eps)
        return tuple(packing.forward(without_reset, reset, streams, state))
    call = dispatch((*streams, *state), chunk_size, schedule, eps)
    q, v = streams.q, streams.v
    with devices.submission(q.device):
        if v.numel() == 0:
            return v.new_empty(v.shape), *_copied(state, streams.q, v)
        initial = None if arguments.initial is None else _by_rows(arguments.initial, q)

        def compute(ready: Sequence[Tensor]) -> Results:
            h, final = call.schedule.forward(call.plan, call.kernels, ready[:5], list(ready[5:]) or None)
            return h, *final

        h, *final = _replayed("forward", call, eps, compute, [*streams, *(initial or ())])
        return without_view(h.view(v.shape)), *_by_heads(final, q)


def fake(
    *tensors: Tensor | None, chunk_size: int | None = None, schedule: str | None = None, eps: float = EPS
) -> Results:
    """Check the arguments of a sequence and allocate its results."""
    arguments = split(tensors)
    arguments.check(eps)
    config.for_call(schedule=schedule, chunk_size=chunk_size)
    q, v = arguments.streams.q, arguments.streams.v
    return (v.new_empty(v.shape), *(q.new_empty(size, dtype=state_dtype(q.dtype)) for size in _state_sizes(q, v)))


def run_backward(
    *tensors: Tensor | None, chunk_size: int | None = None, schedule: str | None = None, eps: float = EPS
) -> Results:
    """Return the gradients of q k v igate fgate c n m; tensors: dh dc dn dm, and those of `run`."""
    gradients, arguments = Gradients(*tensors[:4]), split(tensors[4:])  # type: ignore[arg-type]
    streams, state, reset = arguments
    if reset is not None:
        arguments.check(eps)
        without_reset = functools.partial(run_backward, chunk_size=chunk_size, schedule=schedule, eps=eps)
        return tuple(packing.backward(without_reset, reset, gradients, streams, state))
    call = dispatch((*streams, *state, *gradients), chunk_size, schedule, eps)
    q, v = streams.q, streams.v
    dh, *dstate = gradients
    with devices.submission(q.device):
        if v.numel() == 0:
            zeros = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in streams]
            return *zeros, *_copied(dstate, q, v)
        initial = () if arguments.initial is None else _by_rows(arguments.initial, q)

        def compute(ready: Sequence[Tensor]) -> Results:
            streams, dh, dstate = ready[:5], ready[5], list(ready[6:9])
            before = list(ready[9:]) or [torch.zeros_like(t) for t in dstate]
            found, dinitial = call.schedule.backward(call.plan, call.kernels, streams, before, dh, dstate)
            return *found, *dinitial

        args = [*streams, dh.flatten(0, 1), *_by_rows(dstate, q), *initial]
        found = _replayed("backward", call, eps, compute, args)
        of_streams = (without_view(g.view(t.shape)) for g, t in zip(found[:5], streams, strict=True))
        return *of_streams, *_by_heads(found[5:], q)


def fake_backward(
    *tensors: Tensor | None, chunk_size: int | None = None, schedule: str | None = None, eps: float = EPS
) -> Results:
    """Check the arguments of a gradient and allocate its results."""
    gradients, arguments = Gradients(*tensors[:4]), split(tensors[4:])  # type: ignore[arg-type]
    arguments.check(eps)
    gradients.check(arguments.streams)
    return tuple(t.new_empty(t.shape) for t in (*arguments.streams, *gradients[1:]))


def summarize(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, *, chunk_size: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reduce a sequence to its monoid element F, M (B, NH, 1), dC (B, NH, DHQK, DHHV), dn (B, NH, DHQK)."""
    streams = (q, k, v, igate, fgate)
    call = dispatch((*streams, None, None, None), chunk_size, "inductor", EPS)
    with devices.submission(q.device):
        bands = sequential.summaries(call.plan, call.kernels, streams)
        combined = zip(*[functools.reduce(mlstm.combine, segments) for segments in bands], strict=True)
        F, *rest = (torch.cat(rows) for rows in combined)
        M, dC, dn = _by_heads(rest, q)
    return F.view(M.shape), M, dC, dn


def save(args: Sequence[Tensor | None], results: Results) -> Sequence[Tensor | None]:
    """Return what the gradient reads: the arguments."""
    return args


def _replayed(
    what: str, call: Dispatch, eps: float, compute: Compute, args: Sequence[Tensor]
) -> Results:
    """Return ``compute(args)``, on CUDA by a graph where such calls come often and are small.

    While a trace is recorded nothing is replayed, as a graph has no segments to record, nor while plans are tuned.
    """
    found = None
    tuned = not isinstance(call.schedule, ModuleType)
    if call.plan.schedule in (Schedule.INDUCTOR, Schedule.RECURRENT) and not tuned and not trace.active():
        found = graphs.replay((what, call.plan, eps), compute, args)
    return compute(args) if found is None else found


def _state_sizes(q: Tensor, v: Tensor) -> tuple[tuple[int, ...], ...]:
    B, NH, _, DHQK = q.shape
    return (B, NH, DHQK, v.shape[-1]), (B, NH, DHQK), (B, NH, 1)


def _copied(state: Sequence[Tensor | None], q: Tensor, v: Tensor) -> list[Tensor]:
    """Return copies of a state, zeros for None."""
    return [
        torch.zeros(size, dtype=state_dtype(q.dtype), device=q.device) if t is None
        else t.clone(memory_format=torch.contiguous_format)
        for size, t in zip(_state_sizes(q, v), state, strict=True)
    ]


def _by_rows(state: Sequence[Tensor], q: Tensor) -> list[Tensor]:
    """Return a state (B, NH, ...) as (R, ...), contiguous; no schedule writes to it."""
    rows = q.shape[0] * q.shape[1]
    return [t.reshape(rows, *t.shape[2:]).contiguous() for t in state]


def _by_heads(state: Sequence[Tensor], q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a state (R, ...) as (B, NH, ...)."""
    c, n, m = (without_view(t.view(*q.shape[:2], *t.shape[1:])) for t in state)
    return c, n, m
