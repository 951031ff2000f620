"""The search space: the distinct plans that settings give for one call on one device."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from torch_xlstm_ops import schedules
from torch_xlstm_ops.config import Config, Schedule, tuned_plans
from torch_xlstm_ops.schedules import plan
from torch_xlstm_ops.schedules.plan import Machine, Plan, Shape

Value = str | int
Params = Mapping[str, Value]  # a value for every field of `Space.choices`
Key = tuple[Value, ...]  # identifies what is executed: plans with equal keys do the same work

CHUNK_SIZES = (16, 32, 64, 128, 256)
SIZES = ("chunk_size", "segment", "heads_per_band")
MIN_SEGMENT = 128
DEVICE_WORKERS = (1, 2, 4)
STREAMS = (1, 2, 4)
WINDOWS = (1, 2, 4, 8)
SEARCHED = (Schedule.INDUCTOR, Schedule.QUEUED)  # in one process; `recurrent` is the reference


class EmptySpace(ValueError):
    """No setting changes what is executed."""


class Candidate(NamedTuple):
    """A plan, and settings that give it."""

    key: Key
    params: Params
    plan: Plan


class Limits(NamedTuple):
    """Limits of the memory model."""

    most_bytes: int | None  # None: unknown
    held_bytes: int  # by the call, with every plan


class Space:
    """The settings with their values, and the distinct plans that they give.

    shape: sizes of the call. machine: the resources that plans may use.
    limits: plans that need more memory are `refused`. searched: schedules to try, if they can run here.

    Raises EmptySpace if there are fewer than two plans.
    """

    def __init__(
        self, shape: Shape, device: torch.device, machine: Machine, limits: Limits,
        searched: Sequence[Schedule] = SEARCHED,
    ) -> None:
        self.shape, self.device, self.machine, self.limits = shape, device, machine, limits
        self._max_chunks = plan.max_chunks(device.type)
        defaults = [self._plan(Config(schedule=schedule)) for schedule in searched
                  if schedules.unavailable(schedule, device) is None]
        self._fixed: dict[str, Value] = {}
        self.choices = self._all_choices(defaults)
        self._collect_plans()
        self._candidate_of(self._plan(Config()))
        used = {f: tuple(v for v in values if any(c.params[f] == v for c in self.plans.values()))
                for f, values in self.choices.items()}
        self._fixed = {f: values[0] for f, values in used.items() if len(values) == 1}
        self.choices = {f: values for f, values in used.items() if len(values) > 1}
        self._collect_plans()
        self.default = self._candidate_of(self._plan(Config()))
        if len(self.plans) < 2:
            raise EmptySpace(f"the space must hold at least two plans, got {len(self.plans)}: no setting changes what "
                             f"runs for {shape.rows} rows of {shape.tokens} tokens on {device.type}")

    def candidate(self, params: Params) -> Candidate:
        """Return the plan that settings give."""
        made = self._plan(self.config(params))
        return Candidate(executed(made, self.device), dict(params), made)

    def config(self, params: Params) -> Config:
        """Return settings as a configuration."""
        return Config(**self.settings(params), tuned="off")  # type: ignore[arg-type]

    def settings(self, params: Params) -> dict[str, object]:
        """Return settings as fields of a configuration, including those with only one value."""
        values: dict[str, object] = {**self._fixed, **params}
        values["schedule"] = Schedule(str(values["schedule"]))
        return values

    def distance(self, one: Candidate, other: Candidate) -> tuple[int, int]:
        """Return the number of respects (sizes, and all other settings) in which two plans differ, and of steps."""
        sizes = [field for field in self.choices if field in SIZES]
        steps = [abs(self.choices[f].index(one.params[f]) - self.choices[f].index(other.params[f])) for f in sizes]
        steps.append(int(any(one.params[f] != other.params[f] for f in self.choices if f not in SIZES)))
        return sum(step > 0 for step in steps), sum(steps)

    def signature(self) -> str:
        """Return a hash that differs between spaces."""
        content = (self.shape, self.device.type, self.machine._replace(memory=None), self.choices)
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def needed_bytes(self, made: Plan) -> int:
        """Return the memory model's estimate for a call under a plan."""
        return self.limits.held_bytes + made.window * made.task_bytes

    def _collect_plans(self) -> None:
        """Collect the plans that the choices give."""
        self.plans: dict[Key, Candidate] = {}
        self.refused: dict[Key, str] = {}
        for params in self._grid():
            candidate = self.candidate(params)
            reason = self._refusal(candidate.plan)
            if reason is None:
                self.plans.setdefault(candidate.key, candidate)
            else:
                self.refused.setdefault(candidate.key, reason)

    def _refusal(self, made: Plan) -> str | None:
        chunks = -(-made.segment // made.chunk_size)
        if chunks > self._max_chunks:
            return f"{chunks} chunks a segment, more than {self._max_chunks}"
        needed, most = self.needed_bytes(made), self.limits.most_bytes
        if most is not None and needed > most:
            return f"{needed >> 20} MB needed, {most >> 20} MB there"
        return None

    def _plan(self, config: Config) -> Plan:
        return plan.make(self.shape, self.device.type, config, self.machine)

    def _all_choices(self, defaults: list[Plan]) -> dict[str, tuple[Value, ...]]:
        """Return the values of each field, including those of the default plans."""
        tokens, rows, kind = max(self.shape.tokens, 1), max(self.shape.rows, 1), self.device.type
        longest = tuned_plans.bucket(tokens)
        chunks = {L for L in CHUNK_SIZES if longest >= L} | {p.chunk_size for p in defaults}
        most = min(longest, self._max_chunks * max(chunks))
        segments = set(_powers(min(MIN_SEGMENT, most), most)) | {min(p.segment, longest) for p in defaults}
        bands = {*_powers(1, rows), rows, *(p.band for p in defaults)}
        choices: dict[str, tuple[Value, ...]] = {
            "schedule": tuple(str(p.schedule) for p in defaults), "chunk_size": tuple(sorted(chunks)),
            "segment": tuple(sorted(segments)), "heads_per_band": tuple(sorted(bands)),
        }
        threads = self.machine.threads
        workers = {*_powers(1, threads), threads} if kind == "cpu" else {w for w in DEVICE_WORKERS if w <= threads}
        choices["workers"] = (1,) if kind == "mps" else tuple(sorted(workers))
        if self.machine.streams:
            choices["streams"] = STREAMS
        if kind != "cpu":  # on a CPU, a window only limits the workers
            choices["window"] = WINDOWS
        return choices

    def _grid(self) -> Iterator[Params]:
        for values in itertools.product(*self.choices.values()):
            yield dict(zip(self.choices, values, strict=True))

    def _candidate_of(self, made: Plan) -> Candidate:
        """Return the candidate that executes a plan. Raises EmptySpace if the space has none."""
        key = executed(made, self.device)
        if key not in self.plans:
            raise EmptySpace(f"the space must hold the default plan, got none that runs like it: "
                             f"{self.refused.get(key, str(made.schedule) + ' for ' + str(made.tokens) + ' tokens')}")
        return self.plans[key]


def executed(made: Plan, device: torch.device) -> Key:
    """Return the parts of a plan that change what is executed."""
    whole = -(-max(made.tokens, 1) // made.chunk_size) * made.chunk_size
    key: Key = (str(made.schedule), made.chunk_size, min(made.segment, whole), made.band)
    if made.schedule is Schedule.INDUCTOR:
        return key
    window = 0 if device.type == "cpu" else made.window
    return *key, made.workers, made.threads, made.streams, window


def call_bytes(shape: Shape, itemsize: int, *, training: bool) -> int:
    """Return the bytes of a call's streams, gates, h and states, and in training of their gradients, for any plan."""
    streams = shape.rows * shape.tokens * (2 * shape.DHQK + 2 * shape.DHHV + 2) * itemsize
    states = 3 * shape.rows * shape.DHQK * (shape.DHHV + 1) * 4
    return (streams + states) * (3 if training else 1)


def _powers(first: int, last: int) -> list[int]:
    """Return the powers of two from `first`, which is one, to `last`."""
    found = []
    while first <= last:
        found.append(first)
        first *= 2
    return found
