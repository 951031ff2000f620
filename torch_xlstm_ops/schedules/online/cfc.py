"""A closed-form continuous-time cell that predicts each plan's speed from when and how fast it was last.

Source: arXiv:2106.13898, equation 2. Its weights are trained by `python -m benchmarks.train_cfc`.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from torch_xlstm_ops.runtime import torch_internals
from torch_xlstm_ops.runtime.state import on_reset
from torch_xlstm_ops.schedules.online.estimates import View
from torch_xlstm_ops.schedules.online.policy import Policy

WEIGHTS = Path(__file__).with_name("cfc.json")
HIDDEN, BACKBONE = 8, 16
GAIN, LOAD, CALLS = 0.1, 0.3, 200.0  # units of the inputs: logarithms of speed and load, and elapsed calls
_Result = TypeVar("_Result")


class Cell(nn.Module):
    """One step of the closed-form solution, and the prediction that is read from its state."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(3 + HIDDEN, BACKBONE)
        self.rate, self.early, self.late = (nn.Linear(BACKBONE, HIDDEN) for _ in range(3))
        self.output = nn.Linear(HIDDEN, 2)

    def forward(self, inputs: Tensor, state: Tensor, elapsed: Tensor) -> Tensor:
        """Return the state (N, HIDDEN) after `elapsed` (N, 1), in units of CALLS.

        inputs: (N, 3), a gain in units of GAIN, whether there is one, and the load in units of LOAD.
        """
        mixed = torch.tanh(self.backbone(torch.cat((inputs, state), 1)))
        gate = torch.sigmoid(-self.rate(mixed) * elapsed)
        return gate * torch.tanh(self.early(mixed)) + (1 - gate) * torch.tanh(self.late(mixed))

    def predict(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and logarithm of the deviation of the gain, each (N,), in units of GAIN."""
        mean, log_deviation = self.output(state).unbind(1)
        return mean, log_deviation.clamp(-4, 2)


@functools.cache
def trained() -> Cell:
    """Return the cell with the weights that come with the package."""
    cell = Cell()
    kept = json.loads(WEIGHTS.read_text(encoding="utf-8"))
    cell.load_state_dict({name: torch.tensor(values) for name, values in kept["weights"].items()})
    return cell.requires_grad_(False)


on_reset(trained.cache_clear)


class CfC(Policy):
    """Draws a speed of each plan from the cell's prediction, and chooses the highest; gains are beside the first plan.
    """

    name = "cfc"

    def __init__(self, cell: Cell | None = None) -> None:
        self._cell = _outside(trained) if cell is None else cell
        self._states: dict[int, Tensor] = {}  # by plan, each (1, HIDDEN)
        self._lead = 0.0  # the gain of the best so far

    def choose(self, view: View, draws: random.Random) -> int:
        others = [plan for plan in view.allowed if plan != view.leader]
        if not others:
            return view.leader
        means, deviations = _outside(lambda: self._predict(others, view))
        drawn = {plan: draws.gauss(mean, dev) for plan, mean, dev in zip(others, means, deviations, strict=True)}
        best = max(drawn, key=drawn.__getitem__)
        return best if drawn[best] > self._lead else view.leader

    def observe(self, plan: int, gain: float, view: View) -> None:
        idle = float(view.estimates[plan].idle)

        def step() -> Tensor:
            inputs = torch.tensor([[(gain + self._lead) / GAIN, 1.0, view.load / LOAD]])
            before = self._states.get(plan, torch.zeros(1, HIDDEN))
            found: Tensor = self._cell(inputs, before, torch.tensor([[idle / CALLS]]))
            return found

        self._states[plan] = _outside(step)

    def lead(self, plan: int, gain: float) -> None:
        self._lead += gain

    def _predict(self, plans: list[int], view: View) -> tuple[list[float], list[float]]:
        states = torch.cat([self._states.get(plan, torch.zeros(1, HIDDEN)) for plan in plans])
        inputs = torch.tensor([[0.0, 0.0, view.load / LOAD]]).expand(len(plans), 3)
        elapsed = torch.tensor([[view.estimates[plan].idle / CALLS] for plan in plans])
        mean, log_deviation = self._cell.predict(self._cell(inputs, states, elapsed))
        return (GAIN * mean).tolist(), (GAIN * log_deviation.exp()).tolist()


def _outside(call: Callable[[], _Result]) -> _Result:
    """Call a function outside the caller's modes and devices, and without gradients."""

    def quietly() -> _Result:
        with torch.no_grad(), torch.device("cpu"):
            return call()

    return torch_internals.outside_modes()(quietly)  # type: ignore[no-any-return]
