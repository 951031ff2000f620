"""`xlstm-ops check --compare`: times that a Mac measured beside predictions that are counted here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .emulator.requirements import missing
from .jobs import REPOSITORY

REPORT = {
    "device": {"kind": "mps"}, "system": {"chip": "Apple M2"},
    "results": [
        {"operator": "mlstm_step", "dtype": "float32", "milliseconds": 0.02},
        {"operator": "mlstm_step", "dtype": "float16", "milliseconds": None},
        {"operator": "slstm_step", "dtype": "float32", "milliseconds": 100.0},
    ],
}


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_measured_times_stand_beside_predictions_for_their_chip(tmp_path: Path) -> None:
    path = tmp_path / "mps.json"
    path.write_text(json.dumps(REPORT))
    command = [sys.executable, "-m", "torch_xlstm_ops", "check", "--compare", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=500, check=True)
    heading, names, *rows = done.stdout.splitlines()
    assert "Apple M2" in heading
    assert names.split()[-3:] == ["ms", "M2", "predicted"]
    assert [row.split()[0] for row in rows] == ["mlstm_step", "slstm_step"]
    assert [row.split()[2] for row in rows] == ["2", "1"]  # launches
    assert ["far from" in row for row in rows] == [False, True]
