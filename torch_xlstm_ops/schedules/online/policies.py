"""The policies: which plan the next call tries, by what is known of all plans."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping

from torch_xlstm_ops.config import Tune
from torch_xlstm_ops.schedules.online.estimates import View
from torch_xlstm_ops.schedules.online.policy import Policy

EXPLORATION = 1.0  # standard deviations of a mean in the upper confidence bound, times sqrt(2 log calls)
PRIOR_DEVIATION = 0.15  # of the logarithm of a plan's speed, before it is tried
TEMPERATURE = 0.02  # of the logarithm of a plan's speed: 2% slower is chosen 1/e as often


class UCB(Policy):
    """Chooses the highest upper confidence bound of discounted means (D-UCB). Source: arXiv:0805.3415."""

    name = "ucb"

    def choose(self, view: View, draws: random.Random) -> int:
        untried = _untried(view)
        if untried is not None:
            return untried
        total = sum(found.trials for found in view.estimates)
        width = EXPLORATION * view.deviation * math.sqrt(2 * math.log(max(total, math.e)))

        def bound(plan: int) -> float:
            found = view.estimates[plan]
            return found.mean + width / math.sqrt(found.trials)

        return max(view.allowed, key=bound)


class Thompson(Policy):
    """Draws a speed of each plan from its posterior, and chooses the highest."""

    name = "thompson"

    def choose(self, view: View, draws: random.Random) -> int:
        prior = (view.deviation / PRIOR_DEVIATION) ** 2  # in observations

        def draw(plan: int) -> float:
            found = view.estimates[plan]
            held = found.trials + prior
            return draws.gauss(found.mean * found.trials / held, view.deviation / math.sqrt(held))

        return max(view.allowed, key=draw)


class Boltzmann(Policy):
    """Draws a plan with probability proportional to exp(mean / temperature); an old mean approaches the best's."""

    name = "boltzmann"

    def choose(self, view: View, draws: random.Random) -> int:
        untried = _untried(view)
        if untried is not None:
            return untried

        def weight(plan: int) -> float:
            found = view.estimates[plan]
            return math.exp(min(found.mean * found.trials / (found.trials + 1), 0.5) / TEMPERATURE)

        return draws.choices(view.allowed, [weight(plan) for plan in view.allowed])[0]


def _untried(view: View) -> int | None:
    """Return the first plan that was never tried and may be."""
    return next((p for p in view.allowed if p != view.leader and not view.estimates[p].trials), None)


def _cfc() -> Policy:
    from torch_xlstm_ops.schedules.online.cfc import CfC

    return CfC()


_MAKERS: Mapping[Tune, Callable[[], Policy]] = {
    Tune.ONLINE: Boltzmann, Tune.UCB: UCB, Tune.THOMPSON: Thompson, Tune.BOLTZMANN: Boltzmann, Tune.CFC: _cfc,
}


def make(tune: Tune) -> Policy:
    """Return a new policy of a name; `online` is the one that loses least time in `benchmarks.online`."""
    return _MAKERS[tune]()
