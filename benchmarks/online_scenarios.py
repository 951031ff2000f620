"""Scenarios for the online controller: how long each plan takes in each phase, from recorded ablations.

The ablations in `benchmarks/ablations` give the speed of each plan beside the default on a quiet machine. What other
work does to a plan is modelled, as said with each scenario.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch_xlstm_ops.schedules.online.controller import Arm

ABLATIONS = Path(__file__).parent / "ablations"
COMPILING = ("queued", "chunk_size 32", "chunk_size 128")  # plans that need other kernels; on CUDA only chunks do
_PLANS = {
    "cpu": ("segment 256", "segment 1024", "heads_per_band 2", "queued", "chunk_size 32", "chunk_size 128"),
    "h100": ("segment 4096", "heads_per_band 4", "queued", "chunk_size 128"),
}
QUIET_NOISE, SPIKES, SPIKE = 0.05, 0.01, 3.0  # deviation of the logarithm, part of the calls, times as long


class Phase(NamedTuple):
    """A stretch of a scenario with calls of one kind."""

    kind: int
    calls: int
    seconds: tuple[float, ...]  # of a call by each plan, on average
    noise: float = QUIET_NOISE


class Scenario(NamedTuple):
    """Calls one after another."""

    name: str
    arms: tuple[Arm, ...]
    compile_seconds: float  # what a compilation really takes
    phases: tuple[Phase, ...]


def recorded(machine: str) -> tuple[tuple[Arm, ...], list[float]]:
    """Return the plans of a recorded ablation, the default first, and how many times as fast as it each is."""
    rows = json.loads((ABLATIONS / f"{machine}.json").read_text(encoding="utf-8"))["rows"]
    by_name = {r["value"] if r["setting"] == "schedule" else f"{r['setting']} {r['value']}": r for r in rows}
    compiling = COMPILING if machine == "cpu" else COMPILING[1:]
    seconds = 10.0 if machine == "cpu" else 20.0
    arms = [Arm(name, seconds if name in compiling else 0.0) for name in _PLANS[machine]]
    return (Arm("default"), *arms), [1.0, *(by_name[name]["times_as_fast"] for name in _PLANS[machine])]


def scenarios(calls: int, draws: random.Random) -> list[Scenario]:
    """Return every scenario, each of so many calls."""
    return [make(calls, draws) for make in _MAKERS]


def _times(call: float, speeds: Sequence[float], factors: Sequence[float] | None = None) -> tuple[float, ...]:
    return tuple(call / s * f for s, f in zip(speeds, factors or [1.0] * len(speeds), strict=True))


def _quiet(calls: int, draws: random.Random) -> Scenario:
    """A quiet CPU: the recorded speeds."""
    arms, speeds = recorded("cpu")
    return Scenario("quiet CPU", arms, 8.0, (Phase(0, calls, _times(CALL, speeds)),))


def _core_taken(calls: int, draws: random.Random) -> Scenario:
    """One of two cores is shared from half-way on: a parallel loop waits for its slower half, twice as long as before.
    The queue's workers share the tasks, and lose a quarter of the two cores.
    """
    arms, speeds = recorded("cpu")
    taken = [4 / 3 if arm.name == "queued" else 2.0 for arm in arms]
    return Scenario("another process takes a core half-way", arms, 8.0, (
        Phase(0, calls // 2, _times(CALL, speeds)),
        Phase(0, calls - calls // 2, _times(CALL, speeds, taken), 0.1),
    ))


def _throttled(calls: int, draws: random.Random) -> Scenario:
    """The clock falls and rises: all plans take up to half as long again, and none becomes better."""
    arms, speeds = recorded("cpu")
    parts = 20
    return Scenario("the clock throttles", arms, 8.0, tuple(
        Phase(0, calls // parts, _times(CALL * (1.25 - 0.25 * math.cos(2 * math.pi * part / parts)), speeds))
        for part in range(parts)
    ))


def _lengths(calls: int, draws: random.Random) -> Scenario:
    """Prompts of 512 to 32,768 tokens, one kind of call for each power of two: the recorded speeds, changed by 10%."""
    arms, speeds = recorded("cpu")
    lengths = [512 << power for power in range(7)]
    return Scenario("lengths drift from 512 to 32K", arms, 8.0, tuple(
        Phase(kind, calls // len(lengths), _times(
            CALL * length / 16384, [1.0, *(s * math.exp(draws.gauss(0, 0.1)) for s in speeds[1:])]))
        for kind, length in enumerate(lengths)
    ))


def _gpu_shared(calls: int, draws: random.Random) -> Scenario:
    """A GPU beside another job in the middle third: all plans take 1.8 times as long, with a quarter of noise."""
    arms, speeds = recorded("h100")
    third = calls // 3
    return Scenario("GPU beside another job", arms, 15.0, (
        Phase(0, third, _times(CALL, speeds)),
        Phase(0, third, _times(CALL, speeds, [1.8] * len(speeds)), 0.25),
        Phase(0, third, _times(CALL, speeds)),
    ))


def _other_machine(calls: int, draws: random.Random) -> Scenario:
    """A machine that the defaults were not found on: the plans' speeds are drawn, with a deviation of a quarter."""
    arms, speeds = recorded("cpu")
    drawn = [1.0, *(math.exp(draws.gauss(0, 0.25)) for _ in speeds[1:])]
    return Scenario("a machine unlike those measured", arms, 8.0, (Phase(0, calls, _times(CALL, drawn)),))


CALL = 0.04  # seconds of a call by the default plan
_MAKERS: tuple[Callable[[int, random.Random], Scenario], ...] = (
    _quiet, _core_taken, _throttled, _lengths, _gpu_shared, _other_machine,
)


def best_plans(scenario: Scenario) -> Mapping[int, int]:
    """Return the best plan of each kind on the machine as it is first, which an offline search finds."""
    found: dict[int, int] = {}
    for phase in scenario.phases:
        found.setdefault(phase.kind, min(range(len(phase.seconds)), key=phase.seconds.__getitem__))
    return found
