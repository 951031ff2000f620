"""Write spans as CSV, JSON lines or a Chrome trace, which Perfetto opens, and summarise them in a table."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TextIO


class Span(NamedTuple):
    """One finished span: the work of one operator, band and segment; start_us counts from the recording's beginning."""

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
    details: str | None = None  # what the work says of itself, such as the rounds of an sLSTM


About = Mapping[str, object]  # what a Chrome trace says beside the spans


def _write_csv(file: TextIO, entries: Sequence[Span], about: About) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(Span._fields)
    writer.writerows(entries)


def _write_lines(file: TextIO, entries: Sequence[Span], about: About) -> None:
    for entry in entries:
        file.write(json.dumps(entry._asdict()) + "\n")


def _write_chrome(file: TextIO, entries: Sequence[Span], about: About) -> None:
    rows: dict[str, dict[str, int]] = {}  # device (Chrome's process) -> thread -> number
    events: list[dict[str, object]] = []
    for entry in entries:
        threads = rows.setdefault(entry.device, {})
        place = {"pid": list(rows).index(entry.device), "tid": threads.setdefault(entry.thread, len(threads))}
        details = {"phase": entry.phase, "schedule": entry.schedule, "layer": entry.layer, "band": entry.band,
                   "segment": entry.segment, "bytes": entry.bytes, "details": entry.details}
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
    json.dump({"displayTimeUnit": "ms", "otherData": about, "traceEvents": events}, file)


Writer = Callable[[TextIO, Sequence[Span], About], None]

WRITERS: dict[str, Writer] = {
    ".csv": _write_csv,
    ".jsonl": _write_lines,
    ".json": _write_chrome,
}


def writer(path: str) -> Writer:
    """Return the writer for `path`'s suffix. Raises ValueError for an unknown suffix."""
    suffix = os.path.splitext(path)[1]
    if suffix not in WRITERS:
        raise ValueError(f"trace must be a file name ending in .csv, .jsonl or .json, got {path!r}")
    return WRITERS[suffix]


def summary(entries: Sequence[Span], dropped: int, energy: Mapping[str, float | str]) -> str:
    """Return a table of count and time by op, phase and device, and the energy of the devices.

    energy: joules by device, or why they are not counted.
    """
    groups: dict[tuple[str, str, str], list[Span]] = {}
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
    table += [f"energy of {device}: " + (found if isinstance(found, str) else f"{found:.3g} J, all processes together")
              for device, found in energy.items() if any(entry.device == device for entry in entries)]
    if dropped:
        table.append(f"{dropped} older entries were dropped")
    return "\n".join(line.rstrip() for line in table)
