"""Memory of a device: used by this process, peak, budget, and what is available now."""

from __future__ import annotations

import os
import sys
from typing import NamedTuple

import torch

from torch_xlstm_ops.runtime.devices import events


class Memory(NamedTuple):
    """Bytes of a device's memory; None where the machine does not say."""

    used: int | None  # by this process, now
    peak: int | None  # maximum of `used` since the process started, or since `reset_peak`
    budget: int | None  # what this process may use


def memory(device: torch.device) -> Memory:
    """Return a device's memory: driver allocations on MPS, the caching allocator's on CUDA, resident pages on CPU."""
    if device.type == "cuda":
        reserved, peak = torch.cuda.memory_reserved(device), torch.cuda.max_memory_reserved(device)
        return Memory(reserved, peak, torch.cuda.mem_get_info(device)[1])
    if device.type == "mps":
        with events.mps_lock:  # the driver does not shrink its pools: its allocation is also the peak
            held = torch.mps.driver_allocated_memory()
            return Memory(held, held, torch.mps.recommended_max_memory())
    return Memory(_resident(), _resident_peak(), _physical())


def available(device: torch.device) -> int | None:
    """Return the bytes that this process can still allocate on a device; None where the machine does not say."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "mps":
        found = memory(device)
        return None if found.budget is None or found.used is None else max(0, found.budget - found.used)
    return _host_available()


def reset_peak(device: torch.device) -> None:
    """Restart the measurement of the peak, on CUDA only."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _resident() -> int | None:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return _resident_peak()  # macOS reports only the peak


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
    except (AttributeError, OSError, ValueError):  # Windows, or another system without these names
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
        if text.isdigit():  # "max" means no limit
            limits.append(int(text))
    return limits
