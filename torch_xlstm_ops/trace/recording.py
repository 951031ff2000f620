"""Record spans in memory: the newest ones, with device spans read once the device has passed their events."""

from __future__ import annotations

import time
from collections import deque
from typing import NamedTuple

import torch

from torch_xlstm_ops.runtime import devices, files, forks
from torch_xlstm_ops.trace import export
from torch_xlstm_ops.trace.export import Span
from torch_xlstm_ops.trace.joules import Joules

CAPACITY = 200_000  # spans, about 60 MB
PENDING = 1024  # device spans not yet read, before the oldest is waited for
_REBASE = 1e3  # milliseconds; CUDA reports float32, which is exact to 0.1 us over this long


class Mark(NamedTuple):
    """A span without its times."""

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
    details: str | None = None

    def at(self, start_us: float, duration_us: float) -> Span:
        op, schedule, phase, layer, band, segment, device, thread, size, depth, details = self
        return Span(op, schedule, phase, layer, band, segment, str(device), thread, start_us, duration_us, size, depth,
                    details)


_Pending = tuple[Mark, devices.Event, devices.Event]


class Recording:
    """The spans of one recording; every method may be called from any thread."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.began = time.perf_counter()
        self._entries: deque[Span] = deque(maxlen=capacity)
        self._pending: deque[_Pending] = deque()
        self._bases: dict[torch.device, tuple[devices.Event, float]] = {}
        self._count = 0
        self._joules = Joules()
        self._lock = forks.new_lock()  # not held during calls of a device, which may take the MPS lock

    @property
    def dropped(self) -> int:
        """Return the number of oldest spans that were dropped to stay within the capacity."""
        return self._count - len(self._entries)

    def entries(self) -> list[Span]:
        """Return the spans by start, after the device has finished the last of them."""
        self._read_pending(most=0)
        with self._lock:
            return sorted(self._entries, key=lambda entry: entry.start_us)

    def summary(self) -> str:
        """Return a table of count and time by op, phase and device, and the energy of the devices."""
        return export.summary(self.entries(), self.dropped, self.energy())

    def energy(self) -> dict[str, float | str]:
        """Return the joules of each device while the recording ran, all processes together, or why there are none."""
        return self._joules.found()

    def begin(self) -> None:
        """Count the energy from now on: of the CPU, and of other devices from their first span."""
        self._joules.follow(torch.device("cpu"))

    def end(self) -> None:
        """Count no more energy."""
        self._joules.end()

    def write(self, path: str) -> None:
        """Write the spans to `path` in the format of its suffix: .csv, .jsonl (an object a line), .json (Chrome trace).

        The file is replaced atomically. Raises ValueError for another suffix, OSError if it cannot be written.
        """
        write = export.writer(path)
        entries = self.entries()
        with files.replacing(path) as file:
            write(file, entries, {"dropped": self.dropped, "joules": self.energy()})

    def add(self, span: Span) -> None:
        """Keep a finished span; drop the oldest one if there are more than the capacity."""
        with self._lock:
            self._entries.append(span)
            self._count += 1
        self._joules.refresh()

    def add_pending(self, pending: _Pending) -> None:
        """Keep a span whose device events have not happened yet."""
        self._pending.append(pending)
        if len(self._pending) > PENDING // 2:
            self._read_pending(most=PENDING)

    def tie_clock(self, device: torch.device) -> None:
        """Record the event that relates the device's clock to the host's, before the device's first span."""
        if device not in self._bases:
            self._joules.follow(device)
            base = devices.event(device, timing=True)
            devices.synchronize(device)
            base.record()
            self._bases[device] = (base, (time.perf_counter() - self.began) * 1e6)

    def _read_pending(self, most: int) -> None:
        """Read the spans that the device has finished; wait for it only while more than `most` are unread."""
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
            self.add(mark.at(base_us + since * 1e3, start.elapsed_time(end) * 1e3))
