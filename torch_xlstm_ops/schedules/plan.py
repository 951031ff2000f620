"""What will run: a sequence of S tokens in R rows, cut into bands of rows and segments of tokens. Pure data.

A row is one head of one batch entry. Within a band the segments are strictly ordered, each starting from the state
that the one before it left; bands are independent.
"""

from __future__ import annotations

import dataclasses
import functools
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
    """How one call is cut up. Sizes are in rows and tokens."""

    schedule: Schedule
    rows: int
    tokens: int
    chunk_size: int
    segment: int
    band: int
    chunk_counts: tuple[int, ...] = ()  # what a tail's chunks are rounded up to; empty: any number

    @property
    def bands(self) -> list[slice]:
        """Return the rows of each band."""
        return [slice(start, min(start + self.band, self.rows)) for start in range(0, self.rows, self.band)]

    @property
    def segments(self) -> list[Segment]:
        """Return the segments in order."""
        return [self._segment(start) for start in range(0, self.tokens, self.segment)]

    def _segment(self, start: int) -> Segment:
        stop = min(start + self.segment, self.tokens)
        chunks = -(-(stop - start) // self.chunk_size)
        return Segment(start, stop, next((count for count in self.chunk_counts if count >= chunks), chunks))


class Shape(NamedTuple):
    """What a plan depends on."""

    rows: int
    tokens: int
    DHQK: int
    DHHV: int


class _Habit(NamedTuple):
    """What suits a kind of device: sizes found by measurement, or for MPS by its limits."""

    chunk_size: int
    state_bytes: int  # most bytes of chunk summaries in one task
    task_tokens: int  # most row-tokens in one task
    chunk_counts: tuple[int, ...] = ()


_HABITS = {
    # A task's chunk summaries stay in the cache: a third of the time of all heads and 2,048 tokens at once.
    "cpu": _Habit(chunk_size=64, state_bytes=4 << 20, task_tokens=1024),
    "cuda": _Habit(chunk_size=128, state_bytes=2 << 30, task_tokens=1 << 20),
    # Each new size of a matrix product takes memory that MPS does not give back, so tails come in few sizes.
    "mps": _Habit(chunk_size=64, state_bytes=512 << 20, task_tokens=1 << 16, chunk_counts=(1, 2, 3, 4, 6, 8, 12, 16, 24, 32)),
}
MAX_CHUNKS = 64  # the product over chunks is quadratic in their number


@functools.lru_cache(maxsize=1024)
def make(shape: Shape, device: str, config: Config) -> Plan:
    """Return the plan for a call on a device of type `device`; sizes in `config` come before the habitual ones."""
    habit = _HABITS.get(device, _HABITS["cpu"])
    schedule = config.schedule
    if schedule is Schedule.AUTO:
        schedule = Schedule.RECURRENT if shape.tokens <= STEP_TOKENS else Schedule.INDUCTOR
    L = config.chunk_size or habit.chunk_size
    summary = shape.DHQK * shape.DHHV * 4
    chunks = min(habit.state_bytes // summary, habit.task_tokens // L, MAX_CHUNKS)
    segment = config.segment or max(4, chunks) * L
    segment = -(-segment // L) * L
    NC = -(-min(segment, max(shape.tokens, 1)) // L)
    fitting = min(habit.state_bytes // (summary * NC), habit.task_tokens // (NC * L))
    band = config.heads_per_band or max(1, fitting)
    return Plan(schedule, shape.rows, shape.tokens, L, segment, min(band, max(shape.rows, 1)), habit.chunk_counts)
