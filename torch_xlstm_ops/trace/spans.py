"""Time work by spans: `span` around it, `record` to collect, and the layer of a model that runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch

from torch_xlstm_ops.runtime import devices, files, forks
from torch_xlstm_ops.trace import export
from torch_xlstm_ops.trace.recording import CAPACITY, Mark, Recording

_CPU = torch.device("cpu")
class Open:
    """A span that has begun."""

    __slots__ = ("_mark", "_recordings")

    def __init__(self, recordings: tuple[Recording, ...], mark: Mark) -> None:
        self._recordings, self._mark = recordings, mark

    def note(self, details: str) -> None:
        """Add details about the work, which the trace shows with the span."""
        self._mark = self._mark._replace(details=details)


_OFF: AbstractContextManager[Open] = nullcontext(Open((), Mark("", None, "", None, None, None, _CPU, "", None, None)))


class _HostSpan(Open):
    __slots__ = ("_start",)

    def __enter__(self) -> Open:
        self._start = time.perf_counter()
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        duration = time.perf_counter() - self._start
        if kind is None:
            for recording in self._recordings:
                recording.add(self._mark.at((self._start - recording.began) * 1e6, duration * 1e6))


class _DeviceSpan(Open):
    __slots__ = ("_end", "_start")

    def __init__(self, recordings: tuple[Recording, ...], mark: Mark) -> None:
        super().__init__(recordings, mark)
        for recording in recordings:
            recording.tie_clock(mark.device)
        self._start = devices.event(mark.device, timing=True)
        self._end = devices.event(mark.device, timing=True)

    def __enter__(self) -> Open:
        self._start.record()
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if kind is None:
            self._end.record()
            for recording in self._recordings:
                recording.add_pending((self._mark, self._start, self._end))


_recordings: tuple[Recording, ...] = ()  # replaced as a whole, so that a span can keep it
_switch = forks.new_rlock()
_layer: ContextVar[int | None] = ContextVar("xlstm_ops_layer", default=None)


def active() -> bool:
    """Return whether there is a recording: the one branch that tracing costs when off."""
    return bool(_recordings)


def span(
    op: str,
    *,
    schedule: str | None = None,
    phase: str = "forward",
    band: int | None = None,
    segment: int | None = None,
    layer: int | None = None,
    device: torch.device = _CPU,
    nbytes: int | None = None,
    queue_depth: int | None = None,
) -> AbstractContextManager[Open]:
    """Return a context manager that times the work submitted inside it; work that raises is not recorded.

    It gives an `Open` span, whose `note` adds details.

    op: the operator. schedule: the schedule that runs it, if any.
    phase: forward, backward, prefill, decode, or any other word.
    band, segment: the task of a plan, from 0. layer: default the one of `set_layer` in this context.
    device: where the work runs, default the CPU. nbytes: read and written. queue_depth: tasks in flight.
    """
    recordings = _recordings
    if not recordings:
        return _OFF
    if layer is None:
        layer = _layer.get()
    thread = threading.current_thread().name
    mark = Mark(op, schedule, phase, layer, band, segment, device, thread, nbytes, queue_depth)
    if not devices.has_events(device):
        return _HostSpan(recordings, mark)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _OFF  # an event in a CUDA graph has no time
    if device.index is None:  # "cuda" and "cuda:0" have the same clock
        index = torch.cuda.current_device() if device.type == "cuda" else 0
        mark = mark._replace(device=torch.device(device.type, index))
    return _DeviceSpan(recordings, mark)


def add(
    op: str, seconds: float, *, schedule: str, phase: str, layer: int | None = None, segment: int | None = None,
    nbytes: int | None = None,
) -> None:
    """Record work of another process that took `seconds` and has just ended."""
    mark = Mark(op, schedule, phase, layer, None, segment, _CPU, threading.current_thread().name, nbytes, None)
    now = time.perf_counter()
    for recording in _recordings:
        recording.add(mark.at((now - seconds - recording.began) * 1e6, seconds * 1e6))


def set_layer(layer: int | None) -> None:
    """Set the layer of a model that runs next in this context; a schedule passes `current_layer` to its workers."""
    _layer.set(layer)


def current_layer() -> int | None:
    """Return the layer that `set_layer` set in this context."""
    return _layer.get()


@contextmanager
def record(path: str | None = None, *, capacity: int = CAPACITY) -> Iterator[Recording]:
    """Record every span of the process inside a ``with`` block, and write it to `path` at the end if one is given.

    path: .csv, .jsonl, or .json (Chrome trace); default None writes nothing.
    capacity: number of spans kept, the newest.

    Raises ValueError before the block runs for a file that cannot be written.
    """
    if path is not None:
        export.writer(path)
        files.check_file("trace", path)
    recording = Recording(capacity)
    start(recording)
    try:
        yield recording
    finally:
        stop(recording)
    if path is not None:
        recording.write(path)


def start(recording: Recording) -> None:
    """Add every later span to a recording."""
    global _recordings
    recording.begin()
    with _switch:
        _recordings = (*_recordings, recording)


def stop(recording: Recording) -> None:
    """Add no more spans to a recording."""
    global _recordings
    with _switch:
        _recordings = tuple(other for other in _recordings if other is not recording)
    recording.end()


@contextmanager
def paused() -> Iterator[None]:
    """Record nothing inside a ``with`` block, such as a warm-up, in the recordings begun before it."""
    global _recordings
    with _switch:
        held, _recordings = _recordings, ()
    try:
        yield
    finally:
        with _switch:
            _recordings = (*held, *_recordings)
