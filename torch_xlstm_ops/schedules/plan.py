"""What will run: a sequence of S tokens in R rows, cut into bands of rows and segments of tokens. Pure data.

A row is one head of one batch entry. Within a band the segments are strictly ordered, each starting from the state
that the one before it left; bands are independent. A task is one segment of one band.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

from torch_xlstm_ops.config import Config, Schedule

STEP_TOKENS = 4  # up to here a loop of steps is cheaper than a chunk


class Segment(NamedTuple):
    """The tokens [start, stop), computed as `chunks` chunks; what the last one has too many is padding."""

    start: int
    stop: int
    chunks: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one call is cut up, and what runs at once. Sizes are in rows and tokens."""

    schedule: Schedule
    rows: int
    tokens: int
    chunk_size: int
    segment: int
    band: int
    chunk_counts: tuple[int, ...] = ()  # what a tail's chunks are rounded up to; empty: any number
    workers: int = 1  # threads that do tasks, or actors
    threads: int = 1  # intra-op threads of each worker
    streams: int = 0  # device streams of our own
    window: int = 1  # most tasks in flight
    task_bytes: int = 0  # estimate of what one task in flight holds
    notes: tuple[str, ...] = ()  # where the plan is less than what was asked for

    @functools.cached_property
    def bands(self) -> list[slice]:
        """Return the rows of each band."""
        return [slice(start, min(start + self.band, self.rows)) for start in range(0, self.rows, self.band)]

    @functools.cached_property
    def segments(self) -> list[Segment]:
        """Return the segments in order."""
        return [self._segment(start) for start in range(0, self.tokens, self.segment)]

    @property
    def abreast(self) -> int:
        """Return how many segments of one band run at once: 1, or more where there are fewer bands than workers."""
        return _ceil(self.workers, max(1, _ceil(self.rows, self.band)))

    @property
    def threaded(self) -> bool:
        """Return whether threads of ours do tasks at once."""
        return self.workers > 1 and self.schedule is not Schedule.RAY

    @property
    def submitters(self) -> int:
        """Return how many threads of ours submit tasks: the workers, or one for each task that an actor may hold."""
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
        return "\n".join([*(f"{name:<8}  {value}" for name, value in table), "", *self._diagram()])

    def _diagram(self) -> list[str]:
        """Draw a line a band, a number a segment: -> hands on the state, ~> a state found ahead by a summary."""
        segments = range(len(self.segments))
        row = ""
        for number in _some(segments, 8):
            arrow = "" if number == 0 else "~>" if isinstance(number, int) and number % self.abreast else "->"
            row += f" {arrow} {number}" if arrow else f" {number}"
        lines = []
        for index in _some(range(len(self.bands)), 8):
            name = f"band {index}" if isinstance(index, int) else index
            lines.append(f"{name:<8} {row}" if isinstance(index, int) else name)
        return lines


class Shape(NamedTuple):
    """What a plan depends on."""

    rows: int
    tokens: int
    DHQK: int
    DHHV: int


class Machine(NamedTuple):
    """What a plan may count on."""

    threads: int = 1  # of the host, for all workers together
    streams: bool = False  # whether the device takes streams of our own
    memory: int | None = None  # bytes that the process may use on the device; None where it is not known
    actors: int = 0  # that Ray has room for


class _Habit(NamedTuple):
    """What suits a kind of device: sizes found by measurement, or for MPS by its limits."""

    chunk_size: int
    state_bytes: int  # most bytes of chunk summaries in one task
    task_tokens: int  # most row-tokens in one task
    segment_tokens: int  # most of them of one row
    chunk_counts: tuple[int, ...] = ()


