"""The sLSTM operators: one implementation for every device, fakes, autograd, autocast and vmap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops import trace
from torch_xlstm_ops.maths import aten, shapes, slstm
from torch_xlstm_ops.maths.shapes import check_not_negative, check_shape, state_dtype
from torch_xlstm_ops.maths.slstm import Product
from torch_xlstm_ops.ops.call_cache import CallCache
from torch_xlstm_ops.runtime import compiler, devices
from torch_xlstm_ops.schedules import slstm as schedule

from . import derivatives
from .derivatives import Derivative
from .dispatch import autocast, fake, implement, overload, step_threads
from .schemas import LIBRARY

OP = "slstm_sequence"
_Results = tuple[Tensor, ...]


class _Habit(NamedTuple):
    """What suits a kind of device: on the CPU found by measurement, elsewhere by counting launches."""

    lengths: schedule.Lengths
    piece: int  # tokens laid out at once, and recorded as one graph
    fused_bytes: int  # most bytes of R that the rows of a step may read for sums to beat a matrix product


_HABITS = {
    # Blocks of eight steps save the CPU an eighth of a forward pass (5.0 to 4.4 ms for 256 steps) and cost four times
    # the compilation (2.4 to 8.7 s), and a tail another.
    "cpu": _Habit(schedule.Lengths(block=1, replay=1, backward=1), piece=128, fused_bytes=0),
    # In a graph a step is one kernel, however long the block.
    "cuda": _Habit(schedule.Lengths(block=1, replay=1, backward=1), piece=1024, fused_bytes=32 << 20),
    "mps": _Habit(schedule.Lengths(block=4, replay=1, backward=1), piece=1024, fused_bytes=32 << 20),
}
graphs = schedule.Graphs()
compiler.forget_with(graphs.clear)


def _product(x: Tensor, r: Tensor) -> Product:
    read = x.shape[0] * r.numel() * r.element_size()
    return Product.FUSED if read <= _HABITS[x.device.type].fused_bytes else Product.MATMUL


def _product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which matrix products read R: only CUDA accumulates a narrow product in a wide dtype."""
    return x.dtype if x.device.type == "cuda" else state_dtype(x.dtype)


def _block_dtype(x: Tensor, product: Product) -> torch.dtype:
    """Return the dtype in which blocks read R; the meta function of CUDA's wide product fails on symbolic sizes."""
    return x.dtype if product is Product.FUSED else state_dtype(x.dtype)


def _kernels(x: Tensor, product: Product, masked: bool, floor: float) -> schedule.Kernels:
    def lookup(fn: compiler.PureFunction, **static: Any) -> schedule.Lookup:
        axes = slstm.axes(fn, product, masked)
        return lambda args: compiler.get(fn, axes, args, threads=threads, floor=floor, **static)

    def activate(args: list[Tensor]) -> object:
        fn = slstm.activate_
        return compiler.get(fn, slstm.axes(fn, product, False), args)(args)

    wide, threads = state_dtype(x.dtype), step_threads(x[:, 0, 0].numel())
    return schedule.Kernels(
        lengths=_HABITS[x.device.type].lengths, block=lookup(slstm.block_, product=product),
        activate=activate, replay=lookup(slstm.replay_), backward=lookup(slstm.block_backward_, product=product),
        products=slstm.recurrent_products, weight_gradients=slstm.weight_gradients,
        operand_gradient=lambda gates, r: slstm.operand_gradient(gates, r, wide, product),
    )


# --- checks ---


def _check_sequence(
    x: Tensor, r: Tensor, b: Tensor, y: Tensor | None, c: Tensor | None, n: Tensor | None, m: Tensor | None,
    reset: Tensor | None, floor: float,
) -> None:
    shapes.check_rank("x", x, "B S 4 NH DH")
    B, S, _, NH, DH = x.shape
    sizes = {"B": B, "S": S, "NH": NH, "DH": DH}
    check_shape("x", x, "B S 4 NH DH", sizes)
    _check_rest(x, r, b, {"y": y, "c": c, "n": n, "m": m}, sizes, floor)
    if reset is not None:
        shapes.check_reset(reset, sizes, x=x)


