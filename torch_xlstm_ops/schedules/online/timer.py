"""The time of calls, without waiting for the device: the host's clock on the CPU, events that are read later elsewhere.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

import torch

from torch_xlstm_ops.runtime import compiler, devices

PENDING = 64  # calls whose events are kept; those of older calls are not read
_Result = TypeVar("_Result")
Told = Callable[[float, bool], object]  # takes the seconds of a call, and whether it had to wait for a kernel


class Timer:
    """Times calls on one device, from any thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pending: deque[tuple[devices.Event, devices.Event, Told]] = deque(maxlen=PENDING)

    def read(self) -> None:
        """Tell the times of the calls that the device has finished; wait for none."""
        while self._pending:
            try:
                start, end, told = self._pending.popleft()
            except IndexError:  # another thread took the last one
                return
            if not end.query():
                self._pending.appendleft((start, end, told))
                return
            told(start.elapsed_time(end) / 1e3, False)

    def run(self, call: Callable[[], _Result], told: Told) -> _Result:
        """Run a call and return its result; its time is told now, or by a later `read`."""
        obtained, began = compiler.obtained(), time.perf_counter()
        if not devices.has_events(self._device):
            found = call()
        else:
            start, end = (devices.event(self._device, timing=True) for _ in range(2))
            start.record()
            found = call()
            end.record()
            if compiler.obtained() == obtained:
                self._pending.append((start, end, told))
                return found
        told(time.perf_counter() - began, compiler.obtained() != obtained)
        return found
