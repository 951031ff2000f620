"""The order in which a band's tasks may start. The `TaskRunner` calls all methods under its lock, but tasks without."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from torch_xlstm_ops.kernels.mlstm import State

Summary = Sequence[Tensor]
OnDone = Callable[[], None]


class Task(NamedTuple):
    """One unit of work on a segment."""

    segment: int
    work: Callable[[], OnDone]  # returns a callback, to be called under the lock


class BandQueue(Protocol):
    """The tasks of one band."""

    def take(self) -> Task | None:
        """Return a task that may start now, or None."""

    def has_unstarted(self) -> bool:
        """Return whether a task has not started yet."""


class SequentialQueue:
    """Tasks strictly one after another; each comes with the number of its segment."""

    def __init__(self, tasks: Iterable[tuple[int, Callable[[], None]]]) -> None:
        self._tasks, self._running = deque(tasks), False

    def take(self) -> Task | None:
        """Return the next task, unless the previous one is running."""
        if self._running or not self._tasks:
            return None
        self._running = True
        segment, call = self._tasks.popleft()

        def work() -> OnDone:
            call()
            return self._task_done

        return Task(segment, work)

    def has_unstarted(self) -> bool:
        """Return whether a task has not started yet."""
        return bool(self._tasks)

    def _task_done(self) -> None:
        self._running = False


class SegmentFunctions(NamedTuple):
    """The functions of one segment that a `ScanQueue` calls; an int is the segment's number."""

    forward: Callable[[int, State | None], State]  # write h, return the state after the segment; None for zeros
    summarize: Callable[[int], Summary | None]  # None: not finite, so `forward` must be used
    absorb: Callable[[Summary, State], State]  # return the state after the segment
    forward_from_summary: Callable[[int, Summary, State], None]  # write h


class ScanQueue:
    """Several segments of a band concurrently: a scan over segment summaries.

    Summaries are computed in parallel, states from them in order, and a segment's h once the state before it is known.
    Of `width` consecutive segments the last one has no summary: its state comes from computing its h. So nothing is
    computed twice, and as the choice depends only on the plan, repeated calls give the same bits.
    """

    def __init__(
        self, segments: int, width: int, first: State, functions: SegmentFunctions, last: Callable[[State], None]
    ) -> None:
        """first: the initial state of the band; last: called with the final state, in the last segment's task."""
        self._count, self._width, self._functions, self._last = segments, width, functions, last
        self._before = {0: first}  # the states before segments whose h is not computed yet
        self._summaries: dict[int, Summary | None] = {}
        self._started = 0  # the next segment whose h is to be computed
        self._known = 0  # the last segment with a known state before it
        self._finding_state = False  # whether a task is computing the next state
        self._to_summarize = deque(s for s in range(segments) if self._summarised(s))

    def take(self) -> Task | None:
        """Return a task for the next state if its summary is ready, else for an h, else for a summary."""
        if not self._finding_state and self._known < self._count and self._summaries.get(self._known) is not None:
            self._finding_state = True
            return self._absorb(self._known)
        if self.has_unstarted() and self._started <= self._known and self._ready(self._started):
            self._started += 1
            return self._forward(self._started - 1)
        if self._to_summarize and self._to_summarize[0] < self._started + 2 * self._width:
            return self._summarize(self._to_summarize.popleft())
        return None

    def has_unstarted(self) -> bool:
        """Return whether the h of a segment has not been started."""
        return self._started < self._count

    def _summarised(self, segment: int) -> bool:
        return (segment + 1) % self._width != 0 and segment + 1 < self._count

    def _ready(self, segment: int) -> bool:
        return not self._summarised(segment) or segment in self._summaries

    def _absorb(self, segment: int) -> Task:
        summary, state = self._summaries[segment], self._before[segment]
        assert summary is not None

        def work() -> OnDone:
            new = self._functions.absorb(summary, state)
            return lambda: self._state_found(segment, new)

        return Task(segment, work)

    def _forward(self, segment: int) -> Task:
        summary, state = self._summaries.get(segment), self._before[segment]

        def work() -> OnDone:
            if summary is not None:
                self._functions.forward_from_summary(segment, summary, state)
                return lambda: self._release(segment)
            new = self._functions.forward(segment, state)
            if segment + 1 == self._count:
                self._last(new)
            return lambda: self._state_found_and_release(segment, new)

        return Task(segment, work)

    def _summarize(self, segment: int) -> Task:
        def work() -> OnDone:
            summary = self._functions.summarize(segment)
            return lambda: self._summaries.__setitem__(segment, summary)

        return Task(segment, work)

    def _state_found(self, segment: int, state: State) -> None:
        self._known, self._finding_state = segment + 1, False
        self._before[segment + 1] = state

    def _state_found_and_release(self, segment: int, state: State) -> None:
        self._state_found(segment, state)
        self._release(segment)

    def _release(self, segment: int) -> None:
        """Drop the state and the summary of a segment whose h is computed."""
        del self._before[segment]
        self._summaries.pop(segment, None)
