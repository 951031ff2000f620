"""`xlstm-ops check`: compare every operator on a device with the float64 recurrence on the CPU, and time it."""

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

from torch_xlstm_ops.cli.checking.cases import CASES, MLSTM, SLSTM, Case
from torch_xlstm_ops.cli.commands import info
from torch_xlstm_ops.cli.shared.errors import bad_input
from torch_xlstm_ops.cli.shared.table import aligned
from torch_xlstm_ops.maths.shapes import dtype_name
from torch_xlstm_ops.maths.tolerance import GRADIENT_TOLERANCE, TOLERANCE, error
from torch_xlstm_ops.runtime import devices, files

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SECONDS = 600.0  # default of --seconds; two busy CPU cores took 308
TIMING_S, TIMING_CALLS = 0.3, 20
NOT_RUN = "not run: out of time"
HELP = "compare every operator with the recurrence on a device, and time it"



class Result(NamedTuple):
    """The result of a case; `failure` is empty if the error is within `tolerance`, and `NOT_RUN` if time ran out."""

    operator: str
    dtype: str
    error: float | None
    tolerance: float
    milliseconds: float | None
    failure: str


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `check`."""
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or mps (default auto)")
    parser.add_argument("--seconds", type=float, default=SECONDS, metavar="N",
                        help="start nothing later (default %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write errors, times and versions here, for sending back")


def execute(parsed: argparse.Namespace) -> int:
    """Check every operator, print a table, write a report if asked; return 0 if all passed, else 1. Raises BadInput."""
    path, seconds = parsed.json, parsed.seconds
    with bad_input():
        if path is not None:
            files.check_file("--json", path)
        device = devices.resolve_device(parsed.device)
    began = time.perf_counter()
    results = [check(case, dtype, device, began + seconds) for dtype in DTYPES for case in CASES]
    print_table(results)
    print(f"{device.type}: {summary(results)}; {time.perf_counter() - began:.0f} s")
    if path is not None:
        with files.replacing(path) as file:
            json.dump(report(device, results), file, indent=1)
        print(f"wrote {path}")
    return 1 if any(result.failure for result in results) else 0


def summary(results: Sequence[Result]) -> str:
    """Return how many passed, failed and, if time ran out, were not run."""
    idle = sum(result.failure == NOT_RUN for result in results)
    passed = sum(not result.failure for result in results)
    counted = f"{passed} passed, {len(results) - passed - idle} failed"
    return f"{counted}, {idle} not run as the time was up: give a larger --seconds" if idle else counted


def check(case: Case, dtype: torch.dtype, device: torch.device, end: float) -> Result:
    """Compare a case with the recurrence and time it; an error is recorded as the failure."""
    tolerance = (GRADIENT_TOLERANCE if case.inputs else TOLERANCE)[dtype]
    failed = Result(case.name, dtype_name(dtype), None, tolerance, None, "")
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
    """Return the median milliseconds of a call that is already compiled."""
    taken: list[float] = []
    end = time.perf_counter() + TIMING_S
    while len(taken) < 3 or (len(taken) < TIMING_CALLS and time.perf_counter() < end):
        taken.append(devices.timed(call, device))
    return statistics.median(taken)


def report(device: torch.device, results: Sequence[Result]) -> dict[str, Any]:
    """Return the content of the JSON file."""
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
    """Print a line for each result, with rich if it is installed."""
    head = ("operator", "dtype", "error", "allowed", "ms", "")
    rows = [_cells(result) for result in results]
    if find_spec("rich") is None:
        print(aligned([head, *rows]))
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
