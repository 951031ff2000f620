"""Store the result of a search in the file of tuned plans that ``schedule="auto"`` reads."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch_xlstm_ops.config import Schedule, tuned_plans
from torch_xlstm_ops.ops.mlstm import dispatch
from torch_xlstm_ops.tune.search import Result
from torch_xlstm_ops.tune.space import Space

_ALL_SCHEDULES = ("schedule", "chunk_size", "segment", "heads_per_band")


def publish(
    path: Path, kinds: Iterable[tuned_plans.CallKind], space: Space, result: Result, about: Mapping[str, Any]
) -> bool:
    """Store the best settings for each kind of call; if the default is as fast, remove the entries instead.

    about: further fields of the entry.
    Returns whether settings were stored. Raises OSError if the file cannot be written, ValueError for an existing file
    that is not one of tuned plans, or is one of a newer version.
    """
    entry = {
        "settings": settings(space, result),
        "times_as_fast": [value if math.isfinite(value) else None for value in result.times_as_fast],
        "plan": str(result.best.plan).splitlines()[:5],
        "found": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), **about,
    }
    tuned_plans.store(path, {str(kind): entry if result.faster else None for kind in kinds},
                      replace_damaged=path == tuned_plans.default_file())
    dispatch.forget()
    return result.faster


def settings(space: Space, result: Result) -> dict[str, Any]:
    """Return the settings of the best plan, without those that its schedule does not read."""
    given = space.settings(result.best.params)
    fields = _ALL_SCHEDULES if result.best.plan.schedule is Schedule.INDUCTOR else tuned_plans.FIELDS
    return {field: str(given[field]) if field == "schedule" else given[field] for field in fields if field in given}


def copy(source: Path, path: Path) -> int:
    """Copy the entries of one file into another, all or none; return their number.

    Raises OSError if a file cannot be read or written, ValueError for a file that is not one of tuned plans or an
    invalid entry.
    """
    found = tuned_plans.read(source)
    for key, entry in found.items():
        tuned_plans.checked(entry, f"{key} in {source}")
    tuned_plans.store(path, found)
    dispatch.forget()
    return len(found)