# By device, from a DHQK on.
_HABITS = {
    # A task's chunk summaries stay in the cache: a third of the time of all heads and 2,048 tokens at once. Four heads
    # of 512 tokens take 0.67 to 0.9 of one head of 1,024; of narrow heads, tasks up to four times as large take another
    # 0.8 to 0.9.
    "cpu": {
        0: _Habit(64, state_bytes=4 << 20, task_tokens=8192, segment_tokens=1024),
        128: _Habit(64, state_bytes=4 << 20, task_tokens=2048, segment_tokens=512),
        256: _Habit(128, state_bytes=4 << 20, task_tokens=2048, segment_tokens=512),
    },
    "cuda": {
        0: _Habit(128, state_bytes=2 << 30, task_tokens=1 << 20, segment_tokens=1 << 20),
        256: _Habit(256, state_bytes=2 << 30, task_tokens=1 << 20, segment_tokens=1 << 20),
    },
    # Each new size of a matrix product takes memory that MPS does not give back, so tails come in few sizes.
    "mps": {
        0: _Habit(64, state_bytes=512 << 20, task_tokens=1 << 16, segment_tokens=1 << 16,
                  chunk_counts=(1, 2, 3, 4, 6, 8, 12, 16, 24, 32)),
    },
}
# A worker of one thread, with its cache: chunks of 128 take 0.68 of 64 at 8 heads of 256 x 512.
_WORKER = {
    0: _Habit(64, state_bytes=4 << 20, task_tokens=1024, segment_tokens=1024),
    256: _Habit(128, state_bytes=4 << 20, task_tokens=1024, segment_tokens=1024),
}
_ANY = 1 << 62
CUDA_WORKERS = 2  # one fills the gaps that the other's small kernels leave


def max_chunks(device: str) -> int:
    """Return the most chunks of a segment on a type of device: the product over them is quadratic in their number.

    On CUDA what more segments cost is a copy of their streams: at 65,536 tokens two of 5.5 ms (H100).
    """
    return 512 if device == "cuda" else 64


