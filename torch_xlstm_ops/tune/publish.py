"""Where the winner of a search goes: into the file that ``schedule="auto"`` reads."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch_xlstm_ops import registrations
from torch_xlstm_ops.config import Schedule, tuned_plans
from torch_xlstm_ops.tune.space import Space
from torch_xlstm_ops.tune.study import Result

_OF_ANY_SCHEDULE = ("schedule", "chunk_size", "segment", "heads_per_band")


def publish(
    path: Path, kinds: Iterable[tuned_plans.Kind], space: Space, result: Result, about: Mapping[str, Any]
) -> bool:
    """Put a winner under each kind of call; where the default is as fast, take out what stands there.

    about: what else the entry tells.
    Returns whether there is a winner. Raises OSError if the file cannot be written.
    """
    entry = {
        "settings": settings(space, result),
        "times_as_fast": [value if math.isfinite(value) else None for value in result.times_as_fast],
        "plan": str(result.best.plan).splitlines()[:5],
        "found": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), **about,
    }
    tuned_plans.store(path, {str(kind): entry if result.faster else None for kind in kinds})
    registrations.mlstm.forget_routes()
    return result.faster


def settings(space: Space, result: Result) -> dict[str, Any]:
    """Return the settings that lead to the winner, without those that its schedule does not read."""
    given = space.settings(result.best.params)
    fields = _OF_ANY_SCHEDULE if result.best.plan.schedule is Schedule.INDUCTOR else tuned_plans.FIELDS
    return {field: str(given[field]) if field == "schedule" else given[field] for field in fields if field in given}


def hand_over(source: Path, path: Path) -> int:
    """Copy the entries of one file into another, all or none; return how many.

    Raises OSError if a file cannot be read or written, ValueError for a file or an entry that makes no sense.
    """
    found = tuned_plans.read(source)
    for key, entry in found.items():
        tuned_plans.checked(entry, f"{key} in {source}")
    tuned_plans.store(path, found)
    registrations.mlstm.forget_routes()
    return len(found)
