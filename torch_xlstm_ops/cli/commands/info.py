"""What `xlstm-ops info` prints: devices, versions, schedules, and the configuration with its sources."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence

import torch

import torch_xlstm_ops
from torch_xlstm_ops import config, schedules
from torch_xlstm_ops.config import tuned_plans
from torch_xlstm_ops.patch import upstream
from torch_xlstm_ops.runtime import devices, torch_internals

PACKAGES = ("torch", "triton", "safetensors", "rich", "ray", "optuna", "matplotlib")
_UNSET = {"trace": "off", "ray_address": "none"}


def report(device: torch.device) -> str:
    """Return the text of `xlstm-ops info`; `device` is the one that schedules are asked about."""
    sections = {
        "versions": versions(),
        "supported packages": supported(),
        "devices": device_rows(devices.report()),
        f"schedules on {device.type}": schedule_rows(device),
        "configuration": configuration_rows(),
        "tuned plans": tuned_rows(device),
        "private APIs of torch": internals(),
    }
    return "\n\n".join(f"{title}\n{aligned(rows)}" for title, rows in sections.items())


def versions() -> list[tuple[str, ...]]:
    """Return Python's version and those of the packages that are installed."""
    rows: list[tuple[str, ...]] = [("python", platform.python_version())]
    rows.append(("torch_xlstm_ops", torch_xlstm_ops.__version__))
    for package in PACKAGES:
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    return rows


def supported() -> list[tuple[str, ...]]:
    """Return a line for each package that `patch` knows: the version that is there, and those we were tested with."""
    return [(peer.distribution, _version(name), f"tested with {peer.tested}") for name, peer in upstream.PEERS.items()]


def _version(name: str) -> str:
    if not upstream.installed(name):
        return "not installed"
    version, distribution = upstream.found(name)
    fork = distribution is not None and distribution != upstream.PEERS[name].distribution
    return f"{version} of {distribution}" if fork else version or "unknown"


def internals() -> list[tuple[str, ...]]:
    """Return a line for each private API of torch that we use: that it is there, or what is done without it."""
    return [
        (one.name, "native" if one.moved is None else f"fallback: {one.moved}; {one.without}")
        for one in torch_internals.status()
    ]


def device_rows(report: Sequence[devices.Capabilities]) -> list[tuple[str, ...]]:
    """Return a line for each kind of device, and one for the fallback that would hide a missing MPS operation."""
    rows: list[tuple[str, ...]] = []
    for found in report:
        rows.append((found.kind, found.missing if found.missing is not None else _abilities(found)))
    missing = torch_internals.compiler_missing()
    compiler = "found" if missing is None else f"none, operators run uncompiled on the CPU: {missing}"
    rows.append(("C++ compiler", compiler))
    fallback = "on: MPS operations may run on the CPU unseen" if devices.mps_fallback() else "off"
    rows.append(("PYTORCH_ENABLE_MPS_FALLBACK", fallback))
    return rows


def _abilities(found: devices.Capabilities) -> str:
    parts = [*found.names, "streams" if found.streams else "no streams", "events" if found.events else "no events"]
    if found.memory is not None:
        parts.append(f"memory {_gibibytes(found.memory.used)} of {_gibibytes(found.memory.budget)}")
    return ", ".join(parts)


def _gibibytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.2f} GiB"


def schedule_rows(device: torch.device) -> list[tuple[str, ...]]:
    """Return a line for each schedule: that it can run, or why not."""
    reasons = {schedule: schedules.unavailable(schedule, device) for schedule in config.Schedule}
    return [(str(schedule), "can run" if reason is None else f"cannot run: {reason}")
            for schedule, reason in reasons.items()]


def configuration_rows() -> list[tuple[str, ...]]:
    """Return a line for each setting: its value and where that came from."""
    return [(name, str(source.value or _UNSET.get(name, "the plan chooses")), source.origin)
            for name, source in config.sources().items()]


def tuned_rows(device: torch.device) -> list[tuple[str, ...]]:
    """Return where the tuner's winners are kept, and a line for each that is for this device and this torch."""
    path = tuned_plans.place(config.current().tuned)
    if path is None:
        return [("off",)]
    kept = tuned_plans.entries(path)
    if not kept:
        return [("none: xlstm-ops tune finds them",)]
    here = f"device={tuned_plans.device_name(device)} | torch={torch.__version__} | "
    found = [(key.removeprefix(here), " ".join(f"{field}={value}" for field, value in entry["settings"].items()))
             for key, entry in kept.items() if key.startswith(here)]
    return [("kept in", str(path)), ("for this device", f"{len(found)} of {len(kept)}"), *found]


def aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Return rows as text, each column as wide as it needs."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
