"""The sLSTM's sequences parallel in time, with the arguments and results of the sequential schedule."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_xlstm_ops import config
from torch_xlstm_ops.kernels.slstm import product_dtype
from torch_xlstm_ops.kernels.slstm_parallel import TOLERANCE, Caller, Kernels, compile_call, kernels
from torch_xlstm_ops.maths import slstm
from torch_xlstm_ops.maths.slstm import Product
from torch_xlstm_ops.maths.slstm.parallel import window as codes
from torch_xlstm_ops.ops.operator import without_view
from torch_xlstm_ops.runtime import compiler
from torch_xlstm_ops.runtime.cuda_graphs import CudaGraphs
from torch_xlstm_ops.schedules.slstm import parallel as schedule
from torch_xlstm_ops.schedules.slstm import rounds

_Results = tuple[Tensor, ...]
Forward = Callable[[Tensor, Tensor, Tensor, list[Tensor], Tensor | None, float], _Results]
Backward = Callable[
    [Tensor, list[Tensor], Tensor, Tensor, Tensor, list[Tensor], Tensor, Tensor | None, float], _Results
]
CHUNK = 8  # tokens of a chunk
WINDOW = {"mps": 2}  # times as long, where a launch costs more
GRADIENTS = 4.0  # times the tolerance
LIMITS = {
    torch.float64: rounds.Limits(first=16), torch.float32: rounds.Limits(first=10),
    torch.bfloat16: rounds.Limits(first=6), torch.float16: rounds.Limits(first=7),
}


def why_not(x: Tensor) -> str | None:
    """Return why tensors like x cannot run parallel in time here, or None."""
    if x.device.type == "cuda" and x.shape[-1] % 8:
        return f"DH must be a multiple of 8, got {x.shape[-1]}"
    if x.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "the stream must not be captured as a CUDA graph: the error is read from the device"
    return None


class Parallel:
    """Run sequences parallel in time; windows without a certificate run sequentially.

    forward, backward: the sequential schedule. caller: makes a callable of a function of the maths. limits: by dtype.
    """

    def __init__(
        self, forward: Forward, backward: Backward, graphs: CudaGraphs | None = None, caller: Caller = compile_call,
        limits: dict[torch.dtype, rounds.Limits] = LIMITS,
    ) -> None:
        self._forward, self._backward, self._caller, self._limits = forward, backward, caller, limits
        self._known = {dtype: rounds.KnownRounds(limit.first) for dtype, limit in limits.items()}
        self._graphs = graphs or CudaGraphs(capacity=16, allowed=config.cuda_graphs)
        compiler.forget_with(self._graphs.clear)
        compiler.forget_with(self.clear)
        self._reports = threading.local()

    @property
    def report(self) -> rounds.Report:
        """Return how the last call of this thread went."""
        return getattr(self._reports, "last", rounds.Report(0, 0.0, 0.0, 0, 0))

    def clear(self) -> None:
        """Forget how many rounds each kind of window needs."""
        for known in self._known.values():
            known.clear()

    def forward(
        self, x: Tensor, r: Tensor, b: Tensor, state: list[Tensor], reset: Tensor | None, floor: float
    ) -> _Results:
        """Return h (B, S, NH, DH) and the state y, c, n, m."""
        limits, tolerance = self._limits_of(x), TOLERANCE[x.dtype]
        found, dense = kernels(x, _masked(x, reset, limits), floor, tolerance, self._caller), product_dtype(x)

        def by_rounds(window: schedule.Window, state: _Results, k: int) -> tuple[_Results, Tensor]:
            def compute(ready: Sequence[Tensor]) -> _Results:
                x, r, *rest = ready
                laid_out = slstm.weights(r, Product.MATMUL, dense)
                h, *after = schedule.forward_window(found, k, window.length, _chunks(x, window), laid_out, *rest)
                return _tokens(h, window), *(t.clone() for t in after[:4]), torch.stack(after[4:])

            args = [x[:, window.at], r, b, *state, *_mask(x, reset, window, limits)[:1]]
            *results, flags = self._graphs.run(("forward", floor, k, window.length), compute, args)
            return tuple(results), flags

        def sequential(window: schedule.Window, state: _Results) -> _Results:
            return self._forward(x[:, window.at], r, b, list(state), _part(reset, window), floor)

        job = rounds.Job(_kind("forward", x, reset, floor), tolerance, limits, by_rounds, lambda f: f[1:], sequential)
        order = schedule.windows(x.shape[1], CHUNK, limits.window)
        parts, self._reports.last = rounds.solve(job, self._known[x.dtype], order, tuple(state))
        h = torch.cat([h for h, *_ in parts], 1) if len(parts) > 1 else without_view(parts[0][0])
        return h, *parts[-1][1:]

    def backward(
        self, dh: Tensor, dstate: list[Tensor], x: Tensor, r: Tensor, b: Tensor, state: list[Tensor], h: Tensor,
        reset: Tensor | None, floor: float,
    ) -> _Results:
        """Return the gradients of x, r, b, y, c, n, m; dstate: of y, c, n, m after the last token."""
        limits, tolerance = self._limits_of(x), GRADIENTS * TOLERANCE[x.dtype]
        masked = _masked(x, reset, limits)
        found, dense = kernels(x, masked, floor, tolerance, self._caller), product_dtype(x)
        order = schedule.windows(x.shape[1], CHUNK, limits.window)
        states = self._states(order, found, x, h, r, b, state, reset, floor)

        def by_rounds(window: schedule.Window, dstate: _Results, k: int) -> tuple[_Results, Tensor]:
            def compute(ready: Sequence[Tensor]) -> _Results:
                dh, dy, dc, dn, dm, x, h, r, *rest = ready
                dgates, dr, db, *before, error, residual = schedule.backward_window(
                    found, k, _chunks(_with_last(dh, dy), window), dc, dn, dm, _chunks(x, window), _chunks(h, window),
                    slstm.weights(r, Product.MATMUL, dense), slstm.weights_backward(r, Product.MATMUL, dense), *rest,
                )
                dx = dgates[:, : window.length].transpose(2, 3).contiguous()
                # The gradients of one window are those of the call: a graph may cast them too.
                weights = [dr.to(r.dtype), db.to(b.dtype)] if len(order) == 1 else [dr.to(dy.dtype), db]
                return dx, *weights, *(t.clone() for t in before), torch.stack([error, residual])

            args = [
                dh[:, window.at], *dstate, x[:, window.at], h[:, window.at], r, b, *states[window.start],
                *_mask(x, reset, window, limits),
            ]
            *results, flags = self._graphs.run(("backward", floor, k, window.length), compute, args)
            return tuple(results), flags

        def sequential(window: schedule.Window, dstate: _Results) -> _Results:
            at, (y, *cells) = window.at, states[window.start]
            before = [state[0] if window.start == 0 else y.to(state[0].dtype), *cells]
            return self._backward(
                dh[:, at], list(dstate), x[:, at], r, b, before, h[:, at],
                _part(reset, window), floor,
            )

        job = rounds.Job(_kind("backward", x, reset, floor), tolerance, limits, by_rounds, lambda f: f[3:], sequential)
        parts, self._reports.last = rounds.solve(job, self._known[x.dtype], order[::-1], tuple(dstate))
        if len(parts) == 1:
            dx, dr, db, *before = parts[0]
            dx = without_view(dx)
        else:
            dr, db = (torch.stack([part[i].to(dstate[0].dtype) for part in parts]).sum(0) for i in (1, 2))
            dx, before = torch.cat([part[0] for part in reversed(parts)], 1), [*parts[-1][3:]]
        return dx, dr.to(r.dtype), db.to(b.dtype), *before

    def _limits_of(self, x: Tensor) -> rounds.Limits:
        limits = self._limits[x.dtype]
        return limits._replace(window=limits.window * WINDOW.get(x.device.type, 1))

    def _states(
        self, order: list[schedule.Window], found: Kernels, x: Tensor, h: Tensor, r: Tensor, b: Tensor,
        state: list[Tensor], reset: Tensor | None, floor: float,
    ) -> dict[int, _Results]:
        """Return the state before each window, by its start; y as R is multiplied with it."""
        cells: _Results = (state[0].to(x.dtype), *state[1:])
        states = {0: cells}
        for window, after in itertools.pairwise(order):
            mask = _mask(x, reset, window, self._limits_of(x))[:1]

            def compute(ready: Sequence[Tensor], window: schedule.Window = window) -> _Results:
                x, h, r, *rest = ready
                laid_out = slstm.weights(r, Product.MATMUL, product_dtype(x))
                return schedule.replay_window(found, _chunks(x, window), _chunks(h, window), laid_out, *rest)

            args = [x[:, window.at], h[:, window.at], r, b, *cells, *mask]
            cells = self._graphs.run(("replay", floor, window.length), compute, args)
            cells = (h[:, after.start - 1].contiguous(), *cells)
            states[after.start] = cells
        return states


def _kind(what: str, x: Tensor, reset: Tensor | None, floor: float) -> tuple[object, ...]:
    """Return what windows have in common that need the same number of rounds."""
    return what, x.device, x.shape[0], x.shape[3:], reset is None, floor


def _chunks(t: Tensor, window: schedule.Window) -> Tensor:
    """Return a window (B, T, ...) in chunks (B, NC, L, ...), the last ones padded by zeros."""
    beyond = window.chunks * CHUNK - window.length
    padded = F.pad(t, (*(0, 0) * (t.dim() - 2), 0, beyond)) if beyond else t
    return torch.unflatten(padded, 1, (window.chunks, CHUNK))


def _tokens(t: Tensor, window: schedule.Window) -> Tensor:
    """Return a window in chunks (B, NC, L, ...) as (B, T, ...), contiguous."""
    return t.flatten(1, 2)[:, : window.length].contiguous()


def _masked(x: Tensor, reset: Tensor | None, limits: rounds.Limits) -> bool:
    """Return whether the windows of a call have masks: resets, or a last window that is padded."""
    last = schedule.windows(x.shape[1], CHUNK, limits.window)[-1]
    return reset is not None or last.length != last.chunks * CHUNK


def _mask(x: Tensor, reset: Tensor | None, window: schedule.Window, limits: rounds.Limits) -> tuple[Tensor, ...]:
    """Return the masks (B, NC, L) of a window's tokens and of those after each, or none where the call has none."""
    if not _masked(x, reset, limits):
        return ()
    mask = x.new_full((x.shape[0], window.chunks * CHUNK + 1), codes.PAD, dtype=torch.uint8)
    mask[:, : window.length] = codes.TOKEN if reset is None else reset[:, window.at].to(torch.uint8)
    mask[:, -1] = codes.TOKEN
    return tuple(torch.unflatten(part, 1, (window.chunks, CHUNK)) for part in (mask[:, :-1], mask[:, 1:]))


def _part(reset: Tensor | None, window: schedule.Window) -> Tensor | None:
    return None if reset is None else reset[:, window.at]


def _with_last(dh: Tensor, dy: Tensor) -> Tensor:
    """Return dh (B, T, NH, DH), wide, with dy added to its last token's."""
    return torch.cat([dh[:, :-1].to(dy.dtype), (dh[:, -1] + dy)[:, None]], 1)
