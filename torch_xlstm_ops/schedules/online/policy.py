"""The interface of the policies."""

from __future__ import annotations

import random

from torch_xlstm_ops.schedules.online.estimates import View


class Policy:
    """Chooses a plan for each call; one object for each controller, called under its lock."""

    name = ""

    def choose(self, view: View, draws: random.Random) -> int:
        """Return one of `view.allowed`; the best so far explores nothing."""
        raise NotImplementedError

    def observe(self, plan: int, gain: float, view: View) -> None:
        """Take note of an observation, for policies that keep more than discounted means.

        gain: logarithm of how many times as fast as the best so far the plan was.
        """

    def lead(self, plan: int, gain: float) -> None:
        """Take note that a plan became the best so far, as many times as fast as the one before; by its logarithm."""
