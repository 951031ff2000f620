"""What is learned of one kind of call in this process: its controller, its times, and what is kept of it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from torch_xlstm_ops import trace
from torch_xlstm_ops.config import Config, tuned_plans
from torch_xlstm_ops.kernels.mlstm import Kernels
from torch_xlstm_ops.runtime import forks
from torch_xlstm_ops.runtime.bounded_cache import BoundedCache
from torch_xlstm_ops.runtime.state import on_reset
from torch_xlstm_ops.schedules.online import arms, keep, policies
from torch_xlstm_ops.schedules.online.budget import Budget
from torch_xlstm_ops.schedules.online.controller import Arm, Change, Controller
from torch_xlstm_ops.schedules.online.timer import Timer
from torch_xlstm_ops.schedules.plan import Plan, Shape

OP = "tune"  # the name of the spans
KEEP_SECONDS = 1.0  # between two attempts to write the file
CAPACITY = 256  # kinds of call
_Result = TypeVar("_Result")


class Way(Protocol):
    """How a call is carried out."""

    @property
    def plan(self) -> Plan: ...
    @property
    def schedule(self) -> Any: ...  # a module of schedules
    @property
    def kernels(self) -> Kernels: ...


class Use(NamedTuple):
    """What calls of a kind have in common with this one."""

    shape: Shape
    device: torch.device
    dtype: torch.dtype
    training: bool  # whether a gradient is wanted
    gradient: bool  # whether this call computes it

    @property
    def kind(self) -> tuned_plans.CallKind:
        """Return the key of tuned plans."""
        return tuned_plans.call_kind(self.device, self.dtype, *self.shape, training=self.training)


class Learner:
    """One kind of call; every method may be called from any thread."""

    def __init__(self, asked: Config, used: Config, use: Use) -> None:
        self._kind, self._tuned, self._device = use.kind, asked.tuned, use.device
        largest = use.shape._replace(rows=self._kind.rows, tokens=self._kind.tokens)
        self.candidates = arms.candidates(asked, used, largest, use.device, gradient=use.gradient)
        seconds = arms.COMPILE_SECONDS.get(use.device.type, 10.0)
        self.controller = Controller(
            [Arm(c.name, seconds if c.compiles else 0.0) for c in self.candidates], policies.make(asked.tune),
            _budgets.keep((use.device, use.dtype, use.shape.DHQK, use.shape.DHHV), Budget()),
        )
        self._timer, self._phase = Timer(use.device), "backward" if use.gradient else "forward"
        free = all(getattr(asked, field) is None for field in tuned_plans.FIELDS if field != "schedule")
        # A forward pass with gradient shares its entry with the gradient; what the user set is not for later processes.
        self._keeps = free and use.training == use.gradient
        self._unkept: dict[str, Any] | None = None
        self._tried_to_keep = -KEEP_SECONDS
        self._lock = forks.new_lock()

    def run(self, way_of: Callable[[int], Way], call: Callable[[Way], _Result], tokens: int) -> _Result:
        """Return what a call returns by the plan that the controller chooses.

        way_of: how to carry it out by the number of a candidate. A plan that raises RuntimeError is not tried again,
        and the call is carried out without tuning.
        """
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return call(way_of(self.controller.leader))
        self._timer.read()
        self._keep_now()
        decision = self.controller.decide()
        began = time.perf_counter()
        try:
            return self._timed(way_of(decision.arm), call, decision.arm, decision.reason, tokens)
        except RuntimeError as error:
            if decision.arm == 0:
                raise
            lost = time.perf_counter() - began
            self.controller.fail(decision.arm, lost, f"{type(error).__name__}: {error}".splitlines()[0][:200])
        return call(way_of(0))

    def _timed(self, way: Way, call: Callable[[Way], _Result], arm: int, reason: str, tokens: int) -> _Result:
        told = functools.partial(self._told, arm, tokens)
        if not trace.active():
            return self._timer.run(functools.partial(call, way), told)
        with trace.span(OP, schedule=str(way.plan.schedule), phase=self._phase, device=self._device) as span:
            span.note(f"{self.candidates[arm].name}: {reason}")
            return self._timer.run(functools.partial(call, way), told)

    def _told(self, arm: int, tokens: int, seconds: float, compiled: bool) -> None:
        change = self.controller.observe(arm, seconds, tokens, compiled=compiled)
        if change is not None and self._keeps:
            self._unkept = {str(self._kind): self._entry(change)}
            self._tried_to_keep = -KEEP_SECONDS

    def _entry(self, change: Change) -> dict[str, Any] | None:
        """Return the entry of a new best plan; None for the default, which needs none."""
        chosen = self.candidates[change.leader]
        return None if chosen.name == "default" else keep.entry(chosen.settings, change.times_as_fast, change.reason)

    def _keep_now(self) -> None:
        """Write what is not written yet, unless another thread or process writes."""
        if self._unkept is None or not self._lock.acquire(blocking=False):
            return
        try:
            changes, now = self._unkept, time.monotonic()
            if changes is not None and now - self._tried_to_keep >= KEEP_SECONDS:
                self._tried_to_keep = now
                if keep.keep(self._tuned, changes) and self._unkept is changes:
                    self._unkept = None
        finally:
            self._lock.release()


_learners: BoundedCache[tuple[object, ...], Learner] = BoundedCache(CAPACITY)
_budgets: BoundedCache[tuple[object, ...], Budget] = BoundedCache(CAPACITY)  # of calls with the same kernels
_generation = 0  # counts how often all was forgotten


def learner(asked: Config, used: Config, use: Use) -> Learner:
    """Return what is learned of a kind of call; of a new one, nothing."""
    key = (use.kind, use.gradient, asked)
    found = _learners.get(key)
    return _learners.keep(key, Learner(asked, used, use)) if found is None else found


def generation() -> int:
    """Return a number that differs once a learner must be asked for anew."""
    return _generation


@on_reset
def forget() -> None:
    """Forget all that was learned in this process."""
    global _generation
    _generation += 1
    _learners.clear()
    _budgets.clear()


forks.in_child(forget)  # another thread of the parent may have been writing to it