def _check_step(
    x: Tensor, r: Tensor, b: Tensor, y: Tensor, c: Tensor, n: Tensor, m: Tensor, floor: float
) -> None:
    shapes.check_rank("x", x, "B 4 NH DH")
    B, _, NH, DH = x.shape
    sizes = {"B": B, "NH": NH, "DH": DH}
    check_shape("x", x, "B 4 NH DH", sizes)
    _check_rest(x, r, b, {"y": y, "c": c, "n": n, "m": m}, sizes, floor)


def _check_rest(
    x: Tensor, r: Tensor, b: Tensor, state: dict[str, Tensor | None], sizes: dict[str, int], floor: float
) -> None:
    check_shape("r", r, "4 NH DH DH", sizes)
    check_shape("b", b, "4 NH DH", sizes)
    shapes.check_stream(x=x, r=r)
    shapes.check_floating(b=b)
    shapes.check_all_or_none(**state)
    given = {name: t for name, t in state.items() if t is not None}
    for name, t in given.items():
        check_shape(name, t, "B NH DH", sizes)
    shapes.check_state_dtype(x.dtype, **given)
    shapes.check_device(x=x, r=r, b=b, **given)
    check_not_negative("floor", floor)


def _check_gradients(dh: Tensor, dy: Tensor, dc: Tensor, dn: Tensor, dm: Tensor, x: Tensor, h: Tensor) -> None:
    B, S, _, NH, DH = x.shape
    sizes = {"B": B, "S": S, "NH": NH, "DH": DH}
    for name, t in (("dh", dh), ("h", h)):
        check_shape(name, t, "B S NH DH", sizes)
    for name, t in (("dy", dy), ("dc", dc), ("dn", dn), ("dm", dm)):
        check_shape(name, t, "B NH DH", sizes)
    shapes.check_stream(x=x, h=h)
    shapes.check_device(x=x, h=h, dh=dh, dy=dy, dc=dc, dn=dn, dm=dm)


# --- step ---

def _find_step(args: list[Tensor], floor: float) -> compiler.RawCallable:
    x, r, b, y, c, n, m = args
    _check_step(x, r, b, y, c, n, m, floor)
    axes = slstm.axes(slstm.step, Product.FUSED, False)
    threads = step_threads(y.numel())
    return compiler.get(slstm.step, axes, args, threads=threads, floor=floor, product=Product.FUSED)


_steps = CallCache(_find_step)


def _step(*args: Tensor, floor: float = 0.0) -> _Results:
    contiguous = [t.contiguous() for t in args]
    with devices.submission(args[0].device):
        if args[0].numel() == 0:
            return _step_fake(*contiguous, floor=floor)
        return tuple(_steps(contiguous, floor)(contiguous))


def _step_fake(
    x: Tensor, r: Tensor, b: Tensor, y: Tensor, c: Tensor, n: Tensor, m: Tensor, *, floor: float = 0.0
) -> _Results:
    _check_step(x, r, b, y, c, n, m, floor)
    return tuple(t.new_empty(t.shape) for t in (y, c, n, m))


def _step_gradients(*tensors: Tensor, floor: float = 0.0) -> Sequence[Tensor]:
    """Return a step's gradients: those of a sequence of one token.

    tensors: dy, dc, dn, dm, and what `_save` returns.
    """
    dy, dc, dn, dm, x, r, b, y, c, n, m, y_after, _ = tensors
    h = y_after.to(x.dtype)[:, None]
    args = (torch.zeros_like(h), dy, dc, dn, dm, x[:, None], r, b, y, c, n, m, h)
    dx, *others = overload("slstm_sequence_backward")(*args, floor=floor)
    return dx.squeeze(1), *others


# --- sequence ---


def _sequence(
    x: Tensor, r: Tensor, b: Tensor, y: Tensor | None = None, c: Tensor | None = None, n: Tensor | None = None,
    m: Tensor | None = None, reset: Tensor | None = None, *, floor: float = 0.0,
) -> _Results:
    _check_sequence(x, r, b, y, c, n, m, reset, floor)
    with devices.submission(x.device):
        state = _initial_state(x, (y, c, n, m))
        if x.numel() == 0:
            return x.new_empty(x[:, :, 0].shape), *state
        if not trace.active():
            return _forward(x, r, b, state, reset, floor)
        with trace.span(OP, device=x.device):
            return _forward(x, r, b, state, reset, floor)


