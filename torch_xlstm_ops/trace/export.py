"""How a trace becomes a file or a table: CSV, JSON lines, Chrome trace (which Perfetto opens), and a summary."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TextIO


class Entry(NamedTuple):
    """One finished span."""

    op: str
    schedule: str | None
    phase: str  # forward, backward, prefill, decode, or what the caller names
    layer: int | None
    band: int | None
    segment: int | None
    device: str
    thread: str
    start_us: float  # since the recording began
    duration_us: float
    bytes: int | None  # read and written
    queue_depth: int | None  # tasks in flight when it began


def check_file(name: str, path: str) -> None:
    """Raise ValueError unless `path` can be written; `name` is the argument to blame."""
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path):
        raise ValueError(f"{name} must be a file that can be written, got {path!r}, which is a directory")
    if not os.path.isdir(folder):
        raise ValueError(f"{name} must be a file that can be written, got {path!r}, whose directory is not there")
    if not all(os.access(place, os.W_OK) for place in (folder, path) if os.path.exists(place)):
        raise ValueError(f"{name} must be a file that can be written, got {path!r}, which permissions forbid")


@contextmanager
def whole_file(path: str) -> Iterator[TextIO]:
    """Open a text file that takes the place of `path` when the block ends, and vanishes if it raises."""
    partial = f"{path}.{os.getpid()}.partial"
    try:
        with open(partial, "w", encoding="utf-8", newline="") as file:
            yield file
        os.replace(partial, path)
    except BaseException:
        if os.path.exists(partial):
            os.remove(partial)
        raise


def _write_csv(file: TextIO, entries: Sequence[Entry], dropped: int) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(Entry._fields)
    writer.writerows(entries)


def _write_lines(file: TextIO, entries: Sequence[Entry], dropped: int) -> None:
    for entry in entries:
        file.write(json.dumps(entry._asdict()) + "\n")


def _write_chrome(file: TextIO, entries: Sequence[Entry], dropped: int) -> None:
    rows: dict[str, dict[str, int]] = {}  # device (Chrome's process) -> thread -> number
    events: list[dict[str, object]] = []
    for entry in entries:
        threads = rows.setdefault(entry.device, {})
        place = {"pid": list(rows).index(entry.device), "tid": threads.setdefault(entry.thread, len(threads))}
        details = {"phase": entry.phase, "schedule": entry.schedule, "layer": entry.layer, "band": entry.band,
                   "segment": entry.segment, "bytes": entry.bytes}
        known = {key: value for key, value in details.items() if value is not None}
        events.append({"name": entry.op, "cat": entry.phase, "ph": "X", "ts": entry.start_us,
                       "dur": entry.duration_us, **place, "args": known})
        if entry.queue_depth is not None:
            events.append({"name": "queue depth", "id": entry.op, "ph": "C", "ts": entry.start_us, **place,
                           "args": {"tasks": entry.queue_depth}})
    for pid, (device, threads) in enumerate(rows.items()):
        events.append({"name": "process_name", "ph": "M", "pid": pid, "args": {"name": device}})
        events.extend({"name": "thread_name", "ph": "M", "pid": pid, "tid": tid, "args": {"name": thread}}
                      for thread, tid in threads.items())
    json.dump({"displayTimeUnit": "ms", "otherData": {"dropped": dropped}, "traceEvents": events}, file)


Writer = Callable[[TextIO, Sequence[Entry], int], None]

WRITERS: dict[str, Writer] = {
    ".csv": _write_csv,
    ".jsonl": _write_lines,
    ".json": _write_chrome,
}


def writer(path: str) -> Writer:
    """Return what writes the format that `path`'s suffix names; ValueError for another suffix."""
    suffix = os.path.splitext(path)[1]
    if suffix not in WRITERS:
        raise ValueError(f"trace must be a file name ending in .csv, .jsonl or .json, got {path!r}")
    return WRITERS[suffix]


def summary(entries: Sequence[Entry], dropped: int) -> str:
    """Return a table of count and time by op, phase and device."""
    groups: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.op, entry.phase, entry.device), []).append(entry)
    lines = [("op", "phase", "device", "count", "total ms", "mean us", "max us", "GB/s")]
    for names, members in groups.items():
        times = [entry.duration_us for entry in members]
        total = sum(times)
        moved = sum(entry.bytes or 0 for entry in members)
        rate = f"{moved / total / 1e3:.1f}" if moved and total else "-"
        lines.append((*names, str(len(times)), f"{total / 1e3:.2f}", f"{total / len(times):.1f}",
                      f"{max(times):.1f}", rate))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    table = ["  ".join(cell.ljust(width) if column < 3 else cell.rjust(width)
                       for column, (cell, width) in enumerate(zip(line, widths, strict=True))) for line in lines]
    if dropped:
        table.append(f"{dropped} older entries were dropped")
    return "\n".join(line.rstrip() for line in table)
