"""Time calls in turns, until the confidence interval is narrow or the time is over."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from torch_xlstm_ops.maths.intervals import INTERVAL_ROUNDS, Interval, median

MIN_ROUNDS = 3  # for any budget
OVERTIME = 3  # times the budget, at most, to reach INTERVAL_ROUNDS
Clock = Callable[[], float]  # runs a call and returns its milliseconds


def turns(clocks: Sequence[Clock], enough: Callable[[list[list[float]]], bool]) -> list[list[float]]:
    """Run the calls in turns, every other round in reverse order, until `enough`; return the milliseconds of each."""
    taken: list[list[float]] = [[] for _ in clocks]
    forth = range(len(clocks))
    while not enough(taken):
        for index in forth if len(taken[0]) % 2 == 0 else reversed(forth):
            taken[index].append(clocks[index]())
    return taken


def until(seconds: float, precise: Callable[[list[list[float]]], bool]) -> Callable[[list[list[float]]], bool]:
    """Return a condition to stop: `precise`, or the time is over, after a minimum of rounds."""
    began = time.perf_counter()

    def enough(taken: list[list[float]]) -> bool:
        rounds, elapsed = min(map(len, taken)), time.perf_counter() - began
        if rounds < INTERVAL_ROUNDS:
            return rounds >= MIN_ROUNDS and elapsed >= OVERTIME * seconds
        return elapsed >= seconds or precise(taken)

    return enough


def ratios(taken: Sequence[Sequence[float]]) -> Interval:
    """Return the speed of the first call relative to the last, as the median over rounds."""
    return median([last / first for first, last in zip(taken[0], taken[-1], strict=True)])
