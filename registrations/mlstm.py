"""The mLSTM operators: one implementation for every device, fakes, autograd, autocast and vmap."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from torch_xlstm_ops import config, schedules
from torch_xlstm_ops.config import Schedule
from torch_xlstm_ops.maths import aten, mlstm, packing
from torch_xlstm_ops.maths.shapes import (
    EPS,
    check_mlstm_sequence,
    check_mlstm_step,
    check_not_negative,
    check_shape,
    state_dtype,
)
from torch_xlstm_ops.ops import overlap
from torch_xlstm_ops.ops.call_cache import CallCache
from torch_xlstm_ops.runtime import compiler, devices, torch_internals
from torch_xlstm_ops.schedules import plan, sequential, tuned
from torch_xlstm_ops.schedules.machine import machine
from torch_xlstm_ops.schedules.slicing import Kernels, Run, initial_state

from . import derivatives
from .derivatives import Derivative
from .dispatch import autocast, fake, fresh, implement, mapped, overload, step_threads, vmap
from .schemas import LIBRARY

_Results = tuple[Tensor, Tensor, Tensor, Tensor]
AXES = mlstm.AXES


def _run(fn: compiler.PureFunction, *, strict: bool = False, **static: Any) -> Run:
    """Return a callable that compiles `fn` for the arguments it is called with.

    strict: raise RuntimeError where it cannot be compiled; else it runs uncompiled there.
    """
    def run(args: list[Tensor]) -> Sequence[Tensor]:
        call = compiler.get(fn, AXES[fn], args, **static)
        if strict and isinstance(call, compiler.Uncompiled):
            raise RuntimeError("the schedule that was asked for needs compiled kernels, which cannot be compiled here "
                               f"({call.reason}): use schedule auto, or install a C++ compiler")
        return call(args)

    return run


def _joined(run: Run) -> Run:
    """Return `run`, of `mlstm.advance`, with c in one piece."""
    def joined(args: list[Tensor]) -> Sequence[Tensor]:
        h, c, n, m = run(args)
        return h, _join(c), n, m

    return joined


def _join(c: Tensor) -> Tensor:
    """Return the c of `mlstm.advance` as (B, NH, DHQK, DHHV), a view."""
    return c if c.dim() == 4 else c.flatten(2, 3)


def _kernels(
    eps: float, *, opens: bool = False, single: bool = False, release_gil: bool = False, strict: bool = False
) -> Kernels:
    """Return the kernels of a call.

    opens: whether its first segments begin from an empty state; single: whether it is one chunk from an empty state;
    strict: whether they must be compiled.
    """
    def run(fn: compiler.PureFunction, **static: Any) -> Run:
        return _run(fn, strict=strict, release_gil=release_gil, **static)

    def with_scores(fn: compiler.PureFunction, **static: Any) -> Run:
        scored = run(fn, eps=eps, **static)
        return lambda args: scored([*args[:5], mlstm.scores(args[0], args[1]), *args[5:]])

    after_scores = run(mlstm.factors_from_summary, eps=eps)

    def answers(args: list[Tensor]) -> Sequence[Tensor]:
        q, k, igate, fgate, *rest = args
        return after_scores([q, igate, fgate, mlstm.scores(q, k), *rest])

    factors = with_scores(mlstm.gradient)

    def backward(args: list[Tensor]) -> Sequence[Tensor]:
        q, k, v, dh = *args[:3], args[8]
        P, dS, dq, dk, k_gated, ddC, *rest = factors(args)
        return *mlstm.finish_gradient(P, dS, dq, dk, k_gated, ddC, q, k, v, dh), *rest

    return Kernels(
        operands=with_scores(mlstm.segment_factors),
        opening=with_scores(mlstm.segment_factors_zero_state) if opens else None,
        single=with_scores(mlstm.segment_factors_single_chunk) if single else None,
        stand=mlstm.inter_chunk_states, emit=mlstm.write_output_, close=run(mlstm.final_state_),
        step=_joined(_run(mlstm.advance, eps=eps)), after=run(mlstm.final_state), backward=backward,
        summarize=run(mlstm.summarize), answers=answers, absorb=run(mlstm.absorb),
        step_gradient=lambda args: mlstm.step_gradient(*args, eps=eps),
    )


# --- step ---

def _find_step(args: list[Tensor], fn: compiler.PureFunction, eps: float) -> compiler.RawCallable:
    check_mlstm_step(*args)
    check_not_negative("eps", eps)
    run = compiler.get(fn, AXES[fn], args, threads=step_threads(args[5].numel()), eps=eps)
    return run if args[0].device.type != "mps" else functools.partial(_submit, run)


def _submit(run: compiler.RawCallable, args: list[Tensor]) -> Sequence[Tensor]:
    with devices.submission(args[0].device):
        return run(args)


_steps = CallCache(_find_step)


def _step(*args: Tensor, eps: float = 1e-6) -> _Results:
    given, run = list(args), _steps.hit(args, mlstm.advance, eps)
    if run is None:  # what is found again was found for contiguous tensors: no need to look at each
        given = [t.contiguous() for t in args]
        run = _steps(given, mlstm.advance, eps)
    h, c, n, m = run(given)
    return (h, c, n, m) if c.dim() == 4 else (h, fresh(_join(c)), n, m)


def _step_(*args: Tensor, eps: float = 1e-6) -> Tensor:
    given, run = list(args), _steps.hit(args, mlstm.step_, eps)
    if run is None and all(t.is_contiguous() for t in args[5:]):
        given = [t.contiguous() for t in args]
        run = _steps(given, mlstm.step_, eps)
    if run is None or not _memory.apart(run, given):
        return step_by_copy(*args, eps=eps)
    with devices.submission(args[0].device):
        (h,) = run(given)
    # A compiled kernel writes behind autograd's back.
    torch_internals.written([t for t in args[5:] if not t.is_inference()])
    return h


_memory = overlap.OverlapCheck(written=slice(5, 8))


def step_by_copy(*args: Tensor, eps: float = 1e-6) -> Tensor:
    """Find the state after a token, and then copy it over the old, whose memory may be shared with q, k, v, or gates.

    Raises ValueError where c, n, m share memory with each other, or a state's elements do among themselves.
    """
    c, n, m = args[5:]
    overlap.check_writable(c=c, n=n, m=m)
    return _step_and_copy(*[t.resolve_neg() for t in args[:5]], c, n, m, eps=eps)


def _step_and_copy(*args: Tensor, eps: float = 1e-6) -> Tensor:
    h, *new = overload("mlstm_step")(*args[:5], *[t.resolve_neg() for t in args[5:]], eps=eps)
    for state, value in zip(args[5:], new, strict=True):
        state.copy_(value)
    return h  # type: ignore[no-any-return]


def _step_vmap(info: Any, in_dims: Sequence[int | None], *args: Tensor, eps: float = 1e-6) -> tuple[Tensor, int]:
    """Find the new state with the mapped axis folded into the batch, and copy it over the old."""
    for name, dim in zip(("c", "n", "m"), in_dims[5:], strict=True):
        if dim is None:
            raise ValueError(f"{name} must be mapped where vmap maps another argument of mlstm_step_, got in_dims None")
    h, *new = mapped(overload("mlstm_step"), info.batch_size, in_dims, args, {"eps": eps})
    for state, dim, value in zip(args[5:], in_dims[5:], new, strict=True):
        state.movedim(cast(int, dim), 0).copy_(value)
    return h, 0


def _step_fake(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, c: Tensor, n: Tensor, m: Tensor, *, eps: float = 1e-6
) -> _Results:
    check_mlstm_step(q, k, v, igate, fgate, c, n, m)
    check_not_negative("eps", eps)
    return v.new_empty(v.shape), c.new_empty(c.shape), n.new_empty(n.shape), m.new_empty(m.shape)


def _step_fake_(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, c: Tensor, n: Tensor, m: Tensor, *, eps: float = 1e-6
) -> Tensor:
    return _step_fake(q, k, v, igate, fgate, c, n, m, eps=eps)[0]


def _step_gradients(*tensors: Tensor, eps: float = EPS) -> Sequence[Tensor]:
    """Return a step's gradients: those of a sequence of one token. tensors: dh, dc, dn, dm, and the arguments."""
    dh, dc, dn, dm, q, k, v, *rest = tensors
    args = (dh[:, :, None], dc, dn, dm, q[:, :, None], k[:, :, None], v[:, :, None], *rest)
    dq, dk, dv, *others = overload("mlstm_chunkwise_backward")(*args, eps=eps)
    return dq.squeeze(2), dk.squeeze(2), dv.squeeze(2), *others


