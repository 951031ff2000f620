"""Timings of the work as it runs: per op, layer, band, segment and phase, on the clock of the device that does it.

Off unless someone records, at the cost of one branch. The code that runs the work writes

    if trace.active():
        with trace.span("mlstm_chunkwise", schedule="inductor", band=b, segment=s, device=h.device):
            work()
    else:
        work()

and `span` by itself is right too, only dearer. A span on CUDA or MPS is two events around the work submitted inside it
and is read when the device has passed them; nothing waits. On the CPU it is the host's clock.

`record` collects inside a ``with`` block; ``XLSTM_OPS_TRACE`` (or any other source of the `trace` setting) collects
for the whole process and writes the file, if anything ran, when it exits. A recording holds its newest `capacity`
entries.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import NamedTuple

import torch

from torch_xlstm_ops import config
from torch_xlstm_ops.runtime import devices
from torch_xlstm_ops.trace import export
from torch_xlstm_ops.trace.export import Entry

CAPACITY = 200_000  # entries, about 60 MB
_PENDING = 1024  # device spans not yet read, before one is waited for
_REBASE = 1e3  # milliseconds; CUDA reports float32, good to 0.1 us over this long
_CPU = torch.device("cpu")
_OFF: AbstractContextManager[object] = nullcontext()


class _Mark(NamedTuple):
    """What is known of a span before its times are."""

    op: str
    schedule: str | None
    phase: str
    layer: int | None
    band: int | None
    segment: int | None
    device: torch.device
    thread: str
    bytes: int | None
    queue_depth: int | None

    def at(self, start_us: float, duration_us: float) -> Entry:
        op, schedule, phase, layer, band, segment, device, thread, size, depth = self
        return Entry(op, schedule, phase, layer, band, segment, str(device), thread, start_us, duration_us, size, depth)


_Pending = tuple[_Mark, devices.Event, devices.Event]


class Recording:
    """The entries of one recording; every method may be called from any thread."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.began = time.perf_counter()
        self._entries: deque[Entry] = deque(maxlen=capacity)
        self._pending: deque[_Pending] = deque()
        self._bases: dict[torch.device, tuple[devices.Event, float]] = {}
        self._count = 0
        self._lock = threading.Lock()  # never held while a device is asked, which may take the MPS lock

    @property
    def dropped(self) -> int:
        """Return how many of the oldest entries were given up to stay within the capacity."""
        return self._count - len(self._entries)

    def entries(self) -> list[Entry]:
        """Return the entries by start, after waiting for the device to pass the last of them."""
        self._settle(most=0)
        with self._lock:
            return sorted(self._entries, key=lambda entry: entry.start_us)

    def summary(self) -> str:
        """Return a table of count and time by op, phase and device."""
        return export.summary(self.entries(), self.dropped)

    def write(self, path: str) -> None:
        """Write the entries to `path`, as its suffix says: .csv, .jsonl (an object a line), .json (Chrome trace).

        The file appears whole or not at all. Raises ValueError for another suffix, OSError if it cannot be written.
        """
        write = export.writer(path)
        entries = self.entries()
        with export.whole_file(path) as file:
            write(file, entries, self.dropped)

    def _add(self, entry: Entry) -> None:
        with self._lock:
            self._entries.append(entry)
            self._count += 1

    def _add_pending(self, pending: _Pending) -> None:
        self._pending.append(pending)
        if len(self._pending) > _PENDING // 2:
            self._settle(most=_PENDING)

    def _base(self, device: torch.device) -> None:
        """Tie the device's clock to the host's, before its first span."""
        if device not in self._bases:
            base = devices.event(device, timing=True)
            devices.synchronize(device)
            base.record()
            self._bases[device] = (base, (time.perf_counter() - self.began) * 1e6)

    def _settle(self, most: int) -> None:
        """Read the spans that the device has passed; wait for it only while more than `most` are unread."""
        while self._pending:
            try:
                mark, start, end = self._pending.popleft()
            except IndexError:  # another thread took the last one
                return
            if len(self._pending) < most and not end.query():
                self._pending.appendleft((mark, start, end))
                return
            end.synchronize()
            base, base_us = self._bases[mark.device]
            since = base.elapsed_time(start)
            if since > _REBASE:
                self._bases[mark.device] = (start, base_us + since * 1e3)
            self._add(mark.at(base_us + since * 1e3, start.elapsed_time(end) * 1e3))


class _HostSpan:
    __slots__ = ("_mark", "_recordings", "_start")

    def __init__(self, recordings: tuple[Recording, ...], mark: _Mark) -> None:
        self._recordings, self._mark = recordings, mark

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        duration = time.perf_counter() - self._start
        if kind is None:
            for recording in self._recordings:
                recording._add(self._mark.at((self._start - recording.began) * 1e6, duration * 1e6))


