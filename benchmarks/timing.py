"""What every measurement shares: a clock that waits for the device, turns taken call by call, the machine's name."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from torch_xlstm_ops.devices import timed

__all__ = ["alternate", "machine", "timed"]

Call = Callable[[], Any]


def alternate(calls: Mapping[str, Call], device: torch.device, seconds: float) -> dict[str, float]:
    """Return the median milliseconds of each call, all taking turns until the time is up, five times at least."""
    return {name: round(statistics.median(times), 4) for name, times in turns(calls, device, seconds).items()}


def turns(calls: Mapping[str, Call], device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Return the milliseconds of each call in each of its turns, as of `alternate`."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, taken.values())) < 5:
        for name, call in calls.items():
            taken[name].append(timed(call, device))
    return taken


def spread(times: Sequence[float]) -> float:
    """Return half the distance between the quartiles over the median: 0.05 is 5% either way."""
    low, middle, high = statistics.quantiles(times, n=4)
    return round((high - low) / 2 / middle, 4)


def machine(device: torch.device, *packages: str) -> dict[str, Any]:
    """Return what a figure depends on: the device, its threads, and versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    versions = {package: importlib.metadata.version(package) for package in packages}
    return {
        "device": device.type, "name": name, "threads": torch.get_num_threads(),
        "python": platform.python_version(), "torch": torch.__version__, **versions,
    }


def save(result: Mapping[str, Any], path: Path | None) -> None:
    """Write a result as JSON where one was asked for."""
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
