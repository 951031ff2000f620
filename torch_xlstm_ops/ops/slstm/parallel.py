"""The sLSTM's sequences parallel in time, with the arguments and results of the sequential schedule."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from torch_xlstm_ops import config
from torch_xlstm_ops.kernels.slstm import product_dtype
from torch_xlstm_ops.kernels.slstm_parallel import TOLERANCE, Caller, compile_call, kernels, ready_call
from torch_xlstm_ops.maths import slstm
from torch_xlstm_ops.maths.slstm import Product
from torch_xlstm_ops.ops.slstm import layout
from torch_xlstm_ops.ops.slstm.arguments import fresh_state
from torch_xlstm_ops.ops.slstm.plan import Plan
from torch_xlstm_ops.runtime import compiler
from torch_xlstm_ops.runtime.bounded_cache import BoundedCache
from torch_xlstm_ops.runtime.cuda_graphs import CudaGraphs
from torch_xlstm_ops.schedules.slstm import parallel as schedule
from torch_xlstm_ops.schedules.slstm import rounds

_Results = tuple[Tensor, ...]
Forward = Callable[[Tensor, Tensor, Tensor, list[Tensor], Tensor | None, float], _Results]
Backward = Callable[
    [Tensor, list[Tensor], Tensor, Tensor, Tensor, list[Tensor], Tensor, Tensor | None, float], _Results
]
WINDOW = {"mps": 2}  # times as long, where a launch costs more
TIMES = {"forward": 1.0, "backward": 4.0}  # of the tolerance
_PLANS = 256
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
        self._plans: BoundedCache[Hashable, Plan] = BoundedCache(_PLANS)
        compiler.forget_with(self._graphs.clear)
        compiler.forget_with(self.clear)
        self._reports = threading.local()

    @property
    def report(self) -> rounds.Report:
        """Return how the last call of this thread went."""
        return getattr(self._reports, "last", rounds.Report(0, 0.0, 0.0, 0, 0))

    def clear(self) -> None:
        """Forget plans, and how many rounds each kind of window needs."""
        self._plans.clear()
        for known in self._known.values():
            known.clear()

    def forward(
        self, x: Tensor, r: Tensor, b: Tensor, state: list[Tensor], reset: Tensor | None, floor: float,
        only_ready: bool = False,
    ) -> _Results:
        """Return h (B, S, NH, DH) and the state y, c, n, m; `state` before the first token may be empty.

        only_ready: raise `compiler.NotReady` instead of compiling.
        """
        plan, dense = self._plan("forward", x, reset, floor, only_ready), product_dtype(x)

        def by_rounds(window: schedule.Window, state: _Results, k: int) -> tuple[_Results, Tensor]:
            def compute(ready: Sequence[Tensor]) -> _Results:
                x, r, b, *rest = ready
                before, mask = (rest[:4], rest[4:]) if state else (fresh_state(x), rest)
                laid_out = slstm.weights(r, Product.MATMUL, dense)
                h, *after = schedule.forward_window(
                    plan.kernels, k, window.length, layout.chunks(x, window), laid_out, b, *before, *mask
                )
                return layout.tokens(h, window), *after[:4], torch.stack(after[4:])

            args = [layout.at(x, window), r, b, *state, *plan.masks(x, reset, window)[:1]]
            *results, flags = self._graphs.run(("forward", floor, k, window.length), compute, args)
            return tuple(results), flags

        def sequential(window: schedule.Window, state: _Results) -> _Results:
            before, part = list(state) or fresh_state(x), layout.part(reset, window)
            return self._forward(x[:, window.at], r, b, before, part, floor)

        job = rounds.Job(plan.kind, plan.tolerance, plan.limits, by_rounds, lambda f: f[1:], sequential)
        parts, self._reports.last = rounds.solve(job, self._known[x.dtype], plan.order, tuple(state))
        h = torch.cat([h for h, *_ in parts], 1) if len(parts) > 1 else parts[0][0]
        return tuple(layout.apart(t) for t in (h, *parts[-1][1:]))

    def backward(
        self, dh: Tensor, dstate: list[Tensor], x: Tensor, r: Tensor, b: Tensor, state: list[Tensor], h: Tensor,
        reset: Tensor | None, floor: float, only_ready: bool = False,
    ) -> _Results:
        """Return the gradients of x, r, b, y, c, n, m; dstate: of y, c, n, m after the last token.

        state: before the first token; it may be empty. only_ready: as of `forward`.
        """
        plan, dense = self._plan("backward", x, reset, floor, only_ready), product_dtype(x)
        states = self._states(plan, x, h, r, b, state, reset, floor)

        def by_rounds(window: schedule.Window, dstate: _Results, k: int) -> tuple[_Results, Tensor]:
            def compute(ready: Sequence[Tensor]) -> _Results:
                dh, dy, dc, dn, dm, x, h, r, b, *rest = ready
                before, masks = (rest[:4], rest[4:]) if states[window.start] else (_fresh_operand(x), rest)
                dgates, dr, db, *dbefore, error, residual = schedule.backward_window(
                    plan.kernels, k, layout.chunks(layout.with_last(dh, dy), window), dc, dn, dm,
                    layout.chunks(x, window), layout.chunks(h, window), slstm.weights(r, Product.MATMUL, dense),
                    slstm.weights_backward(r, Product.MATMUL, dense), b, *before, *masks,
                )
                dx = layout.gates_first(dgates[:, : window.length])
                # The gradients of one window are those of the call: a graph may cast them too.
                weights = [dr.to(r.dtype), db.to(b.dtype)] if len(plan.order) == 1 else [dr.to(dy.dtype), db]
                return dx, *weights, *dbefore, torch.stack([error, residual])

            args = [
                layout.at(dh, window), *dstate, layout.at(x, window), layout.at(h, window), r, b, *states[window.start],
                *plan.masks(x, reset, window),
            ]
            *results, flags = self._graphs.run(("backward", floor, k, window.length), compute, args)
            return tuple(results), flags

        def sequential(window: schedule.Window, dstate: _Results) -> _Results:
            at = window.at
            before = state if window.start == 0 else [t.to(dstate[0].dtype) for t in states[window.start]]
            before = list(before) or fresh_state(x)
            return self._backward(
                dh[:, at], list(dstate), x[:, at], r, b, before, h[:, at],
                layout.part(reset, window), floor,
            )

        job = rounds.Job(plan.kind, plan.tolerance, plan.limits, by_rounds, lambda f: f[3:], sequential)
        parts, self._reports.last = rounds.solve(job, self._known[x.dtype], plan.order[::-1], tuple(dstate))
        if len(parts) == 1:
            dx, dr, db, *before = parts[0]
        else:
            dr, db = (torch.stack([part[i].to(dstate[0].dtype) for part in parts]).sum(0) for i in (1, 2))
            dx, before = torch.cat([part[0] for part in reversed(parts)], 1), [*parts[-1][3:]]
        return tuple(layout.apart(t) for t in (dx, dr.to(r.dtype), db.to(b.dtype), *before))

    def _plan(self, what: str, x: Tensor, reset: Tensor | None, floor: float, only_ready: bool) -> Plan:
        """Return the plan of calls like this one."""
        key = what, x.device, x.dtype, x.shape, reset is None, floor, only_ready
        plan = self._plans.get(key)
        if plan is None:
            limits, tolerance = self._limits[x.dtype], TIMES[what] * TOLERANCE[x.dtype]
            limits = limits._replace(window=limits.window * WINDOW.get(x.device.type, 1))
            order = schedule.windows(x.shape[1], layout.CHUNK, limits.window)
            masked = reset is not None or order[-1].length != order[-1].chunks * layout.CHUNK
            kind = what, x.device, x.shape[0], x.shape[3:], reset is None, floor
            found = kernels(x, masked, floor, tolerance, ready_call if only_ready else self._caller)
            plan = self._plans.keep(key, Plan(found, limits, tolerance, order, masked, kind))
        return plan

    def _states(
        self, plan: Plan, x: Tensor, h: Tensor, r: Tensor, b: Tensor, state: list[Tensor], reset: Tensor | None,
        floor: float,
    ) -> dict[int, _Results]:
        """Return the state before each window, by its start; y as R is multiplied with it. Empty where it is fresh."""
        cells: _Results = (state[0].to(x.dtype), *state[1:]) if state else ()
        states = {0: cells}
        for window, after in itertools.pairwise(plan.order):

            def compute(ready: Sequence[Tensor], window: schedule.Window = window) -> _Results:
                x, h, r, b, *rest = ready
                before, mask = (rest[:4], rest[4:]) if states[window.start] else (_fresh_operand(x), rest)
                laid_out = slstm.weights(r, Product.MATMUL, product_dtype(x))
                return schedule.replay_window(
                    plan.kernels, layout.chunks(x, window), layout.chunks(h, window), laid_out, b, *before, *mask
                )

            args = [layout.at(x, window), layout.at(h, window), r, b, *cells, *plan.masks(x, reset, window)[:1]]
            cells = self._graphs.run(("replay", floor, window.length), compute, args)
            cells = (h[:, after.start - 1].contiguous(), *cells)
            states[after.start] = cells
        return states


def _fresh_operand(x: Tensor) -> list[Tensor]:
    """Return the state before the first token of x, y as R is multiplied with it."""
    y, *cells = fresh_state(x)
    return [y.to(x.dtype), *cells]
