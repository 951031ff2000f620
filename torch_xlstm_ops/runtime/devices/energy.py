"""The energy that a device has used, where the system counts it: RAPL on Linux for the CPU, NVML for CUDA."""

from __future__ import annotations

import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from torch_xlstm_ops.runtime.extras import how_to_install

POWERCAP = Path("/sys/class/powercap")
_PACKAGES = "intel-rapl:[0-9]*"  # AMD's are named so too
_MICRO, _MILLI = 1e-6, 1e-3


class EnergyCounter:
    """Joules that a device has used since the counter was made, all processes together.

    device: a CPU counts its packages without the memory, a GPU the whole board. Raises OSError or RuntimeError, with
    the reason, where the system does not count.
    """

    def __init__(self, device: torch.device) -> None:
        self._counters = _of_kind(device)
        self._lock = threading.Lock()
        self._last = [read() for read, _ in self._counters]
        self._joules = 0.0

    def read(self) -> float:
        """Return the joules; to be read more often than a counter of the system wraps, which takes minutes."""
        with self._lock:
            for index, (read, wraps_at) in enumerate(self._counters):
                now = read()
                self._joules += (now - self._last[index]) % wraps_at
                self._last[index] = now
            return self._joules


def missing(device: torch.device) -> str | None:
    """Return why the system does not count the energy of a device, or None if it does."""
    try:
        EnergyCounter(device)
    except (OSError, RuntimeError) as error:
        return str(error)
    return None


_Counter = tuple[Callable[[], float], float]  # joules, and where they wrap


def _of_kind(device: torch.device) -> list[_Counter]:
    if device.type == "cuda":
        return [_nvml(device)]
    if device.type == "mps":
        raise RuntimeError("macOS tells it to administrators: sudo powermetrics --samplers gpu_power")
    return _rapl()


def _rapl() -> list[_Counter]:
    zones = [zone for zone in sorted(POWERCAP.glob(_PACKAGES)) if zone.name.count(":") == 1]
    if not zones:
        raise RuntimeError(f"this system has no energy counter of the CPU in {POWERCAP}")
    return [_zone(zone) for zone in zones]


def _zone(zone: Path) -> _Counter:
    file = zone / "energy_uj"

    def read() -> float:
        try:
            return int(file.read_text()) * _MICRO
        except PermissionError:
            raise RuntimeError(f"{file} may be read by administrators alone") from None

    return read, int((zone / "max_energy_range_uj").read_text()) * _MICRO


def _nvml(device: torch.device) -> _Counter:
    if find_spec("pynvml") is None:
        raise RuntimeError(f"NVML's Python package is missing: {how_to_install('energy')}")
    import pynvml

    nvml: Any = pynvml
    try:
        nvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except nvml.NVMLError as error:
        raise RuntimeError(f"NVML does not count the energy of {device}: {error}") from None
    return lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) * _MILLI, float("inf")
