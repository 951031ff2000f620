"""The sLSTM over a sequence, and its gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_xlstm_ops import config, trace
from torch_xlstm_ops.config import SLSTMSchedule
from torch_xlstm_ops.kernels.slstm import DEFAULTS, block_dtype, kernels, product_dtype, product_of
from torch_xlstm_ops.maths import slstm
from torch_xlstm_ops.maths.shapes import state_dtype
from torch_xlstm_ops.ops.slstm.arguments import check_gradients, check_sequence, fresh_state
from torch_xlstm_ops.ops.slstm.automatic import Automatic
from torch_xlstm_ops.ops.slstm.parallel import Parallel, why_not
from torch_xlstm_ops.runtime import compiler, devices
from torch_xlstm_ops.runtime.cuda_graphs import CudaGraphs
from torch_xlstm_ops.schedules.slstm import blocks

OP = "slstm_sequence"  # its name in traces
Results = tuple[Tensor, ...]

graphs = CudaGraphs(allowed=config.cuda_graphs)
compiler.forget_with(graphs.clear)


def run(
    x: Tensor, r: Tensor, b: Tensor, y: Tensor | None = None, c: Tensor | None = None, n: Tensor | None = None,
    m: Tensor | None = None, reset: Tensor | None = None, *, floor: float = 0.0, schedule: str | None = None,
) -> Results:
    """Return h and the state y, c, n, m after a sequence."""
    check_sequence(x, r, b, (y, c, n, m), reset, floor)
    chosen = _choose(x, schedule)
    with devices.submission(x.device):
        given = [t for t in (y, c, n, m) if t is not None]
        if x.numel() == 0:
            return x.new_empty(x[:, :, 0].shape), *_initial_state(x, given)

        def in_parallel(only_ready: bool) -> Results:
            return parallel.forward(x, r, b, given, reset, floor, only_ready)

        def sequentially() -> Results:
            return _forward(x, r, b, _initial_state(x, given), reset, floor)

        return _run("forward", x, reset, floor, chosen, in_parallel, sequentially)


def fake(
    x: Tensor, r: Tensor, b: Tensor, y: Tensor | None = None, c: Tensor | None = None, n: Tensor | None = None,
    m: Tensor | None = None, reset: Tensor | None = None, *, floor: float = 0.0, schedule: str | None = None,
) -> Results:
    """Check the arguments of a sequence and allocate its results."""
    check_sequence(x, r, b, (y, c, n, m), reset, floor)
    config.slstm_schedule(schedule)
    B, S, _, NH, DH = x.shape
    wide = state_dtype(x.dtype)
    return x.new_empty((B, S, NH, DH)), *[x.new_empty((B, NH, DH), dtype=wide) for _ in range(4)]


def run_backward(*tensors: Any, floor: float = 0.0, schedule: str | None = None) -> Results:
    """Return the gradients of x r b y c n m; tensors: dh dy dc dn dm x r b y? c? n? m? h reset?."""
    _check_backward(tensors, floor)
    dh, *given = tensors[:5]
    x, r, b, *before = tensors[5:12]
    h, *mask = tensors[12:]
    reset = mask[0] if mask else None
    chosen = _choose(x, schedule)
    with devices.submission(x.device):
        if x.numel() == 0:
            zeros = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (x, r, b)]
            return *zeros, *(t.clone(memory_format=torch.contiguous_format) for t in given)
        state = [t for t in before if t is not None]

        def in_parallel(only_ready: bool) -> Results:
            return parallel.backward(dh, given, x, r, b, state, h, reset, floor, only_ready)

        def sequentially() -> Results:
            return _backward(dh, given, x, r, b, _initial_state(x, state), h, reset, floor)

        return _run("backward", x, reset, floor, chosen, in_parallel, sequentially)


def fake_backward(*tensors: Any, floor: float = 0.0, schedule: str | None = None) -> Results:
    """Check the arguments of a gradient and allocate its results."""
    _check_backward(tensors, floor)
    return tuple(t.new_empty(t.shape) for t in (*tensors[5:8], *tensors[1:5]))


def save(args: Sequence[Any], results: Results) -> Sequence[Any]:
    """Return what the gradient reads: the arguments, None for those left out, with h before the reset mask."""
    args = [*args, *[None] * (8 - len(args))]
    return *args[:7], results[0], args[7]


def _choose(x: Tensor, schedule: str | None) -> SLSTMSchedule:
    """Return the schedule that is asked for; raise NotImplementedError if it is parallel and cannot be.

    auto is sequential where parallel cannot be.
    """
    asked = config.slstm_schedule(schedule)
    reason = None if asked is SLSTMSchedule.SEQUENTIAL else why_not(x)
    if reason is None:
        return asked
    if asked is SLSTMSchedule.PARALLEL:
        raise NotImplementedError(f"schedule must be auto or sequential here, got parallel ({reason})")
    return SLSTMSchedule.SEQUENTIAL


def _run(
    what: str, x: Tensor, reset: Tensor | None, floor: float, chosen: SLSTMSchedule,
    in_parallel: Callable[[bool], Results], sequentially: Callable[[], Results],
) -> Results:
    """Run a call by the schedule that is asked for."""
    def parallel_in_time(only_ready: bool) -> Results:
        return _traced(SLSTMSchedule.PARALLEL, what, x.device, lambda: in_parallel(only_ready))

    found = None
    if chosen is SLSTMSchedule.PARALLEL:
        found = parallel_in_time(False)
    elif chosen is SLSTMSchedule.AUTO:
        masked = reset is not None
        found = automatic.run(what, x, masked, floor, lambda: parallel_in_time(True), lambda: parallel.report)
    return _traced(SLSTMSchedule.SEQUENTIAL, what, x.device, sequentially) if found is None else found


def _traced(schedule: SLSTMSchedule, what: str, device: torch.device, run: Callable[[], Results]) -> Results:
    """Return ``run()``, with a span in the trace, and how its rounds went."""
    if not trace.active():
        return run()
    with trace.span(OP, schedule=str(schedule), phase=what, device=device) as span:
        found = run()
        if schedule is SLSTMSchedule.PARALLEL:
            report = parallel.report
            span.note(f"rounds {report.rounds}, estimated error {report.error:.1e}, residual {report.residual:.1e}, "
                      f"{report.fell_back} of {report.windows} windows sequential")
        return found


def _check_backward(tensors: Sequence[Any], floor: float) -> None:
    x, r, b, y, c, n, m, h, *reset = tensors[5:]
    check_sequence(x, r, b, (y, c, n, m), reset[0] if reset else None, floor)
    check_gradients(tensors[0], tuple(tensors[1:5]), x, h)


def _forward(x: Tensor, r: Tensor, b: Tensor, state: list[Tensor], reset: Tensor | None, floor: float) -> Results:
    product = product_of(x, r)
    functions = kernels(x, product, reset is not None, floor)
    laid_out = slstm.weights(r, product, block_dtype(x, product))
    h = x.new_empty(x[:, :, 0].shape)
    piece = DEFAULTS[x.device.type].piece
    for start in range(0, x.shape[1], piece):
        at = slice(start, start + piece)
        args = [x[:, at].transpose(0, 1), laid_out, b, *state, *_time_first(reset, at)]
        h_piece, *state = graphs.run(
            ("forward", product, floor), lambda contiguous: blocks.forward(functions, *contiguous), args
        )
        h[:, at] = h_piece.transpose(0, 1)
    return h, *state


def _backward(
    dh: Tensor, given: list[Tensor], x: Tensor, r: Tensor, b: Tensor, state: list[Tensor], h: Tensor,
    reset: Tensor | None, floor: float,
) -> Results:
    dstate = [t.clone(memory_format=torch.contiguous_format) for t in given]
    product, dense = product_of(x, r), product_dtype(x)
    functions = kernels(x, product, reset is not None, floor)
    laid_out = slstm.weights_backward(r, product, block_dtype(x, product))
    h_before = torch.cat([state[0].to(x.dtype)[:, None], h[:, :-1]], 1)
    if reset is not None:
        h_before = torch.where(reset[:, :, None, None], 0.0, h_before)
    args = [
        dh.to(dstate[0].dtype).transpose(0, 1), *dstate, x.transpose(0, 1), h_before.transpose(0, 1), laid_out,
        r.to(dense), b, *state[1:], *_time_first(reset, slice(None)),
    ]
    dgates, dr, db, *dstate = graphs.run(
        ("backward", product, floor), lambda ready: blocks.backward(functions, ready[:5], *ready[5:]), args
    )
    return dgates.permute(2, 1, 0, 3, 4).contiguous(), dr.to(r.dtype), db.to(b.dtype), *dstate


def _initial_state(x: Tensor, given: Sequence[Tensor]) -> list[Tensor]:
    """Return y, c, n, m (B, NH, DH), each contiguous: copies of those given, or zeros."""
    return [t.clone(memory_format=torch.contiguous_format) for t in given] or fresh_state(x)


def _time_first(reset: Tensor | None, at: slice) -> tuple[Tensor, ...]:
    return () if reset is None else (reset[:, at].t(),)


parallel = Parallel(_forward, _backward)
automatic = Automatic()
