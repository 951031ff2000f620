"""The number of rounds of an sLSTM window: chosen, certified, increased; else the sequential schedule.

A window runs with as many rounds as windows of its kind have needed, without synchronising. The device estimates the
error of each window; the host reads all estimates once, after the last window. A window above the tolerance runs again
with more rounds, or sequentially if those would exceed `Limits.rounds`; so do the windows after it, from its state.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops.runtime import forks
from torch_xlstm_ops.schedules.slstm.parallel import Window

Results = tuple[Tensor, ...]


class Limits(NamedTuple):
    """What bounds a call: tokens a window, the most rounds of one, and the rounds of a kind that is new."""

    window: int = 1024
    rounds: int = 32
    first: int = 6


class Report(NamedTuple):
    """How a call went."""

    rounds: int  # of the last certified window, 0 where there is none
    error: float  # the largest estimate among certified windows, relative
    residual: float
    windows: int
    fell_back: int  # windows that the sequential schedule ran


class _Known(NamedTuple):
    rounds: int
    spare: int  # consecutive windows that a round less would have served
    patience: int  # how many of those there must be before the rounds are reduced


class KnownRounds:
    """The rounds that each kind of window has needed: kept between calls, shared by threads."""

    PATIENCE, LONGEST, CAPACITY = 4, 4096, 256

    def __init__(self, first: int) -> None:
        self._first = first
        self._known: OrderedDict[Hashable, _Known] = OrderedDict()
        self._lock = forks.new_lock()

    def rounds(self, kind: Hashable, most: int) -> int:
        return min(most, self._get(kind).rounds)

    def passed(self, kind: Hashable, rounds: int, error: float, residual: float, tolerance: float) -> None:
        """Keep the rounds that sufficed; reduce them after several consecutive windows with one to spare."""
        known = self._get(kind)
        if rounds > known.rounds:  # the reduction was wrong: be slower to reduce again
            self._set(kind, _Known(rounds, 0, min(2 * known.patience, self.LONGEST)))
            return
        rate = error / (error + residual) if error + residual > 0 else 0.0
        spare = known.spare + 1 if error <= tolerance * rate or residual == 0 else 0
        if spare >= known.patience and rounds > 2:
            self._set(kind, known._replace(rounds=rounds - 1, spare=0))
        else:
            self._set(kind, known._replace(spare=spare))

    def clear(self) -> None:
        with self._lock:
            self._known.clear()

    def _get(self, kind: Hashable) -> _Known:
        return self._known.get(kind) or _Known(self._first, 0, self.PATIENCE)

    def _set(self, kind: Hashable, known: _Known) -> None:
        with self._lock:
            self._known[kind] = known
            self._known.move_to_end(kind)
            while len(self._known) > self.CAPACITY:
                self._known.popitem(last=False)


def more_rounds(rounds: int, error: float, residual: float, tolerance: float) -> int:
    """Return how many rounds a window should need that has come so far with `rounds`."""
    if not math.isfinite(error) or not math.isfinite(residual) or error <= 0:
        return 2 * rounds
    rate = error / (error + residual)
    if rate == 1:
        return 2 * rounds
    return rounds + max(1, math.ceil(math.log(tolerance / error) / math.log(rate)))


class Job(NamedTuple):
    """What `solve` needs of a sequence, forward or back: a window by rounds, a window sequentially."""

    kind: Hashable
    tolerance: float
    limits: Limits
    by_rounds: Callable[[Window, Results, int], tuple[Results, Tensor]]  # -> results, [error, residual]
    carry: Callable[[Results], Results]  # what the next window starts from
    sequential: Callable[[Window, Results], Results]


def solve(job: Job, known: KnownRounds, order: Sequence[Window], first: Results) -> tuple[list[Results], Report]:
    """Run windows in order, each from what the one before leaves; return their results and a report."""
    found: list[Results] = []
    report, ahead = Report(0, 0.0, 0.0, len(order), 0), len(order)
    rounds = known.rounds(job.kind, job.limits.rounds)
    while len(found) < len(order):
        todo = order[len(found):len(found) + ahead]
        tried, figures = _try(job, todo, job.carry(found[-1]) if found else first, rounds)
        good = next((i for i, (error, _) in enumerate(figures) if not error <= job.tolerance), len(todo))
        for error, residual in figures[:good]:
            known.passed(job.kind, rounds, error, residual, job.tolerance)
            report = report._replace(
                rounds=max(report.rounds, rounds), error=max(report.error, error),
                residual=max(report.residual, residual),
            )
        found += tried[:good]
        ahead = 2 * ahead
        if good == len(todo):
            continue
        ahead, needed = 1, more_rounds(rounds, *figures[good], job.tolerance)
        if rounds < job.limits.rounds < needed <= 2 * job.limits.rounds:
            needed = job.limits.rounds
        if needed <= job.limits.rounds:
            rounds = needed
            continue
        found.append(job.sequential(order[len(found)], job.carry(found[-1]) if found else first))
        report = report._replace(fell_back=report.fell_back + 1)
    return found, report


def _try(
    job: Job, todo: Sequence[Window], state: Results, rounds: int
) -> tuple[list[Results], list[tuple[float, float]]]:
    """Run windows by rounds, and wait for the device once; return their results, and the error and residual of each."""
    tried, judged = [], []
    for window in todo:
        results, flags = job.by_rounds(window, state, rounds)
        state = job.carry(results)
        tried.append(results)
        judged.append(flags)
    flags = torch.stack(judged) if len(judged) > 1 else judged[0][None]
    return tried, [(error, residual) for error, residual in flags.tolist()]
