"""Runs an sLSTM parallel in time on the emulated device: its submissions, its rounds, and its error."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from torch_xlstm_ops.maths import slstm
from torch_xlstm_ops.ops.slstm.sequence import parallel

from . import cases, emulator
from .instrument import relative_errors
from .measure import report_launch
from .slstm_operations import SLSTM


def parallel_in_time(tokens: int, dtype: str, reset: bool, floor: float) -> dict[str, Any]:
    """Run a sequence forward twice, and report the second call, which compiles nothing."""
    run = SLSTM("slstm_sequence", tokens, reset=reset, B=1, NH=2, DH=32)
    args = run.arguments(cases.DTYPES[dtype])
    on_device = [t.to("mps") for t in args]
    for _ in range(2):
        with emulator.recording() as log:
            found = torch.ops.xlstm.slstm_sequence(*on_device, floor=floor, schedule="parallel")
    report, exact = parallel.report, [t if t.dtype == torch.bool else t.double() for t in args]
    expected, eager = (slstm.recurrent(*given, floor=floor) for given in (exact, args))
    return {
        "rounds": report.rounds, "fell_back": report.fell_back, "windows": report.windows,
        "aten": dict(Counter(call.op for call in log.aten)), "launches": [report_launch(one) for one in log.launches],
        "round_trips": [call.name for call in log.aten if call.waits_for_device],
        "errors": relative_errors(found, expected), "eager_errors": relative_errors(eager, expected),
    }
