"""Times of waiting: of the host on the CPU, and of the GPU, which works on while the host waits, on CUDA."""

from __future__ import annotations

import time
from typing import Any

import torch

from torch_xlstm_ops.runtime import devices


class WaitClock:
    """Measures waits one after another."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[Any, Any]] = []
        self._began: Any = None

    def start(self) -> None:
        """Begin a wait; on CUDA it begins when the GPU has done what it was given."""
        self._began = self._now()

    def stop(self) -> None:
        """End the wait; on CUDA when the GPU reaches what it is given next."""
        self._marks.append((self._began, self._now()))

    def seconds(self) -> list[float]:
        """Return the seconds of each wait; on CUDA all work must be done."""
        if self._cuda:
            return [began.elapsed_time(ended) / 1e3 for began, ended in self._marks]
        return [ended - began for began, ended in self._marks]

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = devices.event(self._device, timing=True)
        event.record()
        return event
