"""Which kinds of devices this process can use, and what they can do; each reason against one has one text."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch

from torch_xlstm_ops.runtime.devices.events import has_events, has_streams
from torch_xlstm_ops.runtime.devices.memory_info import Memory, memory

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
        return None if hasattr(torch.mps, "compile_shader") else OLD_TORCH  # Inductor compiles Metal by it
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
    """Return the device of a name; `auto` takes cuda, then mps, then cpu.

    Raises ValueError for another name, RuntimeError with the reason for a device that cannot be used.
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
    """Return whether PYTORCH_ENABLE_MPS_FALLBACK makes MPS operations run on the CPU silently."""
    return os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK", "0") not in ("", "0")


def mps_fast_math() -> bool:
    """Return whether PYTORCH_MPS_FAST_MATH lets Metal reorder sums and assume that nothing is infinite."""
    return os.environ.get("PYTORCH_MPS_FAST_MATH", "0") not in ("", "0")


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
