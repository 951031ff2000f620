"""One call's tasks on worker threads: at most `window` in flight, and nothing left behind however it ends."""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import NamedTuple

import torch

from torch_xlstm_ops import trace
from torch_xlstm_ops.runtime import devices
from torch_xlstm_ops.schedules.plan import Plan
from torch_xlstm_ops.schedules.queue import worker_threads
from torch_xlstm_ops.schedules.queue.band_queues import BandQueue, Settle, Task


class Where(NamedTuple):
    """A task's place in the plan."""

    band: int
    segment: int

    def __str__(self) -> str:
        return f"band {self.band}, segment {self.segment}"


_where: ContextVar[Where] = ContextVar("xlstm_ops_task")


def where() -> Where:
    """Return which task this thread runs."""
    return _where.get()


class TaskError(RuntimeError):
    """A task failed; `__cause__` says why."""

    def __init__(self, where: Where, schedule: str, cause: BaseException) -> None:
        super().__init__(f"task ({where}) of the {schedule} schedule must run, got {type(cause).__name__}: {cause}")
        self.band, self.segment = where


class _Place(NamedTuple):
    band: int
    lane: BandQueue


class Job:
    """The lanes of a call, one a band, and who works on them.

    On CUDA a lane keeps to one stream, so that its tensors never meet another; the streams start after the caller's
    stream and the caller's continues after them, so the caller's tensors need no `record_stream` either.
    """

    def __init__(
        self, plan: Plan, lanes: Sequence[BandQueue], device: torch.device, op: str, phase: str,
        abandon: Callable[[], None] = lambda: None,
    ) -> None:
        """abandon: makes tasks that run elsewhere end, after an interrupt."""
        self._plan, self._device, self._op, self._phase, self._abandon = plan, device, op, phase, abandon
        self._ready = deque(_Place(index, lane) for index, lane in enumerate(lanes))
        self._idle: dict[int, _Place] = {}  # lanes that wait for a task of their own
        self._running = 0
        self._events: deque[devices.Event] = deque()  # of tasks submitted and perhaps not finished
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._layer, self._inference = trace.current_layer(), torch.is_inference_mode_enabled()
        self._streams = _streams(device, plan.streams)

    def run(self) -> None:
        """Do all tasks, and return when they are done, or submitted where the device works on.

        Raises TaskError for the first that failed, when no other runs any more.
        """
        for stream in self._streams:
            stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            if self._plan.submitters == 1:
                self._work()
            else:
                worker_threads.get(self._plan.threads).give(self._help, self._plan.submitters)
                self._wait()
        finally:
            for stream in self._streams:
                torch.cuda.current_stream(self._device).wait_stream(stream)
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # its traceback leads here

    def _wait(self) -> None:
        with self._changed:
            try:
                self._changed.wait_for(lambda: self._running == 0 and self._done())
            except BaseException as error:  # KeyboardInterrupt
                self._stop(error)
                self._abandon()
                raise
            finally:
                self._changed.wait_for(lambda: self._running == 0)

    def _help(self) -> None:
        """Work on a thread that has its own modes."""
        trace.set_layer(self._layer)
        with torch.inference_mode(self._inference), torch.no_grad():
            self._work()

    def _work(self) -> None:
        while (started := self._start()) is not None:
            place, task, depth = started
            try:
                _where.set(Where(place.band, task.segment))
                with self._on_stream(place), self._span(place, task, depth):
                    settle = task.run()
                    event = self._mark()
            except BaseException as error:
                self._fail(place, task, error)
                return
            self._finish(place, settle, event)
            del started, place, task, settle  # they hold a segment's tensors

    def _start(self) -> tuple[_Place, Task, int] | None:
        """Return a task to run now and how many are in flight with it; None when there is nothing left to start."""
        with self._changed:
            while not self._done():
                if self._running + len(self._events) >= self._plan.window:
                    self._wait_for_room()
                    continue
                found = self._take()
                if found is not None:
                    self._running += 1
                    return *found, self._running + len(self._events)
                if not self._done():  # taking may have found the last lane empty
                    self._changed.wait()
            self._changed.notify_all()  # the caller waits for the end
            return None

    def _take(self) -> tuple[_Place, Task] | None:
        while self._ready:
            place = self._ready.popleft()
            task = place.lane.take()
            if task is not None:
                self._put_back(place)
                return place, task
            if place.lane.left():
                self._idle[place.band] = place
        return None

    def _put_back(self, place: _Place) -> None:
        """Queue a lane again: on the CPU as the next, whose state is in the cache; elsewhere lanes take turns."""
        if self._device.type == "cpu":
            self._ready.appendleft(place)
        else:
            self._ready.append(place)

    def _wait_for_room(self) -> None:
        if not self._events:
            self._changed.wait()
            return
        oldest = self._events.popleft()
        self._running += 1  # it still counts
        self._changed.release()
        try:
            oldest.synchronize()
        finally:
            self._changed.acquire()
            self._running -= 1
            self._changed.notify_all()

    def _finish(self, place: _Place, settle: Settle, event: devices.Event | None) -> None:
        with self._changed:
            self._running -= 1
            settle()
            if event is not None:
                self._events.append(event)
            if self._idle.pop(place.band, None) is not None:
                self._put_back(place)
            self._changed.notify_all()

    def _fail(self, place: _Place, task: Task, cause: BaseException) -> None:
        error: BaseException = cause
        if isinstance(cause, Exception):
            error = TaskError(Where(place.band, task.segment), str(self._plan.schedule), cause)
        if error is not cause:
            error.__cause__ = cause
        with self._changed:
            self._running -= 1
            self._stop(error)

    def _stop(self, error: BaseException) -> None:
        self._error = self._error or error
        self._ready.clear()
        self._idle.clear()
        self._changed.notify_all()

    def _done(self) -> bool:
        return not self._ready and not self._idle

    def _mark(self) -> devices.Event | None:
        if not devices.has_events(self._device):
            return None
        event = devices.event(self._device)
        event.record()
        return event

    def _on_stream(self, place: _Place) -> AbstractContextManager[object]:
        if not self._streams:
            return nullcontext()
        return torch.cuda.stream(self._streams[place.band % len(self._streams)])

    def _span(self, place: _Place, task: Task, depth: int) -> AbstractContextManager[object]:
        if not trace.active():
            return nullcontext()
        return trace.span(
            self._op, schedule=str(self._plan.schedule), phase=self._phase, band=place.band, segment=task.segment,
            device=self._device, queue_depth=depth,
        )


@functools.lru_cache(maxsize=64)
def _streams(device: torch.device, count: int) -> tuple[torch.cuda.Stream, ...]:
    return tuple(torch.cuda.Stream(device) for _ in range(count))  # type: ignore[no-untyped-call]
