"""`xlstm-ops check` on the emulated device: every row of the command passes there."""

from __future__ import annotations

import pytest

from .jobs import Job, Reports, job

pytest.importorskip("transformers")

ROWS = {  # by part and dtype
    ("torch", "float32"): 6, ("sizes", "float32"): 4, ("model", "float32"): 3, ("model", "bfloat16"): 3,
    ("operators", "float32"): 7, ("operators", "bfloat16"): 7, ("operators", "float16"): 7,
}


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "wanted"), [
    pytest.param(rows, job("check", part=part, dtype=dtype), id=f"{part} {dtype}") for (part, dtype), rows in
    ROWS.items()
])
def test_every_row_of_the_check_passes(reports: Reports, rows: int, wanted: Job) -> None:
    report = reports(wanted)
    assert report["status"] == 0
    assert [row["failure"] for row in report["rows"]] == [""] * rows