# --- chunkwise ---


class _Route(NamedTuple):
    """How a checked call is carried out."""

    plan: plan.Plan
    schedule: ModuleType
    kernels: Kernels


def _find_route(tensors: Sequence[Tensor | None], cfg: config.Config, eps: float, training: bool) -> _Route:
    (q, k, v, igate, fgate), (c, n, m) = cast("list[Tensor]", tensors[:5]), tensors[5:8]
    check_mlstm_sequence(q, k, v, igate, fgate, c, n, m)
    check_not_negative("eps", eps)
    if len(tensors) > 8:
        dh, dc, dn, dm = cast("list[Tensor]", tensors[8:])
        _check_gradients(dh, dc, dn, dm, q, v)
    B, NH, S, DHQK = q.shape
    shape = plan.Shape(B * NH, S, DHQK, v.shape[-1])
    strict = cfg.schedule in (Schedule.INDUCTOR, Schedule.QUEUED)
    cfg = tuned.apply_tuned(cfg, shape, q.device, q.dtype, training=training)
    planned = plan.make(shape, q.device.type, cfg, machine(q.device, cfg.schedule))
    kind = q.device.type
    in_order = planned.schedule in (Schedule.INDUCTOR, Schedule.QUEUED) and planned.scan_width == 1
    empty = c is None and in_order and v.numel() > 0
    single = empty and len(planned.segments) == 1 and planned.segments[0].chunks == 1
    opens = empty and not single and mlstm.prefers_zero_state(kind)
    threaded = kind == "cpu" and planned.threaded
    kernels = _kernels(eps, opens=opens, single=single, release_gil=threaded, strict=strict)
    return _Route(planned, schedules.load(planned.schedule, q.device), kernels)


