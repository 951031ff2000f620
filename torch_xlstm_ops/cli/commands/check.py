"""`xlstm-ops check`: every operator on a device against the float64 recurrence on the CPU, and how long it takes."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops.cli.commands import info
from torch_xlstm_ops.maths import mlstm, slstm
from torch_xlstm_ops.maths.shapes import EPS
from torch_xlstm_ops.maths.tolerance import GRADIENT_TOLERANCE, TOLERANCE, error
from torch_xlstm_ops.runtime import devices
from torch_xlstm_ops.trace import export

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SECONDS = 600.0  # nothing is started after so many; two busy CPU cores took 308
TIMING_S, TIMING_CALLS = 0.3, 20
NOT_RUN = "not run: out of time"

MLSTM = {"B": 1, "NH": 4, "S": 300, "DHQK": 64, "DHHV": 128}  # whole chunks and a tail
SLSTM = {"B": 2, "NH": 4, "S": 40, "DH": 64}  # blocks and a tail


class Case(NamedTuple):
    """An operator, what draws its arguments for a dtype, and the recurrence that it must equal.

    inputs: how many arguments to differentiate by; with 0 the results themselves are compared.
    """

    name: str
    draw: Callable[[torch.dtype], list[Tensor]]
    call: Callable[..., Sequence[Tensor]]
    exact: Callable[..., Sequence[Tensor]]
    inputs: int = 0

    def results(self, run: Callable[..., Sequence[Tensor]], args: Sequence[Tensor]) -> list[Tensor]:
        """Return what `run` gives for `args`: its results, or the gradients of the first `inputs` arguments."""
        if not self.inputs:
            return list(run(*args))
        given = [t.detach().requires_grad_() for t in args[: self.inputs]]
        outputs = run(*given)
        generator = torch.Generator().manual_seed(1)
        seeds = [torch.randn(t.shape, generator=generator).bfloat16().to(t) for t in outputs]  # exact in every dtype
        return list(torch.autograd.grad(list(outputs), given, seeds))


class Result(NamedTuple):
    """What came of one case: `failure` is empty if the error is within `tolerance`, and `NOT_RUN` if time ran out."""

    operator: str
    dtype: str
    error: float | None
    tolerance: float
    milliseconds: float | None
    failure: str


def draw_mlstm(dtype: torch.dtype) -> list[Tensor]:
    """Return q, k, v, igate, fgate, c, n, m of a sequence."""
    B, NH, S, DHQK, DHHV = MLSTM.values()
    generator = torch.Generator().manual_seed(0)
    shapes = ((S, DHQK), (S, DHQK), (S, DHHV), (S,), (S,), (DHQK, DHHV), (DHQK,), (1,))
    drawn = [torch.randn(B, NH, *shape, generator=generator) for shape in shapes]
    drawn[4] += 3
    return [*(t.to(dtype) for t in drawn[:5]), *drawn[5:]]


def draw_mlstm_token(dtype: torch.dtype) -> list[Tensor]:
    """Return q, k, v, igate, fgate, c, n, m of a token."""
    q, k, v, igate, fgate, *state = draw_mlstm(dtype)
    return [*(t[:, :, 0].contiguous() for t in (q, k, v)), igate[:, :, :1].contiguous(), fgate[:, :, :1].contiguous(),
            *state]


def draw_slstm(dtype: torch.dtype) -> list[Tensor]:
    """Return x, r, b, y, c, n, m of a sequence."""
    B, NH, S, DH = SLSTM.values()
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, S, 4, NH, DH), (4, NH, DH, DH), (4, NH, DH), *[(B, NH, DH)] * 4)
    x, r, b, y, c, n, m = (torch.randn(shape, generator=generator) for shape in shapes)
    return [*(t.to(dtype) for t in (x, r * DH**-0.5, b)), y, c, n.abs() + 1, m]


def draw_slstm_token(dtype: torch.dtype) -> list[Tensor]:
    """Return x, r, b, y, c, n, m of a token."""
    x, *rest = draw_slstm(dtype)
    return [x[:, 0].contiguous(), *rest]


def _op(name: str) -> Callable[..., Sequence[Tensor]]:
    return lambda *args: getattr(torch.ops.xlstm, name)(*args)


def _step_in_place(*args: Tensor) -> list[Tensor]:
    return [torch.ops.xlstm.mlstm_step_(*args), *args[5:]]


def _mlstm_step(*args: Tensor) -> Sequence[Tensor]:
    return mlstm.step(*args, eps=EPS)


def _mlstm_recurrent(*args: Tensor) -> Sequence[Tensor]:
    return mlstm.recurrent(*args, eps=EPS)


def _slstm_step(*args: Tensor) -> Sequence[Tensor]:
    return slstm.step(*args, floor=0.0, product=slstm.Product.FUSED)


CASES = (
    Case("mlstm_step", draw_mlstm_token, _op("mlstm_step"), _mlstm_step),
    Case("mlstm_step_", draw_mlstm_token, _step_in_place, _mlstm_step),
    Case("mlstm_chunkwise", draw_mlstm, _op("mlstm_chunkwise"), _mlstm_recurrent),
    Case("mlstm_chunkwise and backward", draw_mlstm, _op("mlstm_chunkwise"), _mlstm_recurrent, 8),
    Case("slstm_step", draw_slstm_token, _op("slstm_step"), _slstm_step),
    Case("slstm_sequence", draw_slstm, _op("slstm_sequence"), slstm.recurrent),
    Case("slstm_sequence and backward", draw_slstm, _op("slstm_sequence"), slstm.recurrent, 7),
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `check`."""
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or mps (default auto)")
    parser.add_argument("--seconds", type=float, default=SECONDS, metavar="N",
                        help="start nothing later (default %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write errors, times and versions here, for sending back")


