"""``python -m tests.mps.worker TASK ARGUMENTS``: one job in a process with an MPS device; prints a JSON report."""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from collections.abc import Callable
from typing import Any

from . import emulator

# task -> module and function; imported only once the device exists.
TASKS = {
    "basics": "probes:basics",
    "reductions": "probes:reductions",
    "function": "measure:function",
    "operation": "measure:operation",
    "threads": "measure:threads",
    "model": "measure:model",
    "submissions": "submissions:submissions",
    "parallel_in_time": "parallel_in_time:parallel_in_time",
    "check": "check:check",
    "full_size": "upstream_bugs:full_size",
    "long_sums": "upstream_bugs:long_sums",
}


def main(task: str, arguments: str) -> None:
    """Run a task and print its report as the last line."""
    emulator.start()
    warnings.filterwarnings("error", message="kernels cannot be compiled")  # which would run uncompiled
    module, name = TASKS[task].split(":")
    work: Callable[..., dict[str, Any]] = getattr(importlib.import_module(f".{module}", __package__), name)
    report = work(**json.loads(arguments))
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
