"""What the tuner makes small: the time of a call, its energy, or their product."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import Enum
from typing import NamedTuple, Protocol

import torch

from torch_xlstm_ops.runtime import devices
from torch_xlstm_ops.runtime.devices.energy import EnergyCounter

COUNTED_SECONDS = 0.2  # a call is repeated for so long, since a GPU's counter moves about ten times a second


class Objective(str, Enum):
    """What a better plan has less of."""

    TIME = "time"
    ENERGY = "energy"
    PRODUCT = "product"  # of energy and time

    def __str__(self) -> str:
        return str(self.value)

    @property
    def adjective(self) -> str:
        """Return what a plan is as much as another, in `times as fast` and the like."""
        return {"time": "fast", "energy": "frugal", "product": "good"}[self.value]

    @property
    def praise(self) -> str:
        """Return the comparison of a better plan with the default, for tables."""
        return f"as {self.adjective} as the default"

    @property
    def meaning(self) -> str:
        """Return what the best plan has least of, with its unit, for titles."""
        return {"time": "time (seconds)", "energy": "energy (joules)",
                "product": "energy x time (joule-seconds)"}[self.value]


class Cost(NamedTuple):
    """What one call takes."""

    ms: float
    joules: float | None  # None: not counted

    def of(self, objective: Objective) -> float:
        """Return what is to be made small."""
        if objective is Objective.TIME or self.joules is None:
            return self.ms
        energy = max(self.joules, 1e-9)  # a counter that did not move
        return energy if objective is Objective.ENERGY else energy * self.ms


class Counter(Protocol):
    """Joules that were used so far."""

    def read(self) -> float: ...


class Costs:
    """Measures calls on a device.

    counter: of the energy; default the system's. Raises OSError or RuntimeError with the reason if the objective has
    energy and the system does not count it.
    """

    def __init__(
        self, device: torch.device, objective: Objective = Objective.TIME, counter: Counter | None = None
    ) -> None:
        self.objective, self._device = objective, device
        self._counter = None if objective is Objective.TIME else counter or EnergyCounter(device)

    def measure(self, call: Callable[[], object]) -> Cost:
        """Return what a call takes until the device has finished it."""
        if self._counter is None:
            return Cost(devices.timed(call, self._device), None)
        devices.synchronize(self._device)
        before, began, calls = self._counter.read(), time.perf_counter(), 0
        while not calls or time.perf_counter() - began < COUNTED_SECONDS:
            call()
            devices.synchronize(self._device)
            calls += 1
        seconds = time.perf_counter() - began
        return Cost(seconds / calls * 1e3, (self._counter.read() - before) / calls)
