"""In which order a band's tasks may start. Every method but a task's `run` is called under the job's lock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

State = list[Tensor]
Summary = Sequence[Tensor]
Settle = Callable[[], None]


class Task(NamedTuple):
    """A piece of work on one segment."""

    segment: int
    run: Callable[[], Settle]  # returns what to do under the lock once it has run


class Lane(Protocol):
    """The tasks of one band."""

    def take(self) -> Task | None:
        """Return a task that may start now, or None."""

    def left(self) -> bool:
        """Return whether a task has not started yet."""


class Strict:
    """One task after another, each with the number of its segment."""

    def __init__(self, tasks: Iterable[tuple[int, Callable[[], None]]]) -> None:
        self._tasks, self._running = deque(tasks), False

    def take(self) -> Task | None:
        """Return the next task, unless the one before it runs."""
        if self._running or not self._tasks:
            return None
        self._running = True
        segment, work = self._tasks.popleft()

        def run() -> Settle:
            work()
            return self._settle

        return Task(segment, run)

    def left(self) -> bool:
        """Return whether a task has not started yet."""
        return bool(self._tasks)

    def _settle(self) -> None:
        self._running = False


class Steps(NamedTuple):
    """What a lane of several segments at once does with a segment."""

    emit: Callable[[int, State], State]  # write the segment's h; return the state after it
    summarize: Callable[[int], Summary | None]  # None: not finite, and no summary will do
    absorb: Callable[[Summary, State], State]  # return the state after a segment from its summary


class Abreast:
    """Several segments at once: summaries run ahead, states are handed on in order, segments emitted as they can.

    Of `width` consecutive segments the last one hands on the state that its own emission found; the others are
    summarised. Which they are depends on the plan alone, so that a call repeated gives the same bits.
    """

    def __init__(self, segments: int, width: int, first: State, steps: Steps, last: Callable[[State], None]) -> None:
        self._count, self._width, self._steps, self._last = segments, width, steps, last
        self._before = {0: first}  # the states before segments, while someone may need them
        self._after: dict[int, State] = {}  # what emissions found
        self._summaries: dict[int, Summary | None] = {}
        self._emitted = 0  # the next to emit
        self._known = 0  # the last with a state before it
        self._ahead = deque(s for s in range(segments - 1) if self._summarised(s))  # the next to summarise

    def take(self) -> Task | None:
        """Return an absorption if one is due, else an emission, else a summary not too far ahead."""
        if self._summaries.get(self._known) is not None:
            return self._absorb(self._known)
        if self._emitted <= self._known and self.left():
            self._emitted += 1
            return self._emit(self._emitted - 1)
        if self._ahead and self._ahead[0] < self._emitted + 2 * self._width:
            return self._summarize(self._ahead.popleft())
        return None

    def left(self) -> bool:
        """Return whether a segment has not been emitted; summaries and absorptions come before the last emission."""
        return self._emitted < self._count

    def _summarised(self, segment: int) -> bool:
        return (segment + 1) % self._width != 0

    def _absorb(self, segment: int) -> Task:
        summary, state = self._summaries.pop(segment), self._before[segment]
        assert summary is not None

        def run() -> Settle:
            new = self._steps.absorb(summary, state)
            return lambda: self._hand_on(segment, new)

        return Task(segment, run)

    def _emit(self, segment: int) -> Task:
        state = self._before[segment]

        def run() -> Settle:
            new = self._steps.emit(segment, state)
            if segment + 1 == self._count:
                self._last(new)
            return lambda: self._settle_emission(segment, new)

        return Task(segment, run)

    def _settle_emission(self, segment: int, new: State) -> None:
        if segment + 1 == self._count:
            return
        if not self._summarised(segment) or self._summaries.get(segment, ()) is None:
            self._hand_on(segment, new)
        elif self._known <= segment:
            self._after[segment] = new  # should its summary turn out not to do

    def _summarize(self, segment: int) -> Task:
        def run() -> Settle:
            summary = self._steps.summarize(segment)
            return lambda: self._settle_summary(segment, summary)

        return Task(segment, run)

    def _settle_summary(self, segment: int, summary: Summary | None) -> None:
        self._summaries[segment] = summary
        if summary is None and segment in self._after:
            self._hand_on(segment, self._after[segment])

    def _hand_on(self, segment: int, state: State) -> None:
        """Make `state` the one before the next segment, and drop what nobody will ask for."""
        self._known = segment + 1
        self._before[segment + 1] = state
        self._after.pop(segment, None)
        for passed in [s for s in self._before if s < min(self._emitted, self._known)]:
            del self._before[passed]
