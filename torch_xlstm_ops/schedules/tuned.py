"""Where `auto` asks what the tuner found: once for each kind of call, when its plan is made."""

from __future__ import annotations

import dataclasses
import warnings

import torch

from torch_xlstm_ops import schedules
from torch_xlstm_ops.config import Config, Schedule, tuned_plans
from torch_xlstm_ops.schedules.defaults import STEP_TOKENS
from torch_xlstm_ops.schedules.plan import Shape


def apply_tuned(config: Config, shape: Shape, device: torch.device, dtype: torch.dtype, *, training: bool) -> Config:
    """Return a configuration whose schedule is `auto` with what won for such calls, where the user left it open.

    What the user set stands. A winner whose schedule cannot run here is not used, and a warning says so.
    """
    if config.schedule is not Schedule.AUTO or config.tuned == "off" or shape.tokens <= STEP_TOKENS or not shape.rows:
        return config
    kind = tuned_plans.call_kind(device, dtype, *shape, training=training)
    found = tuned_plans.find(config.tuned, kind)
    if found is None:
        return config
    reason = schedules.unavailable(Schedule(found["schedule"]), device)
    if reason is not None:
        warnings.warn(f"a tuned plan is not used: {found['schedule']} cannot run here ({reason})", RuntimeWarning,
                      stacklevel=2)
        return config
    open_ = {f: v for f, v in found.items() if f == "schedule" or getattr(config, f) is None}
    return dataclasses.replace(config, **open_)  # type: ignore[arg-type]
