"""Hold the times of a report against `benchmarks.metal_cost`'s predictions: submissions counted in the emulator."""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from torch_xlstm_ops import config
from torch_xlstm_ops.cli.checking import model
from torch_xlstm_ops.cli.checking.cases import CASES, SIZES
from torch_xlstm_ops.cli.shared.table import aligned
from torch_xlstm_ops.maths.shapes import dtype_name

SUSPICIOUS = 10.0  # measured over predicted, from where on a row is marked


def read(path: str) -> dict[str, Any]:
    """Return a report of `xlstm-ops check`. Raises ValueError for another file, OSError if it cannot be read."""
    try:
        found = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"--compare must name a JSON file of `xlstm-ops check`, got {path}: {error}") from error
    if not isinstance(found, dict) or not {"device", "system", "results"} <= found.keys():
        raise ValueError(f"--compare must name a JSON file of `xlstm-ops check`, got another in {path}")
    return found


def compare(report: dict[str, Any]) -> str:
    """Return a table of measured and predicted times, for the chip of the report or for all known ones.

    Raises RuntimeError where the predictions cannot be made: they need the checkout's emulator.
    """
    try:
        counter = importlib.import_module("benchmarks.metal_counter")
    except ImportError as error:
        raise RuntimeError(f"--compare must run in a checkout of the project, got {error}") from error
    if reason := counter.emulator.missing():
        raise RuntimeError(f"--compare cannot count submissions here: {reason}")
    counter.emulator.start()
    counter.emulator.set_dry(True)
    chip = str(report["system"].get("chip"))
    matching = [name for name in counter.CHIPS if chip.endswith(name)]
    names = matching or list(counter.CHIPS)
    measured = {(row["operator"], row["dtype"]): row["milliseconds"] for row in report["results"]}
    rows = [("operator", "dtype", "launches", "measured ms", *(f"{name} predicted" for name in names), "")]
    for operator, dtype, call in _calls({key for key, ms in measured.items() if ms is not None}):
        submissions = counter.count(call)
        predicted = [counter.predicted(submissions, counter.CHIPS[name]) * 1e3 for name in names]
        ms = measured[operator, dtype]
        far = "far from the prediction" if matching and ms > SUSPICIOUS * predicted[0] else ""
        rows.append((operator, dtype, str(len(submissions)), f"{ms:.3f}", *(f"{p:.3f}" for p in predicted), far))
    heading = f"measured on {chip}; predicted from counted work and published rates"
    return f"{heading}\n{aligned(rows)}"


def _calls(wanted: set[tuple[str, str]]) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Yield the calls of a report that can be counted, on the emulated device."""
    device = torch.device("mps")
    for case in (*CASES, *SIZES):
        for dtype in case.dtypes:
            if (case.name, dtype_name(dtype)) in wanted:
                args = [t.to(device) for t in case.draw(dtype)]
                with config.use(**case.settings):
                    yield case.name, dtype_name(dtype), functools.partial(case.results, case.call, args)
    if model.missing() is not None:
        return
    with model.patched(), torch.no_grad():
        for dtype in model.DTYPES:
            for phase in model.phases(dtype, device):
                if (f"model: {phase.name}", dtype_name(dtype)) in wanted:
                    yield f"model: {phase.name}", dtype_name(dtype), phase.call