def run(device: torch.device, path: str | None, seconds: float) -> int:
    """Check every operator, print a table, write `path` if given; return 0 if all passed, else 1."""
    began = time.perf_counter()
    results = [check(case, dtype, device, began + seconds) for dtype in DTYPES for case in CASES]
    print_table(results)
    print(f"{device.type}: {summary(results)}; {time.perf_counter() - began:.0f} s")
    if path is not None:
        with export.whole_file(path) as file:
            json.dump(report(device, results), file, indent=1)
        print(f"wrote {path}")
    return 1 if any(result.failure for result in results) else 0


def summary(results: Sequence[Result]) -> str:
    """Return how many passed, failed and, where time ran out, were not run."""
    idle = sum(result.failure == NOT_RUN for result in results)
    passed = sum(not result.failure for result in results)
    counted = f"{passed} passed, {len(results) - passed - idle} failed"
    return f"{counted}, {idle} not run as the time was up: give a larger --seconds" if idle else counted


def check(case: Case, dtype: torch.dtype, device: torch.device, end: float) -> Result:
    """Compare a case with the recurrence and time it; whatever it raises is recorded."""
    tolerance = (GRADIENT_TOLERANCE if case.inputs else TOLERANCE)[dtype]
    failed = Result(case.name, str(dtype).removeprefix("torch."), None, tolerance, None, "")
    if time.perf_counter() > end:
        return failed._replace(failure=NOT_RUN)
    try:
        args = case.draw(dtype)
        wanted = case.results(case.exact, [t.double() for t in args])
        found = case.results(case.call, [t.to(device) if device.type != "cpu" else t.clone() for t in args])
        worst = error([t.detach().cpu() for t in found], wanted)
        on_device = [t.to(device) for t in args]
        milliseconds = median_ms(lambda: case.results(case.call, on_device), device)
    except Exception as problem:  # one operator that fails must not hide the others
        return failed._replace(failure=f"{type(problem).__name__}: {problem}")
    failure = "" if worst <= tolerance else "out of tolerance"
    return failed._replace(error=worst, milliseconds=milliseconds, failure=failure)


def median_ms(call: Callable[[], object], device: torch.device) -> float:
    """Return the median milliseconds of a call that has been made before."""
    taken: list[float] = []
    end = time.perf_counter() + TIMING_S
    while len(taken) < 3 or (len(taken) < TIMING_CALLS and time.perf_counter() < end):
        taken.append(devices.timed(call, device))
    return statistics.median(taken)


def report(device: torch.device, results: Sequence[Result]) -> dict[str, Any]:
    """Return what the JSON file holds."""
    found = devices.capabilities(device.type)
    rows = [result._asdict() for result in results]
    for row in rows:  # JSON has no infinity
        row["error"] = None if row["error"] == float("inf") else row["error"]
    return {
        "device": {"kind": device.type, "names": found.names, "mps_fallback": devices.mps_fallback()},
        "system": {"platform": platform.platform(), "machine": platform.machine(), "macos": platform.mac_ver()[0]},
        "versions": {row[0]: row[1] for row in (*info.versions(), *info.supported())},
        "sizes": {"mlstm": MLSTM, "slstm": SLSTM},
        "passed": not any(result.failure for result in results),
        "results": rows,
    }


def print_table(results: Sequence[Result]) -> None:
    """Print a line for each result, with rich where it is installed."""
    head = ("operator", "dtype", "error", "allowed", "ms", "")
    rows = [_cells(result) for result in results]
    if find_spec("rich") is None:
        print(info.aligned([head, *rows]))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*head)
    for row in rows:
        table.add_row(*row[:-1], Text(row[-1], "green" if row[-1] == "ok" else "red"))
    Console().print(table)


def _cells(result: Result) -> tuple[str, ...]:
    error = "" if result.error is None else f"{result.error:.1e}"
    ms = "" if result.milliseconds is None else f"{result.milliseconds:.3f}"
    return result.operator, result.dtype, error, f"{result.tolerance:.0e}", ms, result.failure or "ok"
