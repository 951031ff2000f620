"""The plan of one call: S tokens of R rows, divided into bands of rows and segments of tokens. Pure data.

A row is one head of one batch entry. Bands are independent; within a band each segment starts from the state after the
previous one. A task is one segment of one band.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

from torch_xlstm_ops.config import Config, Schedule
from torch_xlstm_ops.schedules.defaults import CUDA_WORKERS, STEP_TOKENS, device_defaults, max_chunks
from torch_xlstm_ops.schedules.diagram import diagram


class Segment(NamedTuple):
    """The tokens [start, stop), padded at the end to `chunks` chunks."""

    start: int
    stop: int
    chunks: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one call is divided, and what runs concurrently. Sizes are in rows and tokens."""

    schedule: Schedule
    rows: int
    tokens: int
    chunk_size: int
    segment: int
    band: int
    chunk_counts: tuple[int, ...] = ()  # allowed numbers of chunks in the last segment; empty: any
    workers: int = 1  # threads that run tasks, or actors
    threads: int = 1  # intra-op threads of each worker
    streams: int = 0  # device streams that we create
    window: int = 1  # limit of tasks in flight
    task_bytes: int = 0  # estimated memory of one task in flight
    notes: tuple[str, ...] = ()  # why the plan uses less than was asked for

    @functools.cached_property
    def bands(self) -> list[slice]:
        """Return the rows of each band."""
        return [slice(start, min(start + self.band, self.rows)) for start in range(0, self.rows, self.band)]

    @functools.cached_property
    def segments(self) -> list[Segment]:
        """Return the segments in order."""
        return [self._segment(start) for start in range(0, self.tokens, self.segment)]

    @property
    def scan_width(self) -> int:
        """Return how many segments of one band run concurrently: more than 1 if there are fewer bands than workers."""
        return _ceil(self.workers, max(1, _ceil(self.rows, self.band)))

    @property
    def threaded(self) -> bool:
        """Return whether our threads run tasks concurrently."""
        return self.workers > 1 and self.schedule is not Schedule.RAY

    @property
    def submitters(self) -> int:
        """Return how many of our threads submit tasks: the workers, or one for each task in flight on actors."""
        return self.window if self.schedule is Schedule.RAY else self.workers

    def _segment(self, start: int) -> Segment:
        stop = min(start + self.segment, self.tokens)
        chunks = _ceil(stop - start, self.chunk_size)
        return Segment(start, stop, next((count for count in self.chunk_counts if count >= chunks), chunks))

    def __str__(self) -> str:
        bands, segments = len(self.bands), len(self.segments)
        streams = f" on {_count(self.streams, 'stream')}" if self.streams else ""
        memory = self.window * self.task_bytes / 2**20
        table = [
            ("schedule", str(self.schedule)),
            ("rows", f"{self.rows} in {_count(bands, 'band')} of {self.band}"),
            ("tokens", f"{self.tokens} in {_count(segments, 'segment')} of {self.segment} by {self.chunk_size}"),
            ("workers", f"{self.workers}, {_count(self.threads, 'thread')} each{streams}"),
            ("window", f"{_count(self.window, 'task')} in flight, about {memory:.1f} MB"),
            *(("note", note) for note in self.notes),
        ]
        lines = [f"{name:<8}  {value}" for name, value in table]
        return "\n".join([*lines, "", *diagram(bands, segments, self.scan_width)])


class Shape(NamedTuple):
    """The sizes of a call that a plan depends on."""

    rows: int
    tokens: int
    DHQK: int
    DHHV: int


class Machine(NamedTuple):
    """The resources that a plan may use."""

    threads: int = 1  # of the host, shared by all workers
    streams: bool = False  # whether we can create streams on the device
    memory: int | None = None  # bytes that the process may use on the device; None: unknown
    actors: int = 0  # that fit into the Ray cluster


