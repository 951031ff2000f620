"""Measure tokens per second; the device is synchronized before each reading of the clock."""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TextIO

import torch

from torch_xlstm_ops.runtime import devices
from torch_xlstm_ops.runtime.devices.energy import EnergyCounter
from torch_xlstm_ops.runtime.files import replacing


class Measurement(NamedTuple):
    """One line of the statistics: the progress of a phase after a synchronization."""

    phase: str
    tokens: int
    seconds: float
    interval_tok_s: float
    average_tok_s: float
    memory_bytes: int | None
    joules: float | None = None  # of the device since the phase began, all processes together


@dataclass
class Meter:
    """Record measurements of each phase.

    every: fewest tokens between two rows; default None, only the last row of a phase.
    """

    device: torch.device
    every: int | None = None
    rows: list[Measurement] = field(default_factory=list)
    _phase: str = ""
    _began: float = 0.0
    _tokens: int = 0
    _last: tuple[int, float] = (0, 0.0)
    _energy: EnergyCounter | None = None
    _energy_before: float = 0.0

    def __post_init__(self) -> None:
        self.without_energy: str | None = None  # why there are no joules
        try:
            self._energy = EnergyCounter(self.device)
        except (OSError, RuntimeError) as error:
            self.without_energy = str(error)

    def start(self, phase: str) -> None:
        """Begin a phase."""
        self._phase, self._tokens, self._last = phase, 0, (0, 0.0)
        devices.synchronize(self.device)
        self._energy_before = 0.0 if self._energy is None else self._energy.read()
        self._began = time.perf_counter()

    def add(self, tokens: int, *, last: bool = False, empty: bool = False) -> None:
        """Count tokens of the phase, and read the clock if a row is due or the phase is over.

        empty: write the last row even without tokens.
        """
        self._tokens += tokens
        due = self.every is not None and self._tokens - self._last[0] >= self.every
        if not due and not (last and (empty or self._tokens > self._last[0])):
            return
        devices.synchronize(self.device)
        seconds = time.perf_counter() - self._began
        before, at = self._last
        used = devices.memory(self.device).used
        self.rows.append(Measurement(
            self._phase, self._tokens, seconds, _rate(self._tokens - before, seconds - at),
            _rate(self._tokens, seconds), used,
            None if self._energy is None else self._energy.read() - self._energy_before))
        self._last = (self._tokens, seconds)

    def final(self, phase: str) -> Measurement | None:
        """Return a phase's last row."""
        return next((row for row in reversed(self.rows) if row.phase == phase), None)


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if seconds > 0 else 0.0


def write_stats(path: str, rows: Sequence[Measurement], about: dict[str, object]) -> None:
    """Write the rows to a .csv file, or to a .json file together with facts `about` the run."""
    with replacing(path) as file:
        _STATS[os.path.splitext(path)[1]](file, rows, about)


def _stats_csv(file: TextIO, rows: Sequence[Measurement], about: dict[str, object]) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(Measurement._fields)
    writer.writerows(rows)


def _stats_json(file: TextIO, rows: Sequence[Measurement], about: dict[str, object]) -> None:
    json.dump({"run": about, "rows": [row._asdict() for row in rows]}, file, indent=1)


_STATS: dict[str, Callable[[TextIO, Sequence[Measurement], dict[str, object]], None]] = {
    ".csv": _stats_csv,
    ".json": _stats_json,
}
