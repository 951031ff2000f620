"""What the machine is, as far as times depend on it, and what a launch costs on it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from torch_xlstm_ops.runtime import devices

PREFIXES = ("PYTORCH_MPS_", "PYTORCH_ENABLE_MPS", "PYTORCH_DEBUG_MPS", "TORCHINDUCTOR_", "XLSTM_OPS_", "OMP_", "MTL_")
CALLS = 200  # for the cost of a launch


def describe(device: torch.device) -> dict[str, Any]:
    """Return chip, cores, memory, system and the environment variables that matter."""
    memory = devices.memory(device)
    return {
        "chip": _sysctl("machdep.cpu.brand_string") or platform.processor() or platform.machine(),
        "model": _sysctl("hw.model"),
        "virtual_machine": _sysctl("kern.hv_vmm_present") == "1",
        "cpu_cores": os.cpu_count(),
        "gpu_cores": _gpu_cores(device),
        "memory_bytes": _number(_sysctl("hw.memsize")),
        "device_memory_budget_bytes": memory.budget,
        "platform": platform.platform(), "machine": platform.machine(), "macos": platform.mac_ver()[0],
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(PREFIXES)},
    }


def launch_costs(device: torch.device) -> dict[str, float]:
    """Return the microseconds that the smallest calls take, one after another: an addition, and a product."""
    with torch.no_grad():
        x, square = torch.ones(8, device=device), torch.ones(1, 8, 8, device=device)
        calls = {"add_": lambda: x.add_(1), "bmm": lambda: torch.bmm(square, square)}
        return {name: _microseconds(call, device) for name, call in calls.items()}


def _microseconds(call: Callable[[], object], device: torch.device) -> float:
    devices.timed(call, device)
    return devices.timed(lambda: [call() for _ in range(CALLS)], device) * 1e3 / CALLS


def _gpu_cores(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    count = getattr(torch.backends.mps, "get_core_count", None)
    return int(count()) if device.type == "mps" and count is not None else None


def _sysctl(name: str) -> str | None:
    """Return a value of macOS's sysctl, or None where there is none."""
    if sys.platform != "darwin":
        return None
    try:
        done = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None
