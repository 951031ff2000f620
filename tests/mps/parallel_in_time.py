"""Runs an sLSTM parallel in time on the emulated device: its submissions, its rounds, and its error."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_xlstm_ops.maths import slstm
from torch_xlstm_ops.ops.slstm.sequence import parallel

from . import cases, emulator
from .instrument import relative_errors
from .measure import report_launch
from .slstm_operations import SLSTM


def parallel_in_time(tokens: int, dtype: str, reset: bool, floor: float, gradient: bool = False) -> dict[str, Any]:
    """Run a sequence twice, forward or its gradient, and report the second call, which compiles nothing."""
    run = SLSTM("slstm_sequence", tokens, reset=reset, gradient=gradient, B=1, NH=2, DH=32)
    args = run.arguments(cases.DTYPES[dtype])
    given = run.gradients(args)
    for _ in range(2):
        found, log = _recorded([t.to("mps") for t in args], [t.to("mps") for t in given], floor)
    report, exact = parallel.report, [t if t.dtype == torch.bool else t.double() for t in args]
    expected, eager = (
        run.results(partial(slstm.recurrent, floor=floor), inputs, dh)
        for inputs, dh in ((exact, [t.double() for t in given]), (args, given))
    )
    return {
        "rounds": report.rounds, "fell_back": report.fell_back, "windows": report.windows,
        "aten": dict(Counter(call.op for call in log.aten)), "launches": [report_launch(one) for one in log.launches],
        "round_trips": [call.name for call in log.aten if call.waits_for_device],
        "errors": relative_errors(found, expected), "eager_errors": relative_errors(eager, expected),
    }


def _recorded(args: list[Tensor], given: list[Tensor], floor: float) -> tuple[list[Tensor], Any]:
    """Return the results, or the gradients where those of the results are given, and the submissions for them."""
    inputs = [t.requires_grad_() if given and t.dtype != torch.bool else t for t in args]
    with emulator.recording() as forward:
        results = torch.ops.xlstm.slstm_sequence(*inputs, floor=floor, schedule="parallel")
    if not given:
        return list(results), forward
    with emulator.recording() as backward:
        found = torch.autograd.grad(results, inputs[:7], given)
    return list(found), backward
