"""Confidence intervals of medians and of their products."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

INTERVAL_ROUNDS = 6  # fewer have no confidence interval of 95% for a median


class Interval(NamedTuple):
    """A median and its 95% confidence interval, which is infinite for too few values."""

    value: float
    low: float
    high: float

    @property
    def relative(self) -> float:
        """Return half the width relative to the value."""
        return (self.high - self.low) / 2 / self.value if math.isfinite(self.high - self.low) else math.inf

    def scaled(self, factor: float) -> Interval:
        """Return the interval of factor * value."""
        return Interval(*(factor * part for part in self))


def in_words(value: float, low: float | None, high: float | None) -> str:
    """Format a ratio with its confidence interval, if it has one."""
    return f"{value:.3f} times (95%: {bounds(low, high)})"


def bounds(low: float | None, high: float | None) -> str:
    """Format the bounds of a confidence interval; None, 0 or infinity means that there is none."""
    if not low or high is None or math.isinf(high):
        return "no interval, too few rounds"
    return f"{low:.3f} to {high:.3f}"


def median(values: Sequence[float]) -> Interval:
    """Return the median of positive values with its distribution-free confidence interval, by order statistics.

    Neither changes much by one slow round on a busy machine.
    """
    ordered, n = sorted(values), len(values)
    middle = statistics.median(ordered)
    if n < INTERVAL_ROUNDS:
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
