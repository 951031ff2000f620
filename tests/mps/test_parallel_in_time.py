"""The sLSTM parallel in time on MPS: a few launches, whatever the number of tokens, with the recurrence's results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ..oracle import TOLERANCE
from . import cases
from .jobs import Job, Reports, job
from .test_kernels import check_launches

TEXT = (Path(__file__).parents[2] / "torch_xlstm_ops/docs/mps.md").read_text()
TOKENS, MOST = 2048, 80  # submissions of a forward pass
TABLE = {"bfloat16": (8, 31, 21), "float16": (10, 37, 23), "float32": (15, 52, 24)}  # rounds, kernels, other
MOST_BACK = {"bfloat16": 260, "float16": 290, "float32": 370}  # submissions of a gradient
FORWARD, BACKWARD = (
    [pytest.param(dtype, job("parallel_in_time", tokens=TOKENS, dtype=dtype, reset=False, floor=0.0, gradient=gradient),
                  id=dtype) for dtype in TABLE]
    for gradient in (False, True)
)
MASKED = [
    pytest.param("bfloat16", job("parallel_in_time", tokens=201, dtype="bfloat16", reset=True, floor=0.5,
                                 gradient=gradient), id="gradient" if gradient else "forward")
    for gradient in (False, True)
]


def check(report: dict[str, Any], dtype: str) -> None:
    check_launches(report["launches"])
    assert report["fell_back"] == 0
    assert len(report["round_trips"]) == 1  # the certificate
    for error, eager in zip(report["errors"], report["eager_errors"], strict=True):
        assert error <= TOLERANCE[cases.DTYPES[dtype]] + 2 * eager


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "wanted"), FORWARD)
def test_a_sequence_is_one_window_of_few_launches(reports: Reports, dtype: str, wanted: Job) -> None:
    report = reports(wanted)
    check(report, dtype)
    kernels, other = len(report["launches"]), sum(report["aten"].values())
    assert report["windows"] == 1
    assert (report["rounds"], kernels, other) == TABLE[dtype]
    assert kernels + other <= MOST


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "wanted"), BACKWARD)
def test_a_gradient_is_one_window_of_few_launches(reports: Reports, dtype: str, wanted: Job) -> None:
    report = reports(wanted)
    check(report, dtype)
    assert report["windows"] == 1
    assert len(report["launches"]) + sum(report["aten"].values()) <= MOST_BACK[dtype]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "wanted"), MASKED)
def test_resets_padding_and_a_floor_stay_inside_what_metal_allows(
    reports: Reports, dtype: str, wanted: Job
) -> None:
    check(reports(wanted), dtype)


def test_the_document_says_the_numbers() -> None:
    for dtype, (rounds, kernels, other) in TABLE.items():
        assert f"| {dtype} | {rounds} | {kernels} | {other} | {kernels + other} |" in TEXT