_routes = CallCache(_find_route)


def forget_routes() -> None:
    """Plan calls anew: the tuner has found something."""
    _routes.clear()


def _route(tensors: Sequence[Tensor | None], chunk_size: int | None, schedule: str | None, eps: float) -> _Route:
    cfg = config.for_call(schedule=schedule, chunk_size=chunk_size)
    find = _routes if cfg.mem_fraction is None else _find_route  # free memory is never the same twice
    q, k, v = tensors[:3]
    training = len(tensors) > 8 or q.requires_grad or k.requires_grad or v.requires_grad  # type: ignore[union-attr]
    return find(tensors, cfg, eps, training)


def _chunkwise(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor,
    c: Tensor | None = None, n: Tensor | None = None, m: Tensor | None = None, reset: Tensor | None = None,
    *, chunk_size: int | None = None, schedule: str | None = None, eps: float = 1e-6,
) -> _Results:
    if reset is not None:
        check_mlstm_sequence(q, k, v, igate, fgate, c, n, m, reset)
        run = functools.partial(_chunkwise, chunk_size=chunk_size, schedule=schedule, eps=eps)
        h, c_after, n_after, m_after = packing.forward(run, reset, (q, k, v, igate, fgate), (c, n, m))
        return h, c_after, n_after, m_after
    route = _route((q, k, v, igate, fgate, c, n, m), chunk_size, schedule, eps)
    with devices.submission(q.device):
        state = initial_state(q, v, (c, n, m), read=route.kernels.read_state)
        if v.numel() == 0:
            return v.new_empty(v.shape), *_shaped(state, q)
        h, state = route.schedule.forward(route.plan, route.kernels, (q, k, v, igate, fgate), state)
        return fresh(h.view(v.shape)), *_shaped(state, q)


