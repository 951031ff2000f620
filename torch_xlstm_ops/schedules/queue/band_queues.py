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


class BandQueue(Protocol):
    """The tasks of one band."""

    def take(self) -> Task | None:
        """Return a task that may start now, or None."""

    def left(self) -> bool:
        """Return whether a task has not started yet."""


class SequentialQueue:
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
    answer: Callable[[int, Summary, State], None]  # write the h of a segment that was summarised


class ScanQueue:
    """Several segments at once: summaries run ahead, states are handed on in order, segments emitted as they can.

    Of `width` consecutive segments the last one hands on the state that its own emission finds; the others are
    summarised first and emitted from their summaries, so that nothing is computed twice. Which they are depends on the
    plan alone: a call repeated gives the same bits.
    """

    def __init__(self, segments: int, width: int, first: State, steps: Steps, last: Callable[[State], None]) -> None:
        self._count, self._width, self._steps, self._last = segments, width, steps, last
        self._before = {0: first}  # the states before segments, until they are emitted
        self._summaries: dict[int, Summary | None] = {}
        self._emitted = 0  # the next to emit
        self._known = 0  # the last with a state before it
        self._handing = False  # whether a task is finding the next state
        self._ahead = deque(s for s in range(segments) if self._summarised(s))  # the next to summarise

    def take(self) -> Task | None:
        """Return an absorption if one is due, else an emission, else a summary not too far ahead."""
        if not self._handing and self._known < self._count and self._summaries.get(self._known) is not None:
            self._handing = True
            return self._absorb(self._known)
        if self.left() and self._emitted <= self._known and self._ready(self._emitted):
            self._emitted += 1
            return self._emit(self._emitted - 1)
        if self._ahead and self._ahead[0] < self._emitted + 2 * self._width:
            return self._summarize(self._ahead.popleft())
        return None

    def left(self) -> bool:
        """Return whether a segment has not been emitted; its summary and its state come before."""
        return self._emitted < self._count

    def _summarised(self, segment: int) -> bool:
        return (segment + 1) % self._width != 0 and segment + 1 < self._count

    def _ready(self, segment: int) -> bool:
        return not self._summarised(segment) or segment in self._summaries

    def _absorb(self, segment: int) -> Task:
        summary, state = self._summaries[segment], self._before[segment]
        assert summary is not None

        def run() -> Settle:
            new = self._steps.absorb(summary, state)
            return lambda: self._hand_on(segment, new)

        return Task(segment, run)

    def _emit(self, segment: int) -> Task:
        summary, state = self._summaries.get(segment), self._before[segment]

        def run() -> Settle:
            if summary is not None:
                self._steps.answer(segment, summary, state)
                return lambda: self._drop(segment)
            new = self._steps.emit(segment, state)
            if segment + 1 == self._count:
                self._last(new)
            return lambda: self._hand_on_and_drop(segment, new)

        return Task(segment, run)

    def _summarize(self, segment: int) -> Task:
        def run() -> Settle:
            summary = self._steps.summarize(segment)
            return lambda: self._summaries.__setitem__(segment, summary)

        return Task(segment, run)

    def _hand_on(self, segment: int, state: State) -> None:
        self._known, self._handing = segment + 1, False
        self._before[segment + 1] = state

    def _hand_on_and_drop(self, segment: int, state: State) -> None:
        self._hand_on(segment, state)
        self._drop(segment)

    def _drop(self, segment: int) -> None:
        """Forget what only a segment's emission needed."""
        del self._before[segment]
        self._summaries.pop(segment, None)
