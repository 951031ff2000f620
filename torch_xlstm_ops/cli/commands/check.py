"""`xlstm-ops check`: compare every operator on a device with the float64 recurrence on the CPU, and time it."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from torch_xlstm_ops.cli.checking import compare, machine
from torch_xlstm_ops.cli.checking.cases import CASES, MLSTM, SIZES, SLSTM
from torch_xlstm_ops.cli.checking.probes import PROBES
from torch_xlstm_ops.cli.checking.run import NOT_RUN, Result, check, check_model
from torch_xlstm_ops.cli.checking.summary import counts, page
from torch_xlstm_ops.cli.commands import info
from torch_xlstm_ops.cli.shared.errors import bad_input
from torch_xlstm_ops.cli.shared.table import aligned
from torch_xlstm_ops.runtime import devices, files

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SECONDS = 600.0  # default of --seconds
HELP = "compare every operator with the recurrence on a device, and time it"
UNITS = {"error": "relative, Euclidean norm", "milliseconds": "ms, median of a compiled call",
         "first_call_s": "s, with compilation", "tokens_per_s": "1/s", "launch_us": "us"}

__all__ = ["HELP", "NOT_RUN", "Result", "add_flags", "execute"]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `check`."""
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or mps (default auto)")
    parser.add_argument("--seconds", type=float, default=SECONDS, metavar="N",
                        help="start nothing later (default %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write errors, times and versions here, for sending back")
    parser.add_argument("--compare", metavar="FILE",
                        help="check nothing: hold the times of such a file of a Mac against predictions (checkout)")


def execute(parsed: argparse.Namespace) -> int:
    """Check everything, print a table, write a report if asked; return 0 if all passed, else 1. Raises BadInput."""
    path, seconds = parsed.json, parsed.seconds
    with bad_input():
        if parsed.compare is not None:
            print(compare.compare(compare.read(parsed.compare)))
            return 0
        if path is not None:
            files.check_file("--json", path)
        device = devices.resolve_device(parsed.device)
    began = time.perf_counter()
    described, launch_us = machine.describe(device), machine.launch_costs(device)
    results = list(run(device, began + seconds))
    print_table(results)
    print(page(results, described, launch_us))
    print(f"{device.type}: {counts(results)}; {time.perf_counter() - began:.0f} s")
    if path is not None:
        with files.replacing(path) as file:
            json.dump(report(device, results, described, launch_us), file, indent=1)
        print(f"wrote {path}")
    return 1 if any(result.failure for result in results) else 0


def run(device: torch.device, end: float) -> Iterator[Result]:
    """Yield a result for each check: torch's own calls, the model, every operator, special sizes."""
    for case in PROBES:
        yield check(case, torch.float32, device, end)
    yield from check_model(device, end)
    for dtype in DTYPES:
        for case in CASES:
            yield check(case, dtype, device, end)
    for case in SIZES:
        yield check(case, torch.float32, device, end)


def report(
    device: torch.device, results: Sequence[Result], described: dict[str, Any], launch_us: dict[str, float]
) -> dict[str, Any]:
    """Return the content of the JSON file."""
    found = devices.capabilities(device.type)
    rows = [result._asdict() for result in results]
    for row in rows:  # JSON has no infinity
        row["error"] = None if row["error"] == float("inf") else row["error"]
    return {
        "device": {"kind": device.type, "names": found.names, "mps_fallback": devices.mps_fallback()},
        "system": described,
        "versions": {row[0]: row[1] for row in (*info.versions(), *info.supported())},
        "sizes": {"mlstm": MLSTM, "slstm": SLSTM},
        "units": UNITS,
        "launch_us": launch_us,
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