@functools.lru_cache(maxsize=1024)
def make(shape: Shape, device: str, config: Config, machine: Machine = Machine()) -> Plan:  # noqa: B008
    """Return the plan for a call on a device of type `device`; sizes in `config` come before the habitual ones."""
    schedule = config.schedule
    at_once = schedule in (Schedule.QUEUED, Schedule.RAY)
    habits = _WORKER if at_once and device == "cpu" else _HABITS.get(device, _HABITS["cpu"])
    habit = habits[max(least for least in habits if least <= shape.DHQK)]
    if schedule is Schedule.RAY:  # an actor cuts its task up again
        habit = habit._replace(state_bytes=_ANY, task_tokens=_ANY, segment_tokens=4096)
    if schedule is Schedule.AUTO:
        schedule = Schedule.RECURRENT if shape.tokens <= STEP_TOKENS else Schedule.INDUCTOR
    # No longer than the tokens there are, up to a power of two, so that few sizes are compiled.
    longest = max(habit.chunk_size, 1 << max(shape.tokens - 1, 0).bit_length())
    L = min(config.chunk_size or habit.chunk_size, longest)
    summary = shape.DHQK * shape.DHHV * 4
    chunks = min(habit.state_bytes // summary, habit.segment_tokens // L, max_chunks(device))
    segment = config.segment or max(4, chunks) * L
    segment = _ceil(segment, L) * L
    NC = _ceil(min(segment, max(shape.tokens, 1)), L)
    fitting = max(1, min(habit.state_bytes // (summary * NC), habit.task_tokens // (NC * L)))
    if at_once:  # a band for each worker comes before full bands
        fitting = min(fitting, _ceil(shape.rows, _wanted_workers(schedule, device, config, machine)))
    band = min(config.heads_per_band or max(1, fitting), max(shape.rows, 1))
    # The summaries, the states before each chunk, and their source; gates and scores; what is read and written.
    task_bytes = 4 * band * NC * (3 * shape.DHQK * shape.DHHV + L * (3 * L + 3 * shape.DHQK + 3 * shape.DHHV))
    if schedule is Schedule.RAY:  # what travels
        task_bytes = 4 * band * NC * L * 2 * (shape.DHQK + shape.DHHV)
    plan = Plan(schedule, shape.rows, shape.tokens, L, segment, band, habit.chunk_counts, threads=machine.threads,
                task_bytes=task_bytes)
    if not at_once:
        return plan
    return (_on_actors if schedule is Schedule.RAY else _at_once)(plan, device, config, machine)


def _wanted_workers(schedule: Schedule, device: str, config: Config, machine: Machine) -> int:
    if device == "mps":
        return 1
    if schedule is Schedule.RAY:
        return config.workers or max(1, machine.actors)
    return config.workers or (machine.threads if device == "cpu" else CUDA_WORKERS)


def _at_once(plan: Plan, device: str, config: Config, machine: Machine) -> Plan:
    """Settle workers, streams and window: never more than there is, and a note for whatever is cut down."""
    notes, cut = _cuts()
    bands, segments = len(plan.bands), len(plan.segments)
    workers = _wanted_workers(plan.schedule, device, config, machine)
    if device == "mps":
        cut(config.workers or 1, 1, "MPS takes one submitting thread", "worker")
    workers = cut(workers, max(machine.threads, 1), _count(machine.threads, "thread"), "worker")
    if device != "cpu":  # elsewhere one task fills the device: summaries would only add work
        workers = cut(workers, max(bands, 1), _count(bands, "band"), "worker")
    elif workers > bands:
        limit = max(bands * segments, 1)
        workers = cut(workers, limit, f"{_count(bands, 'band')} of {_count(segments, 'segment')}", "worker")
    in_order = device == "cpu" or not machine.streams
    window = config.window or (workers if device == "cpu" else 2 * workers)
    if config.mem_fraction and machine.memory and plan.task_bytes:
        fitting = int(config.mem_fraction * machine.memory) // plan.task_bytes
        window = cut(window, max(1, fitting), f"{config.mem_fraction:g} of the memory", "task")
    workers = cut(workers, window, f"a window of {window}", "worker")
    if in_order and config.streams:
        notes.append(f"{device} has no streams of our own: 0 of {_count(config.streams, 'stream')} used")
    streams = 0 if in_order else cut(config.streams or workers, workers, _count(workers, "worker"), "stream")
    threads = max(1, machine.threads // workers) if device == "cpu" else machine.threads
    return dataclasses.replace(
        plan, workers=workers, threads=threads, streams=streams, window=window, notes=tuple(notes)
    )


def _on_actors(plan: Plan, device: str, config: Config, machine: Machine) -> Plan:
    """Settle actors of one thread each, and the window: two tasks an actor, so that one is on its way."""
    notes, cut = _cuts()
    bands, segments = len(plan.bands), len(plan.segments)
    workers = _wanted_workers(plan.schedule, device, config, machine)
    if device == "mps":
        cut(config.workers or 1, 1, "MPS has one GPU, which one actor owns", "worker")
    workers = cut(workers, max(machine.actors, 1), f"the cluster has room for {machine.actors}", "worker")
    workers = cut(workers, max(bands * segments, 1), f"{_count(bands, 'band')} of {_count(segments, 'segment')}",
                  "worker")
    window = config.window or 2 * workers
    workers = cut(workers, window, f"a window of {window}", "worker")
    if config.streams:
        notes.append(f"actors have no streams of ours: 0 of {_count(config.streams, 'stream')} used")
    return dataclasses.replace(plan, workers=workers, threads=1, window=window, notes=tuple(notes))


def _cuts() -> tuple[list[str], Callable[[int, int, str, str], int]]:
    """Return a list of notes, and a function that cuts a value to a limit and notes why."""
    notes: list[str] = []

    def cut(value: int, limit: int, why: str, what: str) -> int:
        if value > limit:
            notes.append(f"{why}: {limit} of {_count(value, what)} used")
        return max(1, min(value, limit))

    return notes, cut


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _some(numbers: range, most: int) -> list[int | str]:
    """Return the numbers, with an ellipsis for what is too many."""
    return list(numbers) if len(numbers) <= most else [*numbers[: most - 2], "...", numbers[-1]]
