"""Keep the best plan of a controller in the file of tuned plans, for later processes."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

from torch_xlstm_ops.config import tuned_plans
from torch_xlstm_ops.maths.intervals import Interval
from torch_xlstm_ops.runtime.state import warn_once
from torch_xlstm_ops.schedules.online.arms import Settings


def entry(settings: Settings, times_as_fast: Interval, reason: str) -> dict[str, Any]:
    """Return the entry of a plan in the file."""
    return {
        "settings": {field: value if isinstance(value, int) else str(value) for field, value in settings.items()},
        "times_as_fast": list(times_as_fast), "plan": [reason],
        "found": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "method": "online",
    }


def keep(tuned: str, changes: Mapping[str, Any]) -> bool:
    """Write entries by kind, None to remove one; return False if another process writes now.

    tuned: the setting of that name. A file that cannot be written is told once by a warning.
    """
    path = tuned_plans.place(tuned)
    if path is None:
        return True
    try:
        tuned_plans.store(path, changes, replace_damaged=path == tuned_plans.default_file(), wait=0)
    except TimeoutError:
        return False
    except (OSError, ValueError) as error:
        warn_once(f"the plan that was found in use is not kept for later processes: {error}")
    return True
