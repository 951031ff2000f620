"""Submit work to a device, wait for it, and time it by events; the process-wide MPS lock."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, cast

import torch

from torch_xlstm_ops.runtime import forks

# Two threads that submit MPS work at once can crash the process (pytorch#197805).
mps_lock = forks.new_rlock()
_UNLOCKED: AbstractContextManager[object] = nullcontext()


def has_streams(device: torch.device) -> bool:
    """Return whether `device` has streams that Python can create (torch.mps.Stream is not in every torch)."""
    return device.type == "cuda" or (device.type == "mps" and hasattr(torch.mps, "Stream"))


def has_events(device: torch.device) -> bool:
    """Return whether `device` runs asynchronously and has events."""
    return device.type in ("cuda", "mps")


def submission(device: torch.device) -> AbstractContextManager[object]:
    """Return the context manager to submit work in: the process-wide lock on MPS, an empty one elsewhere."""
    return mps_lock if device.type == "mps" else _UNLOCKED


def synchronize(device: torch.device) -> None:
    """Wait until all work submitted to `device` has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        with mps_lock:
            torch.mps.synchronize()


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Return the milliseconds that a call takes until `device` has finished it."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3


class Event(Protocol):
    """A point in a device's queue of work."""

    def record(self) -> None:
        """Place the event after all the work submitted so far (on the current stream)."""

    def query(self) -> bool:
        """Return whether the work before the event has finished."""

    def synchronize(self) -> None:
        """Wait for the work before the event."""

    def elapsed_time(self, end: Event, /) -> float:
        """Return the milliseconds from this event to `end`, both finished."""


def event(device: torch.device, *, timing: bool = False) -> Event:
    """Return an unrecorded event of `device`; on the CPU, which is synchronous, a reading of the clock.

    timing: whether `elapsed_time` will be called; default False, which is cheaper.
    """
    if device.type == "cuda":
        return cast(Event, torch.cuda.Event(enable_timing=timing))  # type: ignore[no-untyped-call]
    if device.type == "mps":
        return _MPSEvent(timing)
    return _HostEvent()


class _HostEvent:
    def __init__(self) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event, /) -> float:
        assert isinstance(end, _HostEvent)
        return (end.at - self.at) * 1e3


class _MPSEvent:
    """torch's MPS event, used under the lock, because recording one submits work."""

    def __init__(self, timing: bool) -> None:
        with mps_lock:
            self._event = torch.mps.Event(enable_timing=timing)

    def record(self) -> None:
        with mps_lock:
            self._event.record()

    def query(self) -> bool:
        with mps_lock:
            return bool(self._event.query())

    def synchronize(self) -> None:
        with mps_lock:
            self._event.synchronize()

    def elapsed_time(self, end: Event, /) -> float:
        assert isinstance(end, _MPSEvent)
        with mps_lock:
            return float(self._event.elapsed_time(end._event))
