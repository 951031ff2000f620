"""What a controller knows of its plans: discounted means of how much faster than the best so far each was."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

HALF_LIFE = 1000.0  # calls after which an observation counts half
_UNKNOWN_DEVIATION = 0.1  # of the logarithm of a ratio of times, until it is measured


class Estimate(NamedTuple):
    """One plan beside the best so far, whose own estimate has the mean 0."""

    mean: float  # logarithm of the times as fast
    trials: float  # observations, discounted by their age; 0 if it was never tried
    idle: int  # calls since it was last tried; 0 if never


class View(NamedTuple):
    """What a policy chooses from."""

    estimates: Sequence[Estimate]
    leader: int  # the best so far
    allowed: Sequence[int]  # the plans that the budget admits, the best so far among them
    deviation: float  # of the logarithm of one ratio of times
    load: float  # logarithm of the present time of the best so far over its time in the long run


class Estimates:
    """Discounted sums for each plan; not for several threads."""

    def __init__(self, plans: int, half_life: float = HALF_LIFE) -> None:
        self._discount = 0.5 ** (1 / half_life)
        self._counts, self._means = [0.0] * plans, [0.0] * plans
        self._last = [0] * plans  # call of the last observation
        self._squares, self._pooled = 0.0, 0.0  # deviations of all plans from their means

    def add(self, plan: int, gain: float, call: int) -> None:
        """Add an observation: the logarithm of how many times as fast as the best so far it was."""
        count = self.count(plan, call)
        if count > 0:
            # The squared distance from the mean of others is (1 + 1 / count) times the variance.
            self._squares = self._discount * self._squares + (gain - self._means[plan]) ** 2 / (1 + 1 / count)
            self._pooled = self._discount * self._pooled + 1
        self._means[plan] += (gain - self._means[plan]) / (count + 1)
        self._counts[plan], self._last[plan] = count + 1, call

    def touch(self, plan: int, call: int) -> None:
        """Count a call of the best so far."""
        self._counts[plan], self._last[plan] = self.count(plan, call) + 1, call

    def count(self, plan: int, call: int) -> float:
        """Return the discounted number of observations of a plan."""
        return self._counts[plan] * math.pow(self._discount, call - self._last[plan])

    def mean(self, plan: int) -> float:
        """Return the mean of a plan."""
        return self._means[plan]

    @property
    def deviation(self) -> float:
        """Return the standard deviation of an observation, half known before the first ones."""
        prior = _UNKNOWN_DEVIATION**2
        return math.sqrt((self._squares + prior) / (self._pooled + 1))

    def lead(self, plan: int, before: int, call: int) -> None:
        """Make a plan the one that others are compared with; the one before is known as well as this one is."""
        gain = self._means[plan]
        self._means = [mean - gain for mean in self._means]
        self._counts[before], self._last[before] = self.count(plan, call), call

    def forget(self, part: float) -> None:
        """Let all observations count less, by a factor."""
        self._counts = [part * count for count in self._counts]

    def view(self, leader: int, allowed: Sequence[int], load: float, call: int) -> View:
        """Return what a policy chooses from."""
        found = [
            Estimate(mean, self.count(plan, call), call - self._last[plan] if self._counts[plan] else 0)
            for plan, mean in enumerate(self._means)
        ]
        return View(found, leader, allowed, self.deviation, load)