@functools.lru_cache(maxsize=1024)
def make(
    shape: Shape, device: str, config: Config, machine: Machine = Machine(), *, gradient: bool = False,  # noqa: B008
) -> Plan:
    """Return the plan for a call on a device of type `device`; sizes in `config` override the defaults.

    gradient: whether the call computes a gradient, whose tasks take more memory.
    """
    schedule = config.schedule
    concurrent = schedule in (Schedule.QUEUED, Schedule.RAY)
    defaults = device_defaults(schedule, device, shape.DHQK)
    if schedule is Schedule.AUTO:
        schedule = Schedule.RECURRENT if shape.tokens <= STEP_TOKENS else Schedule.INDUCTOR
    # Not longer than the sequence, rounded up to a power of two so that few sizes are compiled.
    longest = max(defaults.chunk_size, 1 << max(shape.tokens - 1, 0).bit_length())
    L = min(config.chunk_size or defaults.chunk_size, longest)
    summary = shape.DHQK * shape.DHHV * 4
    chunks = min(defaults.state_bytes // summary, defaults.segment_tokens // L, max_chunks(device))
    segment = config.segment or max(4, chunks) * L
    segment = _ceil(segment, L) * L
    NC = _ceil(min(segment, max(shape.tokens, 1)), L)
    task_tokens = (defaults.gradient_tokens if gradient else None) or defaults.task_tokens
    fitting = max(1, min(defaults.state_bytes // (summary * NC), task_tokens // (NC * L)))
    rows = max(shape.rows, 1)
    if concurrent:  # a band for each worker is better than full bands
        fitting = min(fitting, _ceil(rows, _wanted_workers(schedule, device, config, machine)))
    band = min(config.heads_per_band or _ceil(rows, _ceil(rows, fitting)), rows)  # by default of nearly equal sizes
    # Chunk summaries, inter-chunk states and their sources; gates and scores; inputs and outputs.
    task_bytes = 4 * band * NC * (3 * shape.DHQK * shape.DHHV + L * (3 * L + 3 * shape.DHQK + 3 * shape.DHHV))
    if schedule is Schedule.RAY:  # the tensors that are sent
        task_bytes = 4 * band * NC * L * 2 * (shape.DHQK + shape.DHHV)
    plan = Plan(schedule, shape.rows, shape.tokens, L, segment, band, defaults.chunk_counts, threads=machine.threads,
                task_bytes=task_bytes)
    if not concurrent:
        return plan
    return (_with_actors if schedule is Schedule.RAY else _with_threads)(plan, device, config, machine)


def _wanted_workers(schedule: Schedule, device: str, config: Config, machine: Machine) -> int:
    if device == "mps":
        return 1
    if schedule is Schedule.RAY:
        return config.workers or max(1, machine.actors)
    return config.workers or (machine.threads if device == "cpu" else CUDA_WORKERS)


def _with_threads(plan: Plan, device: str, config: Config, machine: Machine) -> Plan:
    """Set workers, streams and window within the machine's limits, with a note for each value that is reduced."""
    notes, limited = _limits()
    bands, segments = len(plan.bands), len(plan.segments)
    workers = _wanted_workers(plan.schedule, device, config, machine)
    if device == "mps":
        limited(config.workers or 1, 1, "MPS takes one submitting thread", "worker")
    workers = limited(workers, max(machine.threads, 1), _count(machine.threads, "thread"), "worker")
    if device != "cpu":  # one task fills the device: summaries would only add work
        workers = limited(workers, max(bands, 1), _count(bands, "band"), "worker")
    elif workers > bands:
        limit = max(bands * segments, 1)
        workers = limited(workers, limit, f"{_count(bands, 'band')} of {_count(segments, 'segment')}", "worker")
    in_order = device == "cpu" or not machine.streams
    window = config.window or (workers if device == "cpu" else 2 * workers)
    if config.mem_fraction and machine.memory and plan.task_bytes:
        fitting = int(config.mem_fraction * machine.memory) // plan.task_bytes
        window = limited(window, max(1, fitting), f"{config.mem_fraction:g} of the memory", "task")
    workers = limited(workers, window, f"a window of {window}", "worker")
    if in_order and config.streams:
        notes.append(f"{device} has no streams of our own: 0 of {_count(config.streams, 'stream')} used")
    streams = 0 if in_order else limited(config.streams or workers, workers, _count(workers, "worker"), "stream")
    threads = max(1, machine.threads // workers) if device == "cpu" else machine.threads
    return dataclasses.replace(
        plan, workers=workers, threads=threads, streams=streams, window=window, notes=tuple(notes)
    )


def _with_actors(plan: Plan, device: str, config: Config, machine: Machine) -> Plan:
    """Set actors of one thread each, and the window: two tasks per actor, so that one is being sent."""
    notes, limited = _limits()
    bands, segments = len(plan.bands), len(plan.segments)
    workers = _wanted_workers(plan.schedule, device, config, machine)
    if device == "mps":
        limited(config.workers or 1, 1, "MPS has one GPU, which one actor owns", "worker")
    workers = limited(workers, max(machine.actors, 1), f"the cluster has room for {machine.actors}", "worker")
    workers = limited(workers, max(bands * segments, 1), f"{_count(bands, 'band')} of {_count(segments, 'segment')}",
                  "worker")
    window = config.window or 2 * workers
    workers = limited(workers, window, f"a window of {window}", "worker")
    if config.streams:
        notes.append(f"actors have no streams of ours: 0 of {_count(config.streams, 'stream')} used")
    return dataclasses.replace(plan, workers=workers, threads=1, window=window, notes=tuple(notes))


def _limits() -> tuple[list[str], Callable[[int, int, str, str], int]]:
    """Return a list of notes, and a function that limits a value and adds a note with the reason."""
    notes: list[str] = []

    def limited(value: int, limit: int, reason: str, what: str) -> int:
        if value > limit:
            notes.append(f"{reason}: {limit} of {_count(value, what)} used")
        return max(1, min(value, limit))

    return notes, limited


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
