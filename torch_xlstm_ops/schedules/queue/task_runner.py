"""Run one call's tasks on worker threads, at most `window` in flight; after an error none stays running."""

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
from torch_xlstm_ops.schedules.queue.band_queues import BandQueue, OnDone, Task


class TaskPosition(NamedTuple):
    """A task's band and segment."""

    band: int
    segment: int

    def __str__(self) -> str:
        return f"band {self.band}, segment {self.segment}"


_current: ContextVar[TaskPosition] = ContextVar("xlstm_ops_task")


def current_task() -> TaskPosition:
    """Return the position of the task that this thread runs."""
    return _current.get()


class TaskError(RuntimeError):
    """A task failed; `__cause__` is the exception that it raised."""

    def __init__(self, position: TaskPosition, schedule: str, cause: BaseException) -> None:
        super().__init__(f"task ({position}) of the {schedule} schedule failed: {type(cause).__name__}: {cause}")
        self.band, self.segment = position


class _Numbered(NamedTuple):
    band: int
    queue: BandQueue


class TaskRunner:
    """The band queues of a call, and the threads that run their tasks.

    On CUDA all tasks of a band run on one stream, which waits for the caller's stream at the start; the caller's stream
    waits for it at the end. So no tensor needs `record_stream`.
    """

    def __init__(
        self, plan: Plan, queues: Sequence[BandQueue], device: torch.device, op: str, phase: str,
        cancel_remote: Callable[[], None] = lambda: None,
    ) -> None:
        """cancel_remote: ends tasks in other processes; called after an interrupt."""
        self._plan, self._device, self._op, self._phase, self._cancel_remote = plan, device, op, phase, cancel_remote
        self._ready = deque(_Numbered(band, queue) for band, queue in enumerate(queues))
        self._idle: dict[int, _Numbered] = {}  # queues that wait for one of their running tasks
        self._running = 0
        self._events: deque[devices.Event] = deque()  # of tasks that the device may not have finished
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._layer, self._inference = trace.current_layer(), torch.is_inference_mode_enabled()
        self._streams = _streams(device, plan.streams)

    def run(self) -> None:
        """Run all tasks; return when they have finished, or on an asynchronous device when they are submitted.

        Raises TaskError for the first task that failed, after all running tasks have ended.
        """
        for stream in self._streams:
            stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            if self._plan.submitters == 1:
                self._work()
            else:
                worker_threads.get(self._plan.threads).submit(self._work_on_thread, self._plan.submitters)
                self._wait()
        finally:
            for stream in self._streams:
                torch.cuda.current_stream(self._device).wait_stream(stream)
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # its traceback refers to this frame

    def _wait(self) -> None:
        with self._changed:
            try:
                self._changed.wait_for(lambda: self._running == 0 and self._done())
            except BaseException as error:  # KeyboardInterrupt
                self._stop(error)
                self._cancel_remote()
                raise
            finally:
                self._changed.wait_for(lambda: self._running == 0)

    def _work_on_thread(self) -> None:
        """Run tasks with the caller's modes, which are per thread."""
        trace.set_layer(self._layer)
        with torch.inference_mode(self._inference), torch.no_grad():
            self._work()

    def _work(self) -> None:
        while (started := self._start()) is not None:
            numbered, task, depth = started
            try:
                _current.set(TaskPosition(numbered.band, task.segment))
                with self._on_stream(numbered), self._span(numbered, task, depth):
                    on_done = task.work()
                    event = self._mark()
            except BaseException as error:
                self._fail(numbered, task, error)
                return
            self._finish(numbered, on_done, event)
            del started, numbered, task, on_done  # they refer to a segment's tensors

    def _start(self) -> tuple[_Numbered, Task, int] | None:
        """Return a task to run now and the number in flight including it; None when no task is left."""
        with self._changed:
            while not self._done():
                if self._running + len(self._events) >= self._plan.window:
                    self._wait_for_room()
                    continue
                found = self._take()
                if found is not None:
                    self._running += 1
                    return *found, self._running + len(self._events)
                if not self._done():  # the last queue may have been empty
                    self._changed.wait()
            self._changed.notify_all()  # wake the caller, which waits for the end
            return None

    def _take(self) -> tuple[_Numbered, Task] | None:
        while self._ready:
            numbered = self._ready.popleft()
            task = numbered.queue.take()
            if task is not None:
                self._put_back(numbered)
                return numbered, task
            if numbered.queue.has_unstarted():
                self._idle[numbered.band] = numbered
        return None

    def _put_back(self, numbered: _Numbered) -> None:
        """Make a queue ready: first on the CPU, where its state is in the cache; else last, to take turns."""
        if self._device.type == "cpu":
            self._ready.appendleft(numbered)
        else:
            self._ready.append(numbered)

    def _wait_for_room(self) -> None:
        if not self._events:
            self._changed.wait()
            return
        oldest = self._events.popleft()
        self._running += 1  # it is still in flight
        self._changed.release()
        try:
            oldest.synchronize()
        finally:
            self._changed.acquire()
            self._running -= 1
            self._changed.notify_all()

    def _finish(self, numbered: _Numbered, on_done: OnDone, event: devices.Event | None) -> None:
        with self._changed:
            self._running -= 1
            on_done()
            if event is not None:
                self._events.append(event)
            if self._idle.pop(numbered.band, None) is not None:
                self._put_back(numbered)
            self._changed.notify_all()

    def _fail(self, numbered: _Numbered, task: Task, cause: BaseException) -> None:
        error: BaseException = cause
        if isinstance(cause, Exception):
            error = TaskError(TaskPosition(numbered.band, task.segment), str(self._plan.schedule), cause)
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

    def _on_stream(self, numbered: _Numbered) -> AbstractContextManager[object]:
        if not self._streams:
            return nullcontext()
        return torch.cuda.stream(self._streams[numbered.band % len(self._streams)])

    def _span(self, numbered: _Numbered, task: Task, depth: int) -> AbstractContextManager[object]:
        if not trace.active():
            return nullcontext()
        return trace.span(
            self._op, schedule=str(self._plan.schedule), phase=self._phase, band=numbered.band, segment=task.segment,
            device=self._device, queue_depth=depth,
        )


@functools.lru_cache(maxsize=64)
def _streams(device: torch.device, count: int) -> tuple[torch.cuda.Stream, ...]:
    return tuple(torch.cuda.Stream(device) for _ in range(count))  # type: ignore[no-untyped-call]