def _forward(x: Tensor, r: Tensor, b: Tensor, state: list[Tensor], reset: Tensor | None, floor: float) -> _Results:
    product = _product(x, r)
    kernels = _kernels(x, product, reset is not None, floor)
    laid_out = slstm.weights(r, product, _block_dtype(x, product))
    h = x.new_empty(x[:, :, 0].shape)
    piece = _HABITS[x.device.type].piece
    for start in range(0, x.shape[1], piece):
        at = slice(start, start + piece)
        args = [x[:, at].transpose(0, 1), laid_out, b, *state, *_time_first(reset, at)]
        h_piece, *state = graphs.run(
            ("forward", product, floor), lambda contiguous: schedule.forward(kernels, *contiguous), args
        )
        h[:, at] = h_piece.transpose(0, 1)
    return h, *state


def _sequence_fake(
    x: Tensor, r: Tensor, b: Tensor, y: Tensor | None = None, c: Tensor | None = None, n: Tensor | None = None,
    m: Tensor | None = None, reset: Tensor | None = None, *, floor: float = 0.0,
) -> _Results:
    _check_sequence(x, r, b, y, c, n, m, reset, floor)
    B, S, _, NH, DH = x.shape
    wide = state_dtype(x.dtype)
    return x.new_empty((B, S, NH, DH)), *[x.new_empty((B, NH, DH), dtype=wide) for _ in range(4)]


def _sequence_backward(
    dh: Tensor, dy: Tensor, dc: Tensor, dn: Tensor, dm: Tensor, x: Tensor, r: Tensor, b: Tensor,
    y: Tensor | None, c: Tensor | None, n: Tensor | None, m: Tensor | None, h: Tensor, reset: Tensor | None = None,
    *, floor: float = 0.0,
) -> _Results:
    _check_sequence(x, r, b, y, c, n, m, reset, floor)
    _check_gradients(dh, dy, dc, dn, dm, x, h)
    with devices.submission(x.device):
        dstate = [t.clone(memory_format=torch.contiguous_format) for t in (dy, dc, dn, dm)]
        if x.numel() == 0:
            return *[torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (x, r, b)], *dstate
        state = _initial_state(x, (y, c, n, m))
        if not trace.active():
            return _backward(dh, dstate, x, r, b, state, h, reset, floor)
        with trace.span(OP, phase="backward", device=x.device):
            return _backward(dh, dstate, x, r, b, state, h, reset, floor)


def _backward(
    dh: Tensor, dstate: list[Tensor], x: Tensor, r: Tensor, b: Tensor, state: list[Tensor], h: Tensor,
    reset: Tensor | None, floor: float,
) -> _Results:
    product, dense = _product(x, r), _product_dtype(x)
    kernels = _kernels(x, product, reset is not None, floor)
    laid_out = slstm.weights_backward(r, product, _block_dtype(x, product))
    h_before = torch.cat([state[0].to(x.dtype)[:, None], h[:, :-1]], 1)
    if reset is not None:
        h_before = torch.where(reset[:, :, None, None], 0.0, h_before)
    args = [
        dh.to(dstate[0].dtype).transpose(0, 1), *dstate, x.transpose(0, 1), h_before.transpose(0, 1), laid_out,
        r.to(dense), b, *state[1:], *_time_first(reset, slice(None)),
    ]
    dgates, dr, db, *dstate = graphs.run(
        ("backward", product, floor), lambda ready: schedule.backward(kernels, ready[:5], *ready[5:]), args
    )
    return dgates.permute(2, 1, 0, 3, 4).contiguous(), dr.to(r.dtype), db.to(b.dtype), *dstate


def _sequence_backward_fake(
    dh: Tensor, dy: Tensor, dc: Tensor, dn: Tensor, dm: Tensor, x: Tensor, r: Tensor, b: Tensor,
    y: Tensor | None, c: Tensor | None, n: Tensor | None, m: Tensor | None, h: Tensor, reset: Tensor | None = None,
    *, floor: float = 0.0,
) -> _Results:
    _check_sequence(x, r, b, y, c, n, m, reset, floor)
    _check_gradients(dh, dy, dc, dn, dm, x, h)
    return tuple(t.new_empty(t.shape) for t in (x, r, b, dy, dc, dn, dm))


