"""Ways to put a sequence's segments on a device: one loader a schedule, and why one cannot run here."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

import torch

from torch_xlstm_ops.config import Schedule
from torch_xlstm_ops.runtime.extras import how_to_install

_MODULES = {
    Schedule.INDUCTOR: "sequential", Schedule.QUEUED: "queue", Schedule.RAY: "ray", Schedule.RECURRENT: "recurrent",
}
RAY_MISSING = f"ray is not installed: {how_to_install('ray')}"


def unavailable(schedule: Schedule, device: torch.device) -> str | None:
    """Return why `schedule` cannot run on `device`, or None if it can."""
    if schedule is Schedule.RAY and importlib.util.find_spec("ray") is None:
        return RAY_MISSING
    return None


def load(schedule: Schedule, device: torch.device) -> ModuleType:
    """Return the module of a schedule.

    Raises NotImplementedError with the reason where the schedule cannot run.
    """
    reason = unavailable(schedule, device)
    if reason is not None:
        usable = ", ".join(s for s in Schedule if unavailable(s, device) is None)
        raise NotImplementedError(f"schedule must be one of {usable} on {device.type}, got {schedule} ({reason})")
    return importlib.import_module(f"{__name__}.{_MODULES[schedule]}")
