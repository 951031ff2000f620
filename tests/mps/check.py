"""Runs `xlstm-ops check` on the emulated device, a part of its rows in one process."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from torch_xlstm_ops import cli
from torch_xlstm_ops.cli.checking import cases, model, probes
from torch_xlstm_ops.cli.checking import run as running
from torch_xlstm_ops.cli.commands import check as command
from torch_xlstm_ops.runtime import devices

from .cases import DTYPES

GENERATED = 4  # tokens of generate(), each of which takes seconds here


def check(part: str, dtype: str) -> dict[str, Any]:
    """Run the command without a limit of time on the rows of a part in a dtype, each timed once."""
    command.PROBES = probes.PROBES if part == "torch" else ()
    command.CASES = cases.CASES if part == "operators" else ()
    command.SIZES = cases.SIZES if part == "sizes" else ()
    command.DTYPES = (DTYPES[dtype],)
    tolerances = {known: allowed for known, allowed in model.DTYPES.items() if known == DTYPES[dtype]}
    model.DTYPES = tolerances if part == "model" else {}
    model.GENERATED = GENERATED
    running.median_ms = devices.timed
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "check.json"
        status = cli.main(["check", "--device", "mps", "--json", str(path), "--seconds", "inf"])
        report = json.loads(path.read_text())
    return {"status": status, "rows": report["results"], "seconds": time.perf_counter() - began}
