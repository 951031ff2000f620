"""How long calls take beside each other, and how sure that is."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

LEAST_ROUNDS = 6  # fewer have no confidence interval of 95% for a median
FEWEST_ROUNDS = 3  # whatever the budget
PATIENCE = 3  # times the budget that may go by for an interval to be had at all
Clock = Callable[[], float]  # makes a call and returns its milliseconds


class Interval(NamedTuple):
    """A median and its 95% confidence interval, which is infinite where there are too few values."""

    value: float
    low: float
    high: float

    @property
    def relative(self) -> float:
        """Return half the width as a part of the value."""
        return (self.high - self.low) / 2 / self.value if math.isfinite(self.high - self.low) else math.inf

    def scaled(self, factor: float) -> Interval:
        """Return that of factor * value."""
        return Interval(*(factor * part for part in self))


def in_words(value: float, low: float | None, high: float | None) -> str:
    """Return a ratio with its confidence interval, if it has one."""
    return f"{value:.3f} times (95%: {bounds(low, high)})"


def bounds(low: float | None, high: float | None) -> str:
    """Return the two ends of a confidence interval, each of which may be None, zero or infinite where there is none."""
    if not low or high is None or math.isinf(high):
        return "no interval, too few rounds"
    return f"{low:.3f} to {high:.3f}"


def median(values: Sequence[float]) -> Interval:
    """Return the median of positive values with its distribution-free confidence interval, by order statistics.

    One slow round on a busy machine moves neither.
    """
    ordered, n = sorted(values), len(values)
    middle = statistics.median(ordered)
    if n < LEAST_ROUNDS:
        return Interval(middle, 0.0, math.inf)
    rank = max(0, int((n - 1.96 * math.sqrt(n)) / 2))
    return Interval(middle, ordered[rank], ordered[n - 1 - rank])


def product(factors: Sequence[tuple[Interval, float]]) -> Interval:
    """Return the weighted geometric mean of independent values, each given with its weight."""
    total = sum(weight for _, weight in factors)
    logs = [(math.log(i.value), _half_of_log(i), weight / total) for i, weight in factors]
    value = sum(log * weight for log, _, weight in logs)
    half = math.sqrt(sum((half * weight) ** 2 for _, half, weight in logs))
    return Interval(math.exp(value), math.exp(value - half), math.exp(value + half))


def _half_of_log(interval: Interval) -> float:
    if interval.low <= 0 or math.isinf(interval.high):
        return math.inf
    return math.log(interval.high / interval.low) / 2


def turns(clocks: Sequence[Clock], enough: Callable[[list[list[float]]], bool]) -> list[list[float]]:
    """Return the milliseconds of each call, all taking turns, every other round backwards, until they are `enough`."""
    taken: list[list[float]] = [[] for _ in clocks]
    forth = range(len(clocks))
    while not enough(taken):
        for index in forth if len(taken[0]) % 2 == 0 else reversed(forth):
            taken[index].append(clocks[index]())
    return taken


def until(seconds: float, precise: Callable[[list[list[float]]], bool]) -> Callable[[list[list[float]]], bool]:
    """Return when to stop: once `precise`, or once the time is up, but not before a few rounds."""
    began = time.perf_counter()

    def enough(taken: list[list[float]]) -> bool:
        rounds, gone = min(map(len, taken)), time.perf_counter() - began
        if rounds < LEAST_ROUNDS:
            return rounds >= FEWEST_ROUNDS and gone >= PATIENCE * seconds
        return gone >= seconds or precise(taken)

    return enough


def ratios(taken: Sequence[Sequence[float]]) -> Interval:
    """Return how many times as fast the first call was as the last, round by round."""
    return median([last / first for first, last in zip(taken[0], taken[-1], strict=True)])
