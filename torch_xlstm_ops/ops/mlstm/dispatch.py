"""How a call of a sequence operator is carried out: its plan, schedule and kernels, found once for calls alike."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from torch_xlstm_ops import config, schedules
from torch_xlstm_ops.config import Schedule
from torch_xlstm_ops.kernels.mlstm import Kernels, kernels
from torch_xlstm_ops.ops.call_cache import CallCache
from torch_xlstm_ops.ops.mlstm.arguments import Gradients, split
from torch_xlstm_ops.schedules import online, plan, tuned
from torch_xlstm_ops.schedules.machine import machine


class Dispatch(NamedTuple):
    """How a checked call is carried out."""

    plan: plan.Plan
    schedule: ModuleType | online.TunedSchedule
    kernels: Kernels


def dispatch(
    tensors: Sequence[Tensor | None], chunk_size: int | None, schedule: str | None, eps: float
) -> Dispatch:
    """Check a call and return how to carry it out.

    tensors: q k v igate fgate c n m, and in a backward pass dh dc dn dm.
    """
    cfg = config.for_call(schedule=schedule, chunk_size=chunk_size)
    find = _cache if cfg.mem_fraction is None else _find  # free memory changes between calls
    q, k, v = tensors[:3]
    training = len(tensors) > 8 or q.requires_grad or k.requires_grad or v.requires_grad  # type: ignore[union-attr]
    return find(tensors, cfg, eps, training)


def forget() -> None:
    """Plan calls anew, as tuned plans have changed."""
    _cache.clear()


def _find(tensors: Sequence[Tensor | None], cfg: config.Config, eps: float, training: bool) -> Dispatch:
    arguments = split(tuple(tensors[:8]))
    arguments.check(eps)
    if len(tensors) > 8:
        Gradients(*tensors[8:]).check(arguments.streams)  # type: ignore[arg-type]
    q, v = arguments.streams.q, arguments.streams.v
    device, (B, NH, S, DHQK) = q.device, q.shape
    shape = plan.Shape(B * NH, S, DHQK, v.shape[-1])
    strict, gradient = cfg.schedule in (Schedule.INDUCTOR, Schedule.QUEUED), len(tensors) > 8

    def carry_out(cfg: config.Config) -> Dispatch:
        planned = plan.make(shape, device.type, cfg, machine(device, cfg.schedule), gradient=gradient)
        release_gil = device.type == "cpu" and planned.threaded
        return Dispatch(
            planned, schedules.load(planned.schedule, device), kernels(eps, release_gil=release_gil, strict=strict)
        )

    asked, cfg = cfg, tuned.apply_tuned(cfg, shape, device, q.dtype, training=training)
    call, use = carry_out(cfg), online.Use(shape, device, q.dtype, training, gradient)
    return call._replace(schedule=online.schedule(call, asked, cfg, use, carry_out))


_cache = CallCache(_find)