def _initial_state(x: Tensor, state: Sequence[Tensor | None]) -> list[Tensor]:
    """Return y, c, n, m (B, NH, DH), contiguous and fresh: copies of `state`, or zeros."""
    size = (x.shape[0], *x.shape[3:])
    return [
        x.new_zeros(size, dtype=state_dtype(x.dtype)) if t is None else t.clone(memory_format=torch.contiguous_format)
        for t in state
    ]


def _time_first(reset: Tensor | None, at: slice) -> tuple[Tensor, ...]:
    return () if reset is None else (reset[:, at].t(),)


# --- autograd and vmap ---


def _save(args: Sequence[Any], results: _Results) -> Sequence[Any]:
    """Return the arguments with h, or y after a step, before the reset mask; those that were left out are None."""
    args = [*args, *[None] * (8 - len(args))]
    return *args[:7], results[0], args[7]


def _gradients(*tensors: Tensor, **how: Any) -> Sequence[Tensor]:
    found: Sequence[Tensor] = overload("slstm_sequence_backward")(*tensors, **how)
    return found


class _Axes(NamedTuple):
    """Which axis of each argument and result holds the heads; None for one that has none."""

    arguments: tuple[int | None, ...]
    results: tuple[int, ...]


_STATE_HEADS = (1, 1, 1, 1)
_HEADS = {
    "slstm_step": _Axes((2, 1, 1, *_STATE_HEADS), _STATE_HEADS),
    "slstm_sequence": _Axes((3, 1, 1, *_STATE_HEADS, None), (2, *_STATE_HEADS)),
    "slstm_sequence_backward": _Axes((2, *_STATE_HEADS, 3, 1, 1, *_STATE_HEADS, 2, None), (3, 1, 1, *_STATE_HEADS)),
}


def _vmap(name: str) -> None:
    """Fold the mapped axis into the heads, which are independent in every argument but the reset mask."""
    op, heads = overload(name), _HEADS[name]

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any, **how: Any) -> Any:
        size = info.batch_size
        mapped = [
            (t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)) if isinstance(t, Tensor) else t
            for t, dim in zip(args, in_dims, strict=True)
        ]
        if any(axis is None and dim is not None for axis, dim in zip(heads.arguments, in_dims, strict=False)):
            rows = [op(*[t[row] if isinstance(t, Tensor) else t for t in mapped], **how) for row in range(size)]
            return tuple(torch.stack(parts) for parts in zip(*rows, strict=True)), (0,) * len(heads.results)
        folded = [
            t if not isinstance(t, Tensor) else t[0] if axis is None else t.movedim(0, axis).flatten(axis, axis + 1)
            for t, axis in zip(mapped, heads.arguments, strict=False)
        ]
        out = op(*folded, **how)
        return tuple(t.unflatten(a, (size, -1)) for t, a in zip(out, heads.results, strict=True)), heads.results

    torch.library.register_vmap(f"xlstm::{name}", rule, lib=LIBRARY)


_OPERATORS: dict[str, tuple[Callable[..., _Results], Callable[..., _Results]]] = {
    "slstm_step": (_step, _step_fake),
    "slstm_sequence": (_sequence, _sequence_fake),
    "slstm_sequence_backward": (_sequence_backward, _sequence_backward_fake),
}
for _name, (_implementation, _fake) in _OPERATORS.items():
    implement(_name, _implementation)
    fake(_name, _fake)
    _vmap(_name)
for _name, _derivative in {
    "slstm_step": Derivative(_step_fake, aten.slstm_step, derivatives.recorded(_save, _step_gradients)),
    "slstm_sequence": Derivative(_sequence_fake, aten.slstm_sequence, derivatives.recorded(_save, _gradients)),
    "slstm_sequence_backward": Derivative(
        _sequence_backward_fake, aten.slstm_sequence_backward, derivatives.by_pure(aten.slstm_sequence_backward)
    ),
}.items():
    derivatives.register(_name, _derivative)
for _name in ("slstm_step", "slstm_sequence"):
    autocast(_name, slice(0, 2))
