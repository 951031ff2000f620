"""What this machine can do, found by probing; its memory; and the one lock and clock that every schedule shares.

Nothing here runs before it is called, and each reason that a device is missing has exactly one text.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol, cast

import torch

# Two threads that submit MPS work at once can crash the process (pytorch#197805).
mps_lock = threading.RLock()
_UNLOCKED: AbstractContextManager[object] = nullcontext()

MPS_MACOS = (14, 0)
NOT_MACOS = "MPS needs macOS, and this is {platform}"
NOT_BUILT = "this torch was built without MPS"
OLD_MACOS = "MPS needs macOS {major}.{minor} or newer"
OLD_TORCH = "this torch cannot compile for MPS: 2.11 or newer can"
NO_METAL = "Metal shows no device to this process"
NO_CUDA_BUILD = "this torch was built without CUDA"
NO_CUDA_DEVICE = "CUDA shows no device to this process"
KINDS = ("cpu", "cuda", "mps")


def mps_missing() -> str | None:
    """Return why MPS cannot be used, or None if it can."""
    if torch.backends.mps.is_available():
        return None if hasattr(torch.mps, "compile_shader") else OLD_TORCH  # what Inductor hands its Metal source to
    if sys.platform != "darwin":
        return NOT_MACOS.format(platform=sys.platform)
    if not torch.backends.mps.is_built():
        return NOT_BUILT
    if not torch.backends.mps.is_macos_or_newer(*MPS_MACOS):
        return OLD_MACOS.format(major=MPS_MACOS[0], minor=MPS_MACOS[1])
    return NO_METAL


def cuda_missing() -> str | None:
    """Return why CUDA cannot be used, or None if it can."""
    if torch.cuda.is_available():
        return None
    return NO_CUDA_BUILD if torch.version.cuda is None and torch.version.hip is None else NO_CUDA_DEVICE


_MISSING: dict[str, Callable[[], str | None]] = {"cpu": lambda: None, "cuda": cuda_missing, "mps": mps_missing}


def missing(kind: str) -> str | None:
    """Return why a kind of device (cpu, cuda, mps) cannot be used, or None if it can."""
    if kind not in KINDS:
        raise ValueError(f"device must be one of {', '.join(KINDS)}, got {kind!r}")
    return _MISSING[kind]()


def resolve_device(name: str = "auto") -> torch.device:
    """Return the device that a user's word names; `auto` takes cuda, then mps, then cpu.

    Raises ValueError for another word, RuntimeError with the one reason for a device that is missing.
    """
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if missing(kind) is None))
    if name not in KINDS:
        raise ValueError(f"device must be one of auto, {', '.join(KINDS)}, got {name!r}")
    reason = missing(name)
    if reason is not None:
        raise RuntimeError(f"device {name} cannot be used: {reason}")
    return torch.device(name)


def mps_fallback() -> bool:
    """Return whether PYTORCH_ENABLE_MPS_FALLBACK lets MPS operations run on the CPU unseen."""
    return os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK", "0") not in ("", "0")


def has_streams(device: torch.device) -> bool:
    """Return whether work on `device` can be put on streams of our own (torch.mps.Stream is not in every torch)."""
    return device.type == "cuda" or (device.type == "mps" and hasattr(torch.mps, "Stream"))


def has_events(device: torch.device) -> bool:
    """Return whether `device` finishes work after the call that submits it, and marks the moment by events."""
    return device.type in ("cuda", "mps")


def submission(device: torch.device) -> AbstractContextManager[object]:
    """Return what to hold while submitting work to `device`: the process-wide lock on MPS, nothing elsewhere."""
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
    """A mark in a device's work."""

    def record(self) -> None:
        """Mark this moment, after all the work submitted so far (on the current stream)."""

    def query(self) -> bool:
        """Return whether the work before the mark has finished."""

    def synchronize(self) -> None:
        """Wait for the work before the mark."""

    def elapsed_time(self, end: Event, /) -> float:
        """Return the milliseconds from this mark to `end`, both finished."""


def event(device: torch.device, *, timing: bool = False) -> Event:
    """Return an unrecorded event of `device`; on the CPU, where calls return finished, a reading of the clock.

    timing: whether `elapsed_time` will be asked; default False, which is cheaper.
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
    """torch's MPS event behind the lock: recording one submits work."""

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


class Memory(NamedTuple):
    """Bytes of a device's memory; None where the machine does not tell."""

    used: int | None  # by this process now
    peak: int | None  # most used by this process since it started, or since `reset_peak`
    budget: int | None  # what this process may use


def memory(device: torch.device) -> Memory:
    """Return a device's memory: driver allocations on MPS, the caching allocator's on CUDA, resident pages on CPU."""
    if device.type == "cuda":
        reserved, peak = torch.cuda.memory_reserved(device), torch.cuda.max_memory_reserved(device)
        return Memory(reserved, peak, torch.cuda.mem_get_info(device)[1])
    if device.type == "mps":
        with mps_lock:  # the driver keeps its pools, so what it holds is also the peak
            held = torch.mps.driver_allocated_memory()
            return Memory(held, held, torch.mps.recommended_max_memory())
    return Memory(_resident(), _resident_peak(), _physical())


def available(device: torch.device) -> int | None:
    """Return the bytes that this process could still take of a device now; None where the machine does not tell."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "mps":
        found = memory(device)
        return None if found.budget is None or found.used is None else max(0, found.budget - found.used)
    return _host_available()


def reset_peak(device: torch.device) -> None:
    """Forget the peak so far where the device allows it: CUDA only."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _resident() -> int | None:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return _resident_peak()  # macOS tells a process only its peak


def _resident_peak() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _physical() -> int | None:
    try:
        installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows, or a name this system lacks
        return None
    return min([installed, *_cgroup_limits()])


def _host_available() -> int | None:
    free = []
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            free += [int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:")]
    except OSError:  # not Linux
        installed, used = _physical(), _resident()
        free += [installed - used] if installed is not None and used is not None else []
    used = _resident()
    free += [limit - used for limit in _cgroup_limits() if used is not None]
    return max(0, min(free)) if free else None


def _cgroup_limits() -> list[int]:
    limits = []
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path, encoding="ascii") as file:
                text = file.read().strip()
        except OSError:
            continue
        if text.isdigit():  # "max" stands for no limit
            limits.append(int(text))
    return limits


class Capabilities(NamedTuple):
    """One row of `report`."""

    kind: str
    missing: str | None
    names: tuple[str, ...]
    streams: bool
    events: bool
    memory: Memory | None


def capabilities(kind: str) -> Capabilities:
    """Return what devices of a kind can do, or why there is none."""
    reason = missing(kind)
    if reason is not None:
        return Capabilities(kind, reason, (), False, False, None)
    device = torch.device(kind)
    return Capabilities(kind, None, _names(kind), has_streams(device), has_events(device), memory(device))


def _names(kind: str) -> tuple[str, ...]:
    if kind == "cuda":
        return tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    if kind == "mps":
        name = getattr(torch.backends.mps, "get_name", None)
        return (name() if name is not None else "Apple GPU",)
    return (f"{torch.get_num_threads()} threads",)


def report() -> tuple[Capabilities, ...]:
    """Return the capabilities of every kind of device."""
    return tuple(capabilities(kind) for kind in KINDS)
