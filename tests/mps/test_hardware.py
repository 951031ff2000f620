"""The operators on a real MPS device, where there is one: no emulator."""

from __future__ import annotations

import pytest
import torch

from torch_xlstm_ops.cli.checking.cases import CASES, SIZES, Case
from torch_xlstm_ops.cli.checking.run import check
from torch_xlstm_ops.runtime import devices

MISSING = devices.missing("mps")
EVERY = [(case, dtype) for case in (*CASES, *SIZES) for dtype in case.dtypes]


@pytest.mark.skipif(MISSING is not None, reason=f"no MPS device: {MISSING}")
@pytest.mark.parametrize(("case", "dtype"), EVERY, ids=[f"{case.name} {dtype}" for case, dtype in EVERY])
def test_an_operator_equals_the_recurrence(case: Case, dtype: torch.dtype) -> None:
    found = check(case, dtype, torch.device("mps"), end=float("inf"))
    assert found.failure == "", found
