"""Ablations: change one setting of the default plan at a time, and time each plan in turns with the default."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch_xlstm_ops.runtime import files
from torch_xlstm_ops.tune import bench
from torch_xlstm_ops.tune.ablation_row import AblationRow
from torch_xlstm_ops.tune.space import Candidate, Space, Value

_QUEUED_ONLY = ("workers", "streams", "window")


def measure(
    name: str, space: Space, measures: bench.Bench, seconds: float, show: Callable[[AblationRow], object]
) -> list[AblationRow]:
    """Return a row for each value of each setting; settings of the queued schedule are changed in its default plan.

    name: of the workload. seconds: for timing one plan. show: called with each row.
    """
    rows = []
    for setting, value, candidate in changes(space):
        try:
            found = measures.measure(candidate, space.default, seconds)
        except Exception as error:  # a plan that fails is a result
            row = AblationRow(name, setting, value, None, None, None, None, None, 0, False, str(candidate.plan),
                      f"{type(error).__name__}: {error}")
        else:
            (timing,) = found.timings
            speed = found.times_as_fast
            row = AblationRow(name, setting, value, speed.value, bench.finite(speed.low), bench.finite(speed.high),
                      timing.median_ms, timing.best_so_far_ms, timing.rounds, candidate.key == space.default.key,
                      str(candidate.plan))
        rows.append(row)
        show(row)
    return rows


def changes(space: Space) -> Iterator[tuple[str, Value, Candidate]]:
    """Yield each setting, each of its values, and the default plan with that value."""
    for setting, values in space.choices.items():
        for value in values:
            changed = {**space.default.params, setting: value}
            if setting in _QUEUED_ONLY and "queued" in space.choices.get("schedule", ()):
                changed["schedule"] = "queued"
            candidate = space.candidate(changed)
            if candidate.key in space.plans:
                yield setting, value, candidate


def write(folder: Path, tables: Sequence[Sequence[AblationRow]], about: Mapping[str, Any]) -> list[Path]:
    """Write ablation.json, ablation.csv and, if matplotlib is installed, ablation.png; return their paths."""
    rows = [dataclasses.asdict(row) for table in tables for row in table]
    paths = [folder / "ablation.json", folder / "ablation.csv"]
    with files.replacing(paths[0]) as file:
        json.dump({"about": dict(about), "load_average": bench.load_average(), "rows": rows}, file, indent=1)
    with files.replacing(paths[1]) as file:
        writer = csv.DictWriter(file, [f.name for f in dataclasses.fields(AblationRow)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    from torch_xlstm_ops.tune import plots

    if plots.installed():
        paths.append(plots.ablation(folder / "ablation.png", tables, about))
    return paths
