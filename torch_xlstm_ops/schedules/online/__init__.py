"""Tuning in use: while a model is used, calls try few other plans, and the fastest is kept.

`arms` has the plans. `controller` decides which one a call uses, by a policy of `policies` or `cfc` and within a
`budget` of lost time. `timer` times calls without waiting for the device. `learner` joins these for one kind of call.
`keep` writes the best plan to the file of tuned plans. Operators call `schedule`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch_xlstm_ops.config import Config, Tune
from torch_xlstm_ops.schedules.online import learner
from torch_xlstm_ops.schedules.online.learner import Use, Way
from torch_xlstm_ops.schedules.online.tuned_schedule import TunedSchedule

__all__ = ["TunedSchedule", "Use", "schedule"]


def schedule(call: Way, asked: Config, used: Config, use: Use, carry_out: Callable[[Config], Way]) -> Any:
    """Return the schedule of a call: its own, or where `asked.tune` says so, one that tries other plans.

    call: how it is carried out without. asked: its configuration. used: the same with what the tuner found.
    carry_out: how it is by other settings.
    """
    if asked.tune is Tune.OFF or len(learner.learner(asked, used, use).candidates) < 2:
        return call.schedule
    return TunedSchedule(call, asked, used, use, carry_out)
