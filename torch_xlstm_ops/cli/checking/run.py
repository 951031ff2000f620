"""Run a check: compare with the float64 recurrence, time the first call and the later ones."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops import config
from torch_xlstm_ops.cli.checking import model
from torch_xlstm_ops.cli.checking.cases import OURS, Case
from torch_xlstm_ops.maths.shapes import dtype_name
from torch_xlstm_ops.maths.tolerance import GRADIENT_TOLERANCE, TOLERANCE, error
from torch_xlstm_ops.runtime import devices

TIMING_S, TIMING_CALLS = 0.3, 20
NOT_RUN = "not run: out of time"


class Result(NamedTuple):
    """The result of a check; `failure` is empty if the error is within `tolerance`, and `NOT_RUN` if time ran out."""

    operator: str
    dtype: str
    error: float | None
    tolerance: float
    milliseconds: float | None  # of a call that is compiled, the median
    failure: str
    party: str = OURS  # whose result it is
    meaning: str = ""
    first_call_s: float | None = None  # with compilation
    tokens_per_s: float | None = None


def check(case: Case, dtype: torch.dtype, device: torch.device, end: float) -> Result:
    """Compare a case with the recurrence and time it; an error is recorded as the failure."""
    tolerance = (GRADIENT_TOLERANCE if case.inputs else TOLERANCE)[dtype]
    failed = Result(case.name, dtype_name(dtype), None, tolerance, None, "", case.party, case.meaning)
    if time.perf_counter() > end:
        return failed._replace(failure=NOT_RUN)
    try:
        args = case.draw(dtype)
        wanted = case.results(case.exact, [t.double() for t in args])
        with config.use(**case.settings):
            found, first = timed_first(
                lambda: case.results(case.call, [t.to(device) if device.type != "cpu" else t.clone() for t in args]),
                device,
            )
            worst = error([t.detach().cpu() for t in found], wanted)
            on_device = [t.to(device) for t in args]
            milliseconds = median_ms(lambda: case.results(case.call, on_device), device)
    except Exception as problem:  # one operator that fails must not hide the others
        return failed._replace(failure=f"{type(problem).__name__}: {problem}")
    failure = "" if worst <= tolerance else "out of tolerance"
    return failed._replace(error=worst, milliseconds=milliseconds, failure=failure, first_call_s=first)


def check_model(device: torch.device, end: float) -> Iterator[Result]:
    """Yield a result for each phase of the patched model in each of its dtypes."""
    reason = model.missing() or (NOT_RUN if time.perf_counter() > end else None)
    if reason is not None:
        yield Result("model", "float32", None, 0.0, None, reason, meaning="the patched transformers model")
        return
    expected = model.expected()
    with model.patched(), torch.no_grad():
        for dtype, tolerance in model.DTYPES.items():
            failed = Result("model", dtype_name(dtype), None, tolerance, None, "")
            try:
                for phase in model.phases(dtype, device):
                    yield _phase(phase, expected.get(phase.name), failed, device, end)
            except Exception as problem:  # the operators are still to be checked
                yield failed._replace(failure=f"{type(problem).__name__}: {problem}")


def _phase(phase: model.Phase, expected: Tensor | None, failed: Result, device: torch.device, end: float) -> Result:
    failed = failed._replace(operator=f"model: {phase.name}", meaning=phase.meaning)
    if time.perf_counter() > end:
        return failed._replace(failure=NOT_RUN)
    logits, first = timed_first(phase.logits if expected is not None else phase.call, device)
    worst = None if expected is None else error([logits.float().cpu()], [expected.double()])
    milliseconds = median_ms(phase.call, device)
    failure = "" if worst is None or worst <= failed.tolerance else "out of tolerance"
    return failed._replace(error=worst, milliseconds=milliseconds, failure=failure, first_call_s=first,
                           tokens_per_s=phase.tokens / milliseconds * 1e3)


def timed_first(call: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """Return the result of a call and its seconds."""
    devices.synchronize(device)
    start = time.perf_counter()
    found = call()
    devices.synchronize(device)
    return found, time.perf_counter() - start


def median_ms(call: Callable[[], object], device: torch.device) -> float:
    """Return the median milliseconds of a call that is already compiled."""
    taken: list[float] = []
    end = time.perf_counter() + TIMING_S
    while len(taken) < 3 or (len(taken) < TIMING_CALLS and time.perf_counter() < end):
        taken.append(devices.timed(call, device))
    return statistics.median(taken)
