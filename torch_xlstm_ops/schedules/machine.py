"""The resources available to a plan: threads, streams, memory, actors."""

from __future__ import annotations

import torch

from torch_xlstm_ops import config, schedules
from torch_xlstm_ops.config import Schedule
from torch_xlstm_ops.runtime import devices
from torch_xlstm_ops.schedules.plan import Machine


def machine(device: torch.device, schedule: Schedule = Schedule.AUTO) -> Machine:
    """Return the resources available now to a call from this thread; for `ray`, in its cluster."""
    memory = devices.memory(device).budget if config.current().mem_fraction is not None else None
    actors = 0
    if schedule is Schedule.RAY and schedules.unavailable(schedule, device) is None:
        from torch_xlstm_ops.schedules.ray.actor_pool import free

        actors = free(device.type)
    return Machine(torch.get_num_threads(), device.type == "cuda", memory, actors)
