"""Timing for all benchmarks: clocks, calls in turns, memory, and a description of the machine."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from torch_xlstm_ops.runtime import devices
from torch_xlstm_ops.runtime.devices import timed
from torch_xlstm_ops.runtime.devices.energy import EnergyCounter

__all__ = ["alternate", "machine", "timed"]

Call = Callable[[], Any]
_Time = TypeVar("_Time")
_BUSY_BYTES = 1 << 30  # written in 0.4 ms on an H100: longer than a call takes to be submitted


def alternate(calls: Mapping[str, Call], device: torch.device, seconds: float) -> dict[str, float]:
    """Run the calls in turns until the time is over, at least five times; return the median milliseconds of each."""
    return {name: round(statistics.median(times), 4) for name, times in turns(calls, device, seconds, timed).items()}


def turns(
    calls: Mapping[str, Call], device: torch.device, seconds: float,
    clock: Callable[[Call, torch.device], _Time] = timed,  # type: ignore[assignment]
) -> dict[str, list[_Time]]:
    """Return what `clock`, by default in milliseconds, says of every run of each call, in turns as in `alternate`."""
    taken: dict[str, list[_Time]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, taken.values())) < 5:
        for name, call in calls.items():
            taken[name].append(clock(call, device))
    return taken


def device_timed(call: Call, device: torch.device) -> float:
    """Return the milliseconds of a call on `device`, on CUDA without its submission.

    As within a model, and as `triton.testing.do_bench` has it: the device has other work until the call is submitted,
    and that work leaves nothing of the call's in its caches.
    """
    if device.type != "cuda":
        return timed(call, device)
    _busy(device).zero_()
    start, end = devices.event(device, timing=True), devices.event(device, timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def walled(call: Call, device: torch.device) -> tuple[float, float]:
    """Return the milliseconds until a call has finished on an idle device, and those until it has been submitted."""
    devices.synchronize(device)
    start = time.perf_counter()
    call()
    submitted = time.perf_counter()
    devices.synchronize(device)
    return (time.perf_counter() - start) * 1e3, (submitted - start) * 1e3


@functools.cache
@torch.inference_mode(mode=False)  # independent of the mode of the next caller
def _busy(device: torch.device) -> torch.Tensor:
    return torch.empty(_BUSY_BYTES, dtype=torch.int8, device=device)


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Return the peak of bytes that a call allocates on CUDA, without its arguments; None elsewhere."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def joules(calls: Mapping[str, Call], device: torch.device, seconds: float) -> tuple[dict[str, float], str | None]:
    """Return the joules of each call, repeated in turn for an equal part of the time, or none and the reason.

    Of a CPU all packages and of a GPU the whole board, what idles and what others do included.
    """
    try:
        counter = EnergyCounter(device)
    except (OSError, RuntimeError) as error:
        return {}, str(error)
    found = {}
    for name, call in calls.items():
        devices.synchronize(device)
        before, count, end = counter.read(), 0, time.perf_counter() + seconds / len(calls)
        while not count or time.perf_counter() < end:
            call()
            devices.synchronize(device)
            count += 1
        found[name] = (counter.read() - before) / count
    return found, None


def tried(call: Callable[[], Any]) -> tuple[Any, str | None]:
    """Return the result of a call, or its error in one line."""
    try:
        return call(), None
    except Exception as error:  # Triton's errors have no other common class; the other contenders continue
        return None, f"{type(error).__name__}: {error}".splitlines()[0]


def spread(times: Sequence[float]) -> float:
    """Return half the distance between the quartiles over the median: 0.05 is 5% either way."""
    low, middle, high = statistics.quantiles(times, n=4)
    return round((high - low) / 2 / middle, 4)


def machine(device: torch.device, *packages: str) -> dict[str, Any]:
    """Return the device, its threads, and versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    versions = {package: importlib.metadata.version(package) for package in packages}
    return {
        "device": device.type, "name": name, "threads": torch.get_num_threads(),
        "python": platform.python_version(), "torch": torch.__version__, **versions,
    }


def save(result: Mapping[str, Any], path: Path | None) -> None:
    """Write a result as JSON if a path is given."""
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