def summarize(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, *, chunk_size: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reduce a sequence to its monoid element F, M (B, NH, 1), dC (B, NH, DHQK, DHHV), dn (B, NH, DHQK)."""
    streams = (q, k, v, igate, fgate)
    route = _route((*streams, None, None, None), chunk_size, "inductor", 1e-6)
    with devices.submission(q.device):
        bands = sequential.summaries(route.plan, route.kernels, streams)
        folded = zip(*[functools.reduce(mlstm.combine, segments) for segments in bands], strict=True)
        F, *rest = (torch.cat(rows) for rows in folded)
        M, dC, dn = _shaped(rest, q)
    return F.view(M.shape), M, dC, dn


def _chunkwise_fake(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor,
    c: Tensor | None = None, n: Tensor | None = None, m: Tensor | None = None, reset: Tensor | None = None,
    *, chunk_size: int | None = None, schedule: str | None = None, eps: float = 1e-6,
) -> _Results:
    check_mlstm_sequence(q, k, v, igate, fgate, c, n, m, reset)
    config.for_call(schedule=schedule, chunk_size=chunk_size)
    check_not_negative("eps", eps)
    (B, NH, _, DHQK), wide = q.shape, state_dtype(q.dtype)
    return (
        v.new_empty(v.shape), q.new_empty((B, NH, DHQK, v.shape[-1]), dtype=wide),
        q.new_empty((B, NH, DHQK), dtype=wide), q.new_empty((B, NH, 1), dtype=wide),
    )


def _chunkwise_backward(
    dh: Tensor, dc: Tensor, dn: Tensor, dm: Tensor,
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor,
    c: Tensor | None = None, n: Tensor | None = None, m: Tensor | None = None, reset: Tensor | None = None,
    *, chunk_size: int | None = None, schedule: str | None = None, eps: float = 1e-6,
) -> tuple[Tensor, ...]:
    streams = (q, k, v, igate, fgate)
    if reset is not None:
        check_mlstm_sequence(*streams, c, n, m, reset)
        run = functools.partial(_chunkwise_backward, chunk_size=chunk_size, schedule=schedule, eps=eps)
        return tuple(packing.backward(run, reset, (dh, dc, dn, dm), streams, (c, n, m)))
    route = _route((*streams, c, n, m, dh, dc, dn, dm), chunk_size, schedule, eps)
    with devices.submission(q.device):
        state, dstate = initial_state(q, v, (c, n, m)), initial_state(q, v, (dc, dn, dm))
        if v.numel() == 0:
            return *[torch.zeros_like(t, memory_format=torch.contiguous_format) for t in streams], *_shaped(dstate, q)
        gradients, dstate = route.schedule.backward(
            route.plan, route.kernels, streams, state, dh.flatten(0, 1), dstate
        )
        return *[fresh(g.view(t.shape)) for g, t in zip(gradients, streams, strict=True)], *_shaped(dstate, q)


def _chunkwise_backward_fake(
    dh: Tensor, dc: Tensor, dn: Tensor, dm: Tensor,
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor,
    c: Tensor | None = None, n: Tensor | None = None, m: Tensor | None = None, reset: Tensor | None = None,
    *, chunk_size: int | None = None, schedule: str | None = None, eps: float = 1e-6,
) -> tuple[Tensor, ...]:
    check_mlstm_sequence(q, k, v, igate, fgate, c, n, m, reset)
    _check_gradients(dh, dc, dn, dm, q, v)
    return tuple(t.new_empty(t.shape) for t in (q, k, v, igate, fgate, dc, dn, dm))


def _check_gradients(dh: Tensor, dc: Tensor, dn: Tensor, dm: Tensor, q: Tensor, v: Tensor) -> None:
    B, NH, S, DHQK = q.shape
    sizes = {"B": B, "NH": NH, "S": S, "DHQK": DHQK, "DHHV": v.shape[-1]}
    check_shape("dh", dh, "B NH S DHHV", sizes)
    check_shape("dc", dc, "B NH DHQK DHHV", sizes)
    check_shape("dn", dn, "B NH DHQK", sizes)
    check_shape("dm", dm, "B NH 1", sizes)


def _shaped(state: Sequence[Tensor], q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Part batch and heads again."""
    c, n, m = (fresh(t.view(*q.shape[:2], *t.shape[1:])) for t in state)
    return c, n, m


def _save(args: Sequence[Any], results: object) -> Sequence[Any]:
    return args


def _gradients(*tensors: Tensor, **how: Any) -> Sequence[Tensor]:
    found: Sequence[Tensor] = overload("mlstm_chunkwise_backward")(*tensors, **how)
    return found


_OPERATORS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "mlstm_step": (_step, _step_fake),
    "mlstm_step_": (_step_, _step_fake_),
    "mlstm_chunkwise": (_chunkwise, _chunkwise_fake),
    "mlstm_chunkwise_backward": (_chunkwise_backward, _chunkwise_backward_fake),
}
for _name, (_implementation, _fake) in _OPERATORS.items():
    implement(_name, _implementation)
    fake(_name, _fake)
compiler.INLINED[overload("mlstm_step")] = functools.partial(mlstm.step, eps=EPS)
_backward = aten.mlstm_chunkwise_backward
for _name, _derivative in {
    "mlstm_step": Derivative(_step_fake, aten.mlstm_step, derivatives.recorded(_save, _step_gradients)),
    "mlstm_step_": Derivative(_step_fake, aten.mlstm_step_, derivatives.refused(
        "mlstm_step_ is in place and not differentiable, but an input requires grad: use mlstm_step, "
        "mlstm_chunkwise, or torch.no_grad()"
    ), _step_and_copy),
    "mlstm_chunkwise": Derivative(_chunkwise_fake, aten.mlstm_chunkwise, derivatives.recorded(_save, _gradients)),
    "mlstm_chunkwise_backward": Derivative(_chunkwise_backward_fake, _backward, derivatives.by_pure(_backward)),
}.items():
    derivatives.register(_name, _derivative)
for _name in ("mlstm_step", "mlstm_step_", "mlstm_chunkwise"):
    autocast(_name, slice(0, 3))
for _name in ("mlstm_step", "mlstm_chunkwise", "mlstm_chunkwise_backward"):
    vmap(_name)
torch.library.register_vmap("xlstm::mlstm_step_", _step_vmap, lib=LIBRARY)
LIBRARY.impl("mlstm_step_", step_by_copy, "Negative")  # type: ignore[no-untyped-call]
