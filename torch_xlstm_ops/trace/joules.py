"""The joules of a recording, by device, where the system counts them; elsewhere the reason."""

from __future__ import annotations

import time

import torch

from torch_xlstm_ops.runtime.devices.energy import EnergyCounter

_EVERY = 60.0  # seconds between two readings, before a counter of the system wraps


class Joules:
    """Counts the energy of devices from their first use to `end`, all processes together."""

    def __init__(self) -> None:
        self._counters: dict[str, EnergyCounter] = {}
        self._read: dict[str, float] = {}
        self._missing: dict[str, str] = {}
        self._next = 0.0
        self._ended = False

    def follow(self, device: torch.device) -> None:
        """Count a device from now on."""
        name = str(device)
        if name in self._counters or name in self._missing:
            return
        try:
            self._counters[name] = EnergyCounter(device)
        except (OSError, RuntimeError) as error:
            self._missing[name] = str(error)

    def refresh(self) -> None:
        """Read the counters if they have not been read for a while."""
        if self._counters and time.monotonic() >= self._next:
            self._next = time.monotonic() + _EVERY
            self.read()

    def end(self) -> None:
        """Count no more."""
        self.read()
        self._ended = True

    def read(self) -> dict[str, float]:
        """Return the joules of each device that is counted."""
        for name, counter in () if self._ended else tuple(self._counters.items()):
            try:
                self._read[name] = counter.read()
            except (OSError, RuntimeError) as error:  # a driver that was unloaded meanwhile
                self._missing[name] = str(error)
                self._counters.pop(name, None)
        return dict(self._read)

    def found(self) -> dict[str, float | str]:
        """Return the joules of each device, or why they are not counted."""
        return {**self.read(), **{name: f"not counted: {reason}" for name, reason in self._missing.items()}}
