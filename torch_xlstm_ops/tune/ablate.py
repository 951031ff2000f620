"""Ablations: from the default plan, one setting changed at a time, each plan taking turns with the default."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch_xlstm_ops.runtime import files
from torch_xlstm_ops.tune import bench
from torch_xlstm_ops.tune.rows import Row
from torch_xlstm_ops.tune.space import Candidate, Space, Value

_OF_THE_QUEUE = ("workers", "streams", "window")


def measure(
    name: str, space: Space, measures: bench.Bench, seconds: float, show: Callable[[Row], object]
) -> list[Row]:
    """Return a row for each value of each setting; what the queue alone reads is changed from its own plan.

    name: of the workload. seconds: for timing one plan. show: called with each row.
    """
    rows = []
    for setting, value, candidate in changes(space):
        try:
            found = measures.measure(candidate, space.default, seconds)
        except Exception as error:  # a plan that does not run is a result
            row = Row(name, setting, value, None, None, None, None, None, 0, False, str(candidate.plan),
                      f"{type(error).__name__}: {error}")
        else:
            (timing,) = found.timings
            speed = found.times_as_fast
            row = Row(name, setting, value, speed.value, bench.finite(speed.low), bench.finite(speed.high),
                      timing.median_ms, timing.best_so_far_ms, timing.rounds, candidate.key == space.default.key,
                      str(candidate.plan))
        rows.append(row)
        show(row)
    return rows


def changes(space: Space) -> Iterator[tuple[str, Value, Candidate]]:
    """Yield each setting, each of its values, and the plan with it, all else being as by default."""
    for setting, values in space.choices.items():
        for value in values:
            changed = {**space.default.params, setting: value}
            if setting in _OF_THE_QUEUE and "queued" in space.choices.get("schedule", ()):
                changed["schedule"] = "queued"
            candidate = space.candidate(changed)
            if candidate.key in space.plans:
                yield setting, value, candidate


def write(folder: Path, tables: Sequence[Sequence[Row]], about: Mapping[str, Any]) -> list[Path]:
    """Write ablation.json, ablation.csv and, where matplotlib is installed, ablation.png; return what was written."""
    rows = [dataclasses.asdict(row) for table in tables for row in table]
    paths = [folder / "ablation.json", folder / "ablation.csv"]
    with files.replacing(paths[0]) as file:
        json.dump({"about": dict(about), "load_average": bench.load_average(), "rows": rows}, file, indent=1)
    with files.replacing(paths[1]) as file:
        writer = csv.DictWriter(file, [f.name for f in dataclasses.fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    from torch_xlstm_ops.tune import plots

    if plots.there():
        paths.append(plots.ablation(folder / "ablation.png", tables, about))
    return paths
