"""Laws around bugs of MPS that would give wrong numbers silently: see `maths.products` for each with its issue."""

from __future__ import annotations

from typing import Any

import pytest

from torch_xlstm_ops.maths.products import MOST_TERMS

from ..oracle import GRADIENT_TOLERANCE
from . import cases
from .jobs import Job, Reports, job

FULL_SIZE = [
    pytest.param(job("full_size", op=op), id=op, marks=pytest.mark.gate if op == "slstm" else ())
    for op in ("mlstm", "slstm")
]
LONG_SUMS = [
    pytest.param(dtype, job("long_sums", dtype=dtype), id=dtype, marks=() if dtype == "float32" else pytest.mark.slow)
    for dtype in ("float32", "bfloat16")
]


def check_products(report: dict[str, Any]) -> None:
    assert report["products"]
    for name, terms, owns_result in report["products"]:
        assert terms <= MOST_TERMS, f"{name} sums {terms} terms"
        assert owns_result, f"{name} writes into a slice or a strided view"
        assert "linear" not in name


@pytest.mark.slow
@pytest.mark.parametrize("wanted", FULL_SIZE)
def test_products_are_those_that_mps_computes_correctly(reports: Reports, wanted: Job) -> None:
    report = reports(wanted)
    check_products(report)
    assert report["host"] == []


@pytest.mark.parametrize(("dtype", "wanted"), LONG_SUMS)
def test_split_sums_equal_whole_ones(reports: Reports, dtype: str, wanted: Job) -> None:
    for name, case in reports(wanted).items():
        assert case["error"] <= GRADIENT_TOLERANCE[cases.DTYPES[dtype]] + 2 * case["eager"], name
        check_products(case)
