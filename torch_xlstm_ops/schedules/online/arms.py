"""The plans that a controller chooses among: the one in use, and few that differ from it in one size."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from torch_xlstm_ops.config import Config, Schedule
from torch_xlstm_ops.runtime import devices
from torch_xlstm_ops.schedules import plan
from torch_xlstm_ops.schedules.defaults import STEP_TOKENS, max_chunks
from torch_xlstm_ops.schedules.machine import machine
from torch_xlstm_ops.schedules.plan import Plan, Shape

COMPILE_SECONDS = {"cpu": 10.0, "cuda": 20.0}  # of a plan that needs other kernels, assumed
SMALLEST_CHUNK, LARGEST_CHUNK = 16, 256
MEMORY_SHARE = 4  # a plan's tasks in flight may take this part of the memory: a quarter

Settings = Mapping[str, object]  # fields of a configuration


class Candidate(NamedTuple):
    """A plan with the settings that give it."""

    name: str
    settings: Settings  # empty: the default
    compiles: bool = False  # whether it needs kernels that the one in use does not


def candidates(
    asked: Config, used: Config, shape: Shape, device: torch.device, *, gradient: bool = False
) -> list[Candidate]:
    """Return the plans for calls of a kind: the one in use, then those with its kernels, then those with others.

    asked: the configuration of the call. used: the same with what the tuner found. shape: the largest of the kind.
    gradient: whether they compute one. What the user set is not changed. Fewer than two plans mean that there is
    nothing to choose.
    """
    if asked.schedule is not Schedule.AUTO or shape.tokens <= STEP_TOKENS or not shape.rows:
        return []

    def planned(config: Config) -> Plan:
        return plan.make(shape, device.type, config, machine(device, config.schedule), gradient=gradient)

    base, plain = planned(used), planned(asked)
    if base.schedule not in (Schedule.INDUCTOR, Schedule.QUEUED):
        return []
    budget = devices.memory(device).budget
    most = max(base.window * base.task_bytes, (budget or 0) // MEMORY_SHARE)

    def open_(settings: Settings) -> Settings:
        return {f: v for f, v in settings.items() if f == "schedule" or getattr(asked, f) is None}

    first = Candidate("default", {}) if used == asked else Candidate("tuned", open_(settings_of(base)))
    found, seen = [first], {_key(base)}
    changes = [("default", plain.chunk_size != base.chunk_size, settings_of(plain)), *_changes(base, device)]
    for name, compiles, changed in changes:
        settings = open_(changed)
        made = planned(dataclasses.replace(asked, **settings))  # type: ignore[arg-type]
        chunks = -(-made.segment // made.chunk_size)
        fits = chunks <= max_chunks(device.type) and made.window * made.task_bytes <= most
        if fits and _key(made) not in seen:
            seen.add(_key(made))
            found.append(Candidate(name, settings, compiles))
    return found


def settings_of(made: Plan) -> dict[str, object]:
    """Return settings that give a plan."""
    found: dict[str, object] = {
        "schedule": made.schedule, "chunk_size": made.chunk_size, "segment": _segment(made),
        "heads_per_band": made.band,
    }
    if made.schedule is Schedule.QUEUED:
        found |= {"workers": made.workers, "window": made.window, **({"streams": made.streams} if made.streams else {})}
    return found


def _changes(base: Plan, device: torch.device) -> Iterator[tuple[str, bool, Settings]]:
    """Yield the plans that differ from `base` in one respect: name, whether it needs other kernels, settings."""
    own = settings_of(base)
    for segment in (_segment(base) // 2, _segment(base) * 2):
        if base.chunk_size <= segment < 2 * base.tokens:
            yield f"segment {segment}", False, {**own, "segment": segment}
    for band in (base.band // 2, base.band * 2):
        if 1 <= band < 2 * base.rows:
            yield f"heads_per_band {band}", False, {**own, "heads_per_band": band}
    if base.schedule is Schedule.INDUCTOR and device.type != "mps":  # a queue on MPS only bounds the memory
        yield "queued", device.type == "cpu", {"schedule": Schedule.QUEUED}
    for chunk in (base.chunk_size // 2, base.chunk_size * 2):
        if SMALLEST_CHUNK <= chunk <= LARGEST_CHUNK:
            yield f"chunk_size {chunk}", True, {**own, "chunk_size": chunk}


def _segment(made: Plan) -> int:
    whole = -(-max(made.tokens, 1) // made.chunk_size) * made.chunk_size
    return min(made.segment, whole)


def _key(made: Plan) -> tuple[object, ...]:
    """Return what differs between plans that execute differently."""
    same = (made.schedule, made.chunk_size, _segment(made), made.band)
    return same if made.schedule is Schedule.INDUCTOR else (*same, made.workers, made.streams, made.window)