class _DeviceSpan:
    __slots__ = ("_end", "_mark", "_recordings", "_start")

    def __init__(self, recordings: tuple[Recording, ...], mark: _Mark) -> None:
        for recording in recordings:
            recording._base(mark.device)
        self._recordings, self._mark = recordings, mark
        self._start = devices.event(mark.device, timing=True)
        self._end = devices.event(mark.device, timing=True)

    def __enter__(self) -> None:
        self._start.record()

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if kind is None:
            self._end.record()
            for recording in self._recordings:
                recording._add_pending((self._mark, self._start, self._end))


_recordings: tuple[Recording, ...] = ()  # replaced, never changed, so that a span can hold it
_switch = threading.RLock()
_layer: ContextVar[int | None] = ContextVar("xlstm_ops_layer", default=None)


def active() -> bool:
    """Return whether anyone records: the one branch that tracing costs when off."""
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
) -> AbstractContextManager[object]:
    """Return a context manager that times the work submitted inside it; work that raises leaves no entry.

    op: what runs. schedule: which schedule runs it, if one does.
    phase: forward, backward, prefill, decode, or any other word.
    band, segment: which task of a plan, counted from 0. layer: default that of `set_layer`, in this thread's context.
    device: where the work runs, default the CPU. nbytes: read and written. queue_depth: tasks in flight.
    """
    recordings = _recordings
    if not recordings:
        return _OFF
    if layer is None:
        layer = _layer.get()
    thread = threading.current_thread().name
    mark = _Mark(op, schedule, phase, layer, band, segment, device, thread, nbytes, queue_depth)
    if not devices.has_events(device):
        return _HostSpan(recordings, mark)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _OFF  # a captured event has no time
    if device.index is None:  # "cuda" and "cuda:0" are one clock
        index = torch.cuda.current_device() if device.type == "cuda" else 0
        mark = mark._replace(device=torch.device(device.type, index))
    return _DeviceSpan(recordings, mark)


def set_layer(layer: int | None) -> None:
    """Say which layer of a model runs next in this context; a schedule hands `current_layer` to its workers."""
    _layer.set(layer)


def current_layer() -> int | None:
    """Return the layer that `set_layer` named in this context."""
    return _layer.get()


@contextmanager
def record(path: str | None = None, *, capacity: int = CAPACITY) -> Iterator[Recording]:
    """Record every span of the process inside a ``with`` block, and write it to `path` at the end if one is given.

    path: .csv, .jsonl, or .json (Chrome trace); default None writes nothing.
    capacity: most entries held, the newest.

    Raises ValueError, before anything runs, for a file that could not be written.
    """
    if path is not None:
        export.writer(path)
        export.check_file("trace", path)
    recording = Recording(capacity)
    _start(recording)
    try:
        yield recording
    finally:
        _stop(recording)
    if path is not None:
        recording.write(path)


def _start(recording: Recording) -> None:
    global _recordings
    with _switch:
        _recordings = (*_recordings, recording)


def _stop(recording: Recording) -> None:
    global _recordings
    with _switch:
        _recordings = tuple(other for other in _recordings if other is not recording)


@contextmanager
def paused() -> Iterator[None]:
    """Keep what runs inside a ``with`` block, such as a warm-up, out of every recording begun before it."""
    global _recordings
    with _switch:
        held, _recordings = _recordings, ()
    try:
        yield
    finally:
        with _switch:
            _recordings = (*held, *_recordings)


class _Process(NamedTuple):
    """The recording that the `trace` setting asked for."""

    path: str
    recording: Recording
    pid: int


_process: _Process | None = None


def _follow(settled: config.Config) -> None:
    """Start and stop the process's recording as the configuration says."""
    global _process
    if settled.trace == (_process.path if _process is not None else None):
        return
    if settled.trace is not None:
        export.check_file("trace", settled.trace)
    finish()
    if settled.trace is not None:
        _process = _Process(settled.trace, Recording(), os.getpid())
        _start(_process.recording)


def finish() -> Recording | None:
    """End the recording that the `trace` setting began, write its file, and return it; None if there is none.

    A recording without entries writes nothing: a run that failed early leaves an older file alone.
    """
    global _process
    if _process is None:
        return None
    (path, recording, pid), _process = _process, None
    _stop(recording)
    if pid == os.getpid() and recording.entries():  # a forked child leaves the file to its parent
        recording.write(path)
    return recording


config.on_load(_follow)
atexit.register(finish)
