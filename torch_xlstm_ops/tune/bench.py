"""Measure a plan: time its workloads in turns with the best plan so far."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from torch_xlstm_ops import config, trace
from torch_xlstm_ops.maths.intervals import Interval, median, product
from torch_xlstm_ops.runtime import devices
from torch_xlstm_ops.tune import measure
from torch_xlstm_ops.tune.objective import Cost, Costs
from torch_xlstm_ops.tune.records import Timing
from torch_xlstm_ops.tune.space import Candidate, Space
from torch_xlstm_ops.tune.workloads import Workload, check


class Measured(NamedTuple):
    """One plan measured beside another."""

    times_as_fast: Interval  # as fast as the other; 1 if there is none
    timings: tuple[Timing, ...]
    warm_up_s: float
    peak_bytes: int | None


class Bench(Protocol):
    """Measures plans; an exception makes the trial a failed one."""

    def measure(self, challenger: Candidate, best: Candidate | None, seconds: float) -> Measured:
        """Measure a plan beside the best so far; seconds: for timing."""

    def trace(self, candidate: Candidate, path: Path) -> None:
        """Write a trace of a plan to a file."""


class Timed:
    """Measures on this machine.

    workloads: what to time; the result is the weighted geometric mean of their speed-ups.
    precision: relative half width of the confidence interval at which timing stops.
    costs: what a call takes by the objective; default its time.
    """

    def __init__(
        self, space: Space, workloads: Sequence[Workload], precision: float = 0.02, costs: Costs | None = None
    ) -> None:
        self._space, self._workloads, self._precision = space, workloads, precision
        self._costs = costs or Costs(space.device)
        self._wanted: list[Sequence[Tensor]] | None = None

    def measure(self, challenger: Candidate, best: Candidate | None, seconds: float) -> Measured:
        """Check a plan's results, then time it. Raises WrongResult, and any exception of the plan."""
        devices.reset_peak(self._space.device)
        began = time.perf_counter()
        errors = self._check(challenger)
        for candidate in (challenger, best):
            for workload in self._workloads if candidate is not None else ():
                self._clock(candidate, workload, [])()  # type: ignore[arg-type]
        warm_up = time.perf_counter() - began
        share = seconds / len(self._workloads)
        found = [self._compare(w, challenger, best, share, e) for w, e in zip(self._workloads, errors, strict=True)]
        weights = [workload.weight for workload in self._workloads]
        speed = product([(interval, weight) for (interval, _), weight in zip(found, weights, strict=True)])
        peak = devices.memory(self._space.device).peak
        return Measured(speed, tuple(timing for _, timing in found), warm_up, peak)

    def trace(self, candidate: Candidate, path: Path) -> None:
        """Write a trace of one call of each workload."""
        with self._with_plan(candidate), trace.record(str(path)):
            for workload in self._workloads:
                workload.call()
                devices.synchronize(self._space.device)

    def _compare(
        self, workload: Workload, challenger: Candidate, best: Candidate | None, seconds: float, error: float
    ) -> tuple[Interval, Timing]:
        candidates = [candidate for candidate in (challenger, best) if candidate is not None]
        spent: list[list[Cost]] = [[] for _ in candidates]
        clocks = [self._clock(candidate, workload, kept) for candidate, kept in zip(candidates, spent, strict=True)]

        def precise(taken: list[list[float]]) -> bool:
            found = median(taken[0]) if best is None else measure.ratios(taken)
            return found.relative < self._precision

        taken = measure.turns(clocks, measure.until(seconds, precise))
        own = median([cost.ms for cost in spent[0]])
        joules = [cost.joules for cost in spent[0] if cost.joules is not None]
        ratio = Interval(1.0, 1.0, 1.0) if best is None else measure.ratios(taken)
        timing = Timing(
            workload=workload.name, phase=workload.phase, weight=workload.weight, tokens=workload.tokens,
            rounds=len(taken[0]), median_ms=own.value, low_ms=finite(own.low), high_ms=finite(own.high),
            best_so_far_ms=None if best is None else median([cost.ms for cost in spent[1]]).value,
            times_as_fast=None if best is None else ratio.value,
            tokens_per_second=workload.tokens / own.value * 1e3, error=error,
            joules=median(joules).value if joules else None,
        )
        return ratio, timing

    def _check(self, candidate: Candidate) -> list[float]:
        """Return each workload's error relative to the default plan."""
        if self._wanted is None:
            with self._with_plan(self._space.default):
                self._wanted = [[t.clone() for t in workload.results()] for workload in self._workloads]
        with self._with_plan(candidate):
            return [check(workload.results(), wanted, workload.tolerance)
                    for workload, wanted in zip(self._workloads, self._wanted, strict=True)]

    def _clock(self, candidate: Candidate, workload: Workload, kept: list[Cost]) -> Callable[[], float]:
        """Return a call that runs a workload once, keeps what that took, and returns what is to be made small."""
        def clock() -> float:
            with self._with_plan(candidate):
                kept.append(self._costs.measure(workload.call))
            return kept[-1].of(self._costs.objective)

        return clock

    def _with_plan(self, candidate: Candidate) -> AbstractContextManager[object]:
        return config.use(**self._space.settings(candidate.params), tuned="off")


def load_average() -> float | None:
    """Return the system's load average of the last minute; None where it has none."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def held_bytes(device: torch.device) -> int | None:
    """Return the limit of a plan's bytes: nine tenths of what this process may use."""
    budget = devices.memory(device).budget
    return None if budget is None else budget * 9 // 10


def finite(value: float) -> float | None:
    """Return a bound of an interval, or None if it is 0 or infinite."""
    return value if value and math.isfinite(value) else None
