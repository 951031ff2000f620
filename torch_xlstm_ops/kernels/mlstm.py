"""The compiled functions of the mLSTM's sequence operators."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from torch_xlstm_ops.maths import mlstm
from torch_xlstm_ops.maths.nonfinite import finite
from torch_xlstm_ops.maths.shapes import state_dtype
from torch_xlstm_ops.runtime import compiler
from torch_xlstm_ops.runtime.uncompiled import Uncompiled

Run = Callable[[list[Tensor]], Sequence[Tensor]]
Compiled = Callable[..., Run]  # from a function and its keywords to the compiled function
State = list[Tensor]  # c (G, DHQK, DHHV), n (G, DHQK), m (G, 1)


class Output(Protocol):
    """Where a task writes its h."""

    def begin(self) -> Tensor:
        """Return memory for h (G*NC, L, DHHV)."""

    def end(self) -> None:
        """Take what was written there."""


class Kernels(NamedTuple):
    """Functions of contiguous tensors; shapes as in `maths.mlstm`, streams q k v igate fgate (G, NC, L, ...).

    The forward passes empty the list of streams before they ask for the memory of h, which can then take theirs. On the
    CPU `forward` returns None, and writes nothing, if the state after the segment is not finite: a matrix product
    carries NaN and infinity to tokens that the recurrence keeps them from.
    """

    # streams, the state before or None for zeros, h -> the state after
    forward: Callable[[list[Tensor], State | None, Output], State | None]
    # streams, their summary, the state before, h
    forward_from_summary: Callable[[list[Tensor], Sequence[Tensor], State, Output], None]
    summarize: Run  # k v igate fgate -> F M dC dn, and M dC dn of the chunks
    absorb: Run  # F M dC dn c n m -> c n m
    final_state: Run  # k v igate fgate c n m -> c n m
    # q k v igate fgate c n m dh dc dn dm, and maybe memory for the gradients of q, k and v -> their gradients
    backward: Run
    step: Run  # q k v igate fgate c n m -> h c n m, of one token
    step_gradient: Run  # of one token: q k v igate fgate c n m dh dc dn dm -> their gradients


def kernels(eps: float, *, release_gil: bool = False, strict: bool = False) -> Kernels:
    """Return the functions of a call.

    release_gil: compile those of a segment so that other threads run meanwhile. strict: raise RuntimeError where a
    function cannot be compiled; else it runs uncompiled there.
    """
    def compiled(fn: compiler.PureFunction, **static: Any) -> Run:
        return _compiled(fn, strict=strict, release_gil=release_gil, **static)

    return Kernels(
        forward=_forward(compiled, eps), forward_from_summary=_forward_from_summary(compiled, eps),
        summarize=compiled(mlstm.summarize), absorb=compiled(mlstm.absorb), final_state=compiled(mlstm.final_state),
        backward=_backward(compiled, eps), step=_step(_compiled(mlstm.advance, eps=eps)),
        step_gradient=lambda args: mlstm.step_gradient(*args, eps=eps),
    )


def _compiled(fn: compiler.PureFunction, *, strict: bool = False, **static: Any) -> Run:
    """Return a function that compiles `fn` for the arguments it is called with."""
    def run(args: list[Tensor]) -> Sequence[Tensor]:
        call = compiler.get(fn, mlstm.AXES[fn], args, **static)
        if strict and isinstance(call, Uncompiled):
            raise RuntimeError("the schedule that was asked for needs compiled kernels, which cannot be compiled here "
                               f"({call.reason}): use schedule auto, or {call.advice}")
        return call(args)

    return run


def _forward(compiled: Compiled, eps: float) -> Callable[[list[Tensor], State | None, Output], State | None]:
    """Return `Kernels.forward`: the only place that decides by the state and the number of chunks what to compute."""
    general, zero_state, single_chunk = (
        compiled(fn, eps=eps)
        for fn in (mlstm.segment_factors, mlstm.segment_factors_zero_state, mlstm.segment_factors_single_chunk)
    )
    final_state_ = compiled(mlstm.final_state_)

    def forward(streams: list[Tensor], state: State | None, out: Output) -> State | None:
        q, k, v = streams[:3]
        G, NC = v.shape[:2]
        q_gated = C_before = None
        # Only the functions hold the scores, so that they can free them.
        if state is None and NC == 1:
            P, *after = single_chunk([*streams, mlstm.scores(q, k)])
        elif state is None and mlstm.prefers_zero_state(v.device.type):
            P, q_gated, W, dC, n, m, keep, add = zero_state([*streams, mlstm.scores(q, k)])
            C_before = mlstm.inter_chunk_states(W, dC, None)
            after = [n.new_empty((*n.shape, v.shape[-1])), n, m]
            final_state_([dC, C_before, keep, add, after[0]])
            del W, dC
        else:
            state = empty_state(streams, G, zero=True) if state is None else state
            P, q_gated, W, dC, *after = general([*streams, mlstm.scores(q, k), *state])
        if not finite(*after[:2]):
            return None
        if q_gated is not None and C_before is None:
            C_before = mlstm.inter_chunk_states(W, dC, state[0])  # type: ignore[index]
            del W, dC
        del q, k
        streams.clear()
        _write(out, P, q_gated, C_before, v)
        return after

    return forward


def _forward_from_summary(compiled: Compiled, eps: float) -> Callable[..., None]:
    """Return `Kernels.forward_from_summary`."""
    factors = compiled(mlstm.factors_from_summary, eps=eps)

    def forward(streams: list[Tensor], summary: Sequence[Tensor], state: State, out: Output) -> None:
        (q, k, v, igate, fgate), (M, dC, dn), (c, n, m) = streams, summary[4:], state
        P, q_gated, W = factors([q, igate, fgate, mlstm.scores(q, k), M, dn, n, m])
        del q, k, igate, fgate
        streams.clear()
        _write(out, P, q_gated, mlstm.inter_chunk_states(W, dC, c), v)

    return forward


def _write(out: Output, P: Tensor, q_gated: Tensor | None, C_before: Tensor | None, v: Tensor) -> None:
    mlstm.write_output_(P, q_gated, C_before, v, out.begin())
    out.end()


def _backward(compiled: Compiled, eps: float) -> Run:
    """Return `Kernels.backward`."""
    factors = compiled(mlstm.gradient_, eps=eps)

    def backward(args: list[Tensor]) -> Sequence[Tensor]:
        (q, k, v), dh = args[:3], args[8]
        found = args[12:] or [torch.empty_like(t) for t in (q, k, v)]
        P, dS, k_gated, ddC, *rest = factors([*args[:5], mlstm.scores(q, k), *args[5:12], *found[:2]])
        mlstm.finish_gradient_(P, dS, k_gated, ddC, q, k, v, dh, *found)
        return *found, *rest

    return backward


def _step(advance: Run) -> Run:
    """Return `Kernels.step`: `mlstm.advance` with c in one piece."""
    def step(args: list[Tensor]) -> Sequence[Tensor]:
        h, c, n, m = advance(args)
        return h, in_one_piece(c), n, m

    return step


def in_one_piece(c: Tensor) -> Tensor:
    """Return the c of `mlstm.advance` as (B, NH, DHQK, DHHV), a view."""
    return c if c.dim() == 4 else c.flatten(2, 3)


def empty_state(streams: Sequence[Tensor], rows: int, *, zero: bool = False) -> State:
    """Return memory for c (rows, DHQK, DHHV), n (rows, DHQK), m (rows, 1). zero: filled with zeros."""
    q, v = streams[0], streams[2]
    new = functools.partial(torch.zeros if zero else torch.empty, dtype=state_dtype(q.dtype), device=q.device)
    DHQK = q.shape[-1]
    return [new((rows, DHQK, v.shape[-1])), new((rows, DHQK)), new((rows, 1))]
