"""Devices of this machine: availability, events and the MPS lock, memory. Nothing is probed on import."""

from torch_xlstm_ops.runtime.devices.availability import (
    KINDS,
    Capabilities,
    capabilities,
    cuda_missing,
    missing,
    mps_fallback,
    mps_fast_math,
    mps_missing,
    report,
    resolve_device,
)
from torch_xlstm_ops.runtime.devices.events import (
    Event,
    event,
    has_events,
    has_streams,
    mps_lock,
    submission,
    synchronize,
    timed,
)
from torch_xlstm_ops.runtime.devices.memory_info import Memory, available, memory, reset_peak

__all__ = [
    "KINDS",
    "Capabilities",
    "Event",
    "Memory",
    "available",
    "capabilities",
    "cuda_missing",
    "event",
    "has_events",
    "has_streams",
    "memory",
    "missing",
    "mps_fallback",
    "mps_fast_math",
    "mps_lock",
    "mps_missing",
    "report",
    "reset_peak",
    "resolve_device",
    "submission",
    "synchronize",
    "timed",
]
