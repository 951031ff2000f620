"""The record of a trial, and the files of all trials."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from torch_xlstm_ops.runtime import files


class Outcome(str, Enum):
    """How a trial ended."""

    MEASURED = "measured"
    REPEATED = "repeated"  # its plan was measured before
    REFUSED = "refused"  # by the memory model or the limit of chunks
    WRONG = "wrong"  # its results differ from the default plan's
    FAILED = "failed"  # it raised an exception

    def __str__(self) -> str:
        return str(self.value)


@dataclasses.dataclass(frozen=True)
class Timing:
    """One workload of a trial; times in milliseconds, with the 95% confidence interval of the median."""

    workload: str
    phase: str
    weight: float
    tokens: int
    rounds: int
    median_ms: float
    low_ms: float | None
    high_ms: float | None
    best_so_far_ms: float | None  # of the best plan so far, timed in turns with this one
    times_as_fast: float | None  # as fast as that plan
    tokens_per_second: float
    error: float  # of the results, relative to the default plan
    joules: float | None = None  # of a call, the median; None where energy was no objective


@dataclasses.dataclass(frozen=True)
class Record:
    """A trial. reward: speed relative to the default plan."""

    study: str
    number: int
    method: str
    seed: int
    outcome: Outcome
    params: dict[str, Any]
    key: list[Any]
    plan: str
    reward: float | None = None
    reward_low: float | None = None
    reward_high: float | None = None
    best: bool = False  # whether it became the best plan so far
    timings: tuple[Timing, ...] = ()
    reason: str = ""  # for an outcome that is not `measured`
    warm_up_s: float | None = None
    seconds: float | None = None  # the whole trial
    estimated_bytes: int | None = None  # by the memory model
    peak_bytes: int | None = None  # of the device; on the CPU, of the process since its start
    load_average: float | None = None
    trace: str | None = None  # file
    ended: float = 0.0  # seconds since the epoch

    def as_json(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return {**dataclasses.asdict(self), "outcome": str(self.outcome)}


def from_json(found: dict[str, Any]) -> Record:
    """Return a record from the result of `Record.as_json`."""
    timings = tuple(Timing(**timing) for timing in found["timings"])
    return Record(**{**found, "timings": timings, "outcome": Outcome(found["outcome"])})


COLUMNS = (
    "study", "number", "method", "seed", "outcome", "reward", "reward_low", "reward_high", "best", "schedule",
    "chunk_size", "segment", "heads_per_band", "workers", "streams", "window", "workload", "rounds", "median_ms",
    "low_ms", "high_ms", "best_so_far_ms", "times_as_fast", "tokens_per_second", "error", "joules", "warm_up_s",
    "seconds", "estimated_bytes", "peak_bytes", "load_average", "trace", "reason",
)


def rows(record: Record) -> list[dict[str, Any]]:
    """Return a row of the CSV for each workload of a trial, one row if there is none."""
    values = {**record.as_json(), **record.params}
    return [{column: {**values, **timing}.get(column) for column in COLUMNS} for timing in values["timings"] or [{}]]


class Files:
    """`trials.jsonl` and `trials.csv` in a folder: rewritten from a store, then appended to."""

    def __init__(self, folder: Path, records: Iterable[Record]) -> None:
        self._lines, self._table = folder / "trials.jsonl", folder / "trials.csv"
        kept = list(records)
        with files.replacing(self._lines) as file:
            file.writelines(_line(record) for record in kept)
        with files.replacing(self._table) as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(row for record in kept for row in rows(record))

    def add(self, record: Record) -> None:
        """Append a trial to both files."""
        with self._lines.open("a", encoding="utf-8") as file:
            file.write(_line(record))
        with self._table.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerows(rows(record))


def _line(record: Record) -> str:
    return json.dumps(record.as_json()) + "\n"


def measured(records: Iterable[Record]) -> Sequence[Record]:
    """Return the trials that were measured."""
    return [record for record in records if record.outcome is Outcome.MEASURED]
