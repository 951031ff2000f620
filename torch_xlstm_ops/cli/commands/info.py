"""`xlstm-ops info`: devices, versions, schedules, and the configuration with its sources."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from collections.abc import Sequence

import torch

import torch_xlstm_ops
from torch_xlstm_ops import config, schedules
from torch_xlstm_ops.cli.shared.errors import bad_input
from torch_xlstm_ops.cli.shared.table import aligned
from torch_xlstm_ops.config import tuned_plans
from torch_xlstm_ops.patch import releases, upstream
from torch_xlstm_ops.runtime import devices, kernel_store, torch_internals
from torch_xlstm_ops.runtime.devices import energy

PACKAGES = ("torch", "triton", "safetensors", "rich", "ray", "optuna", "matplotlib")
_UNSET = {"trace": "off", "ray_address": "none"}
HELP = "say what this machine can do"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `info`."""
    parser.add_argument("--device", metavar="NAME", help="whose schedules: auto, cpu, cuda or mps (default auto)")
    parser.add_argument("--json", action="store_true", help="print it as JSON, for a report")
    config.add_flags(parser)


def execute(parsed: argparse.Namespace) -> int:
    """Print the report; return 0. Raises BadInput."""
    with bad_input():
        config.reload(flags=config.given_flags(parsed))
        device = devices.resolve_device(parsed.device or "auto")
        print(report_json(device) if parsed.json else report(device))
    return 0


def report(device: torch.device) -> str:
    """Return the text of `xlstm-ops info`; the schedules are those of `device`."""
    return "\n\n".join(f"{title}\n{aligned(rows)}" for title, rows in _sections(device).items())


def report_json(device: torch.device) -> str:
    """Return the same as JSON: for each section an object of its lines, and the system."""
    found: dict[str, object] = {"system": {"platform": platform.platform(), "machine": platform.machine(),
                                           "threads": torch.get_num_threads()}}
    for title, rows in _sections(device).items():
        found[title] = {row[0]: list(row[1:]) if len(row) > 2 else "".join(row[1:]) for row in rows}
    return json.dumps(found, indent=1)


def _sections(device: torch.device) -> dict[str, list[tuple[str, ...]]]:
    return {
        "versions": versions(),
        "supported packages": supported(),
        "devices": device_rows(devices.report()),
        f"schedules on {device.type}": schedule_rows(device),
        "configuration": configuration_rows(),
        "tuned plans": tuned_rows(device),
        "kernels": kernel_rows(device),
        "private APIs of torch": internals(),
    }


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
    """Return a line for each package that `patch` supports: its version here, and the tested ones."""
    return [(package.distribution, _version(name), f"tested with {package.tested}")
            for name, package in upstream.PACKAGES.items()]


def _version(name: str) -> str:
    if not releases.installed(name):
        return "not installed"
    version, distribution = releases.found(name)
    fork = distribution is not None and distribution != upstream.PACKAGES[name].distribution
    return f"{version} of {distribution}" if fork else version or "unknown"


def internals() -> list[tuple[str, ...]]:
    """Return a line for each private API of torch in use: native, or the fallback without it."""
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
    rows.append(("energy counter", energy.missing(_counted()) or "found"))
    fallback = "on: MPS operations may run on the CPU unseen" if devices.mps_fallback() else "off"
    rows.append(("PYTORCH_ENABLE_MPS_FALLBACK", fallback))
    if devices.mps_fast_math():
        rows.append(("PYTORCH_MPS_FAST_MATH", "on: sums on MPS are reordered and less exact: unset it"))
    return rows


def _counted() -> torch.device:
    return torch.device("cuda" if devices.cuda_missing() is None else "cpu")


def _abilities(found: devices.Capabilities) -> str:
    parts = [*found.names, "streams" if found.streams else "no streams", "events" if found.events else "no events"]
    if found.memory is not None:
        parts.append(f"memory {_gibibytes(found.memory.used)} of {_gibibytes(found.memory.budget)}")
    return ", ".join(parts)


def _gibibytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.2f} GiB"


def schedule_rows(device: torch.device) -> list[tuple[str, ...]]:
    """Return a line for each schedule: it can run, or why not."""
    reasons = {schedule: schedules.unavailable(schedule, device) for schedule in config.Schedule}
    return [(str(schedule), "can run" if reason is None else f"cannot run: {reason}")
            for schedule, reason in reasons.items()]


def configuration_rows() -> list[tuple[str, ...]]:
    """Return a line for each setting: its value and where that came from."""
    return [(name, str(source.value or _UNSET.get(name, "the plan chooses")), source.origin)
            for name, source in config.sources().items()]


def tuned_rows(device: torch.device) -> list[tuple[str, ...]]:
    """Return the path of the tuned plans, and a line for each one of this device and this torch."""
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


def kernel_rows(device: torch.device) -> list[tuple[str, ...]]:
    """Return the folder of the kernels that are kept, with their number, or why none are."""
    store, reason = kernel_store.chosen(), kernel_store.unsupported(device)
    if store is None:
        return [("off",)]
    reason = reason or store.refused()
    if reason is not None:
        return [("not kept", reason)]
    entries = store.entries()
    return [("kept in", str(store.folder)), ("kernels", f"{len(entries)}, {sum(one.size for one in entries)} bytes")]
