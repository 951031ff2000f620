"""Run parts of the quality benchmark, store each result, and write the report of all stored results."""

from __future__ import annotations

import argparse
import datetime
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import run
from benchmarks.quality import coherence, mqar, perplexity, report, throughput
from benchmarks.quality.contenders import Conditions, usable
from benchmarks.timing import machine, save
from torch_xlstm_ops.runtime import devices

PARTS: dict[str, Callable[[Conditions], dict[str, Any]]] = {
    "mqar": mqar.run, "perplexity": perplexity.run, "coherence": coherence.run, "throughput": throughput.run,
}
ROOT = Path(__file__).resolve().parents[2]
FULL, QUICK = ROOT / "benchmarks", ROOT / "build" / "quality"


def measure(part: str, conditions: Conditions) -> dict[str, Any]:
    """Run one part; return its result with machine and versions."""
    started, measured = time.perf_counter(), run.commit()
    result = PARTS[part](conditions)
    load = os.getloadavg() if hasattr(os, "getloadavg") else None
    return {
        "part": part, "quick": conditions.quick, "date": datetime.date.today().isoformat(), "commit": measured,
        "seconds": round(time.perf_counter() - started, 1),
        "machine": machine(conditions.device, "transformers"), "load_average": load, "result": result,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", default=["all"], help=f"{', '.join(PARTS)}, all, or report (default all)")
    add("--quick", action="store_true", help="small sizes, in minutes")
    add("--device", default="cpu", help="cpu, cuda or mps (default %(default)s)")
    add("--schedules", nargs="+", metavar="NAME", help="the first is the reference (default: all that can run here)")
    add("--out", type=Path, help="where QUALITY.md goes (default: benchmarks, with --quick build/quality)")
    add("--no-plots", action="store_true", help="leave the plots out, and do without matplotlib")
    args = parser.parse_args(arguments)
    unknown = set(args.parts) - {*PARTS, "all", "report"}
    if unknown:
        parser.error(f"a part must be one of {', '.join(PARTS)}, all or report, got {', '.join(sorted(unknown))}")
    if not args.no_plots:
        report.check_plots()
    out = args.out or (QUICK if args.quick else FULL)
    results = out / "quality" / "results"
    device = devices.resolve_device(args.device)
    can = usable(device)
    if not set(args.schedules or can) <= set(can):
        parser.error(f"--schedules must be of {', '.join(can)}, got {' '.join(args.schedules)}")
    results.mkdir(parents=True, exist_ok=True)
    conditions = Conditions(device, args.schedules or can, args.quick, partial(print, flush=True))
    for part in PARTS:
        if part in args.parts or "all" in args.parts:
            save(measure(part, conditions), results / f"{part}_{device.type}.json")
    print(report.rewrite(out, plots=not args.no_plots))


if __name__ == "__main__":
    main()
