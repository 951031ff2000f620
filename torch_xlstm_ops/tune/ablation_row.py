"""One row of an ablation."""

from __future__ import annotations

import dataclasses

from torch_xlstm_ops.maths.intervals import in_words
from torch_xlstm_ops.tune.space import Value


@dataclasses.dataclass(frozen=True)
class AblationRow:
    """One plan measured beside the default."""

    workload: str
    setting: str
    value: Value
    times_as_fast: float | None  # as fast as the default; None if it did not run
    low: float | None
    high: float | None
    milliseconds: float | None
    default_milliseconds: float | None
    rounds: int
    default: bool  # whether it is the default plan
    plan: str
    reason: str = ""  # why it did not run

    def __str__(self) -> str:
        found = self.reason if self.times_as_fast is None else in_words(self.times_as_fast, self.low, self.high)
        return f"{self.workload}  {self.setting:<14}  {self.value!s:<10}  {found}"
