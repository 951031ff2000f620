"""Laws of everything compiled for MPS, held by running the generated Metal: see `cases` for the table."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import pytest

from ..oracle import GRADIENT_TOLERANCE, TOLERANCE
from . import cases
from .jobs import Job, Reports, job
from .native_functions import implemented_for_mps
from .operations import OPERATIONS

FUNCTIONS = {name: job("function", name=name) for name in cases.functions()}
QUICK = ("mlstm.step_",)  # operations run the others, in one dtype


def marks(name: str) -> tuple[Any, ...]:
    """Return the marks of a function's tests."""
    return () if name in QUICK else (pytest.mark.slow,)


EVERY_FUNCTION = pytest.mark.parametrize(("name", "wanted"), [
    pytest.param(name, wanted, id=name, marks=marks(name)) for name, wanted in FUNCTIONS.items()
])
EVERY_DTYPE = pytest.mark.parametrize("dtype", cases.DTYPES)
OPERATION_JOBS = [
    pytest.param(name, dtype, job("operation", name=name, dtype=dtype), id=f"{name} {dtype}",
                 marks=() if dtype == run.quick else pytest.mark.slow)
    for name, run in OPERATIONS.items() for dtype in cases.DTYPES
]
EVERY_OPERATION = pytest.mark.parametrize(("name", "dtype", "wanted"), OPERATION_JOBS)
MODELS = [
    pytest.param(dtype, job("model", dtype=dtype, tokens=70), id=dtype, marks=pytest.mark.slow)
    for dtype in ("bfloat16", "float32")
]


def calls(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [call for dtype in cases.DTYPES for call in report[dtype]]


def check_launches(launches: list[dict[str, Any]]) -> None:
    for launch in launches:
        assert launch["buffers"] <= cases.MAX_BUFFERS, launch["source"]
        assert math.prod(launch["group"] or [1]) <= cases.MAX_GROUP, launch["source"]
        assert launch["statistics"]["divergent_barriers"] == 0, launch["source"]
        assert launch["statistics"]["divergent_simd"] == 0, launch["source"]
        assert launch["statistics"]["out_of_bounds"] == 0, launch["source"]
        assert launch["statistics"]["racing_accesses"] == 0, launch["source"]


def owing(names: Collection[str], reason: str) -> list[Any]:
    """Return every function as a parameter, those in `names` expected to fail until their debt is paid."""
    owed = pytest.mark.xfail(strict=True, raises=AssertionError, reason=reason)
    return [pytest.param(name, wanted, id=name, marks=(*marks(name), owed) if name in names else marks(name))
            for name, wanted in FUNCTIONS.items()]


def budget(name: str, call: dict[str, Any]) -> int:
    """Return the most kernels that a call of a function in the table may launch."""
    expected = cases.EXPECTED[name]
    return expected.kernels * (call["sizes"]["T"] if expected.per_token else 1)


def check_errors(call: dict[str, Any], dtype: str) -> None:
    """Hold a call to its oracle in every order; where its numbers are ill-conditioned, eager PyTorch errs as much."""
    tolerances = GRADIENT_TOLERANCE if call["function"].endswith(("gradient", "backward_")) else TOLERANCE
    allowed = tolerances[cases.DTYPES[dtype]]
    for errors in call["errors"].values():
        for error, eager in zip(errors, call["eager_errors"], strict=True):
            assert error <= allowed + 2 * eager, (call["function"], call["sizes"], call["errors"])


def report_of(reports: Reports, name: str, wanted: Job) -> dict[str, Any]:
    """Return the report of an op; skip where its schedule does not exist."""
    report = reports(wanted)
    if "unavailable" in report:
        pytest.skip(f"schedule {OPERATIONS[name].schedule} on mps: {report['unavailable']}")
    return report


def test_every_function_is_in_the_table() -> None:
    assert FUNCTIONS.keys() <= cases.EXPECTED.keys()


@EVERY_FUNCTION
@EVERY_DTYPE
def test_result_is_the_float64_oracle_in_every_order(reports: Reports, name: str, wanted: Job, dtype: str) -> None:
    found = reports(wanted)[dtype]
    assert found
    for call in found:
        assert call["errors"].keys() == {"0", "1", "2"}
        check_errors(call, dtype)


@EVERY_FUNCTION
def test_kernels_stay_inside_what_metal_allows(reports: Reports, name: str, wanted: Job) -> None:
    for call in calls(reports(wanted)):
        assert call["launches"]
        check_launches(call["launches"])


@EVERY_FUNCTION
def test_no_kernel_reads_a_lane_that_is_not_there(reports: Reports, name: str, wanted: Job) -> None:
    for call in calls(reports(wanted)):
        assert all(launch["statistics"]["absent_lane_reads"] == 0 for launch in call["launches"])


@pytest.mark.parametrize(("name", "wanted"), owing(cases.OVER_BUDGET, "launches more kernels than its budget"))
def test_launches_are_within_budget(reports: Reports, name: str, wanted: Job) -> None:
    for call in calls(reports(wanted)):
        assert len(call["launches"]) <= budget(name, call)


@pytest.mark.slow
@pytest.mark.parametrize("name", cases.OVER_BUDGET)
def test_debt_is_what_is_said_and_no_more(reports: Reports, name: str) -> None:
    report = reports(FUNCTIONS[name])
    found = {dtype: {len(call["launches"]) for call in report[dtype]} for dtype in cases.DTYPES}
    assert found == {dtype: {count} for dtype, count in cases.OVER_BUDGET[name].items()}


@EVERY_FUNCTION
def test_aten_calls_are_those_listed_and_run_on_mps(reports: Reports, name: str, wanted: Job) -> None:
    for call in calls(reports(wanted)):
        assert call["aten"] == cases.EXPECTED[name].aten
        assert all(implemented_for_mps(op) for op in call["aten"])
        assert call["round_trips"] == []


@EVERY_OPERATION
def test_op_equals_the_recurrence(reports: Reports, name: str, dtype: str, wanted: Job) -> None:
    report = report_of(reports, name, wanted)
    tolerances = GRADIENT_TOLERANCE if OPERATIONS[name].gradient else TOLERANCE
    for error, eager in zip(report["errors"], report["eager_errors"], strict=True):
        assert error <= tolerances[cases.DTYPES[dtype]] + 2 * eager


@EVERY_OPERATION
def test_op_compiles_only_what_the_table_lists_and_each_is_exact(
    reports: Reports, name: str, dtype: str, wanted: Job
) -> None:
    report = report_of(reports, name, wanted)
    assert report["calls"]
    for call in report["calls"]:
        assert call["function"] in cases.EXPECTED
        check_errors(call, dtype)
        check_launches(call["launches"])
        if not any(name.startswith(call["function"]) for name in cases.OVER_BUDGET):
            assert len(call["launches"]) <= budget(call["function"], call)


@EVERY_OPERATION
def test_op_stays_on_the_device(reports: Reports, name: str, dtype: str, wanted: Job) -> None:
    report, run = report_of(reports, name, wanted), OPERATIONS[name]
    assert report["round_trips"] == []
    assert report["uploads"] == []
    backward = cases.OP_ATEN.get(f"{run.op}_backward", set()) if run.gradient else set()
    assert set(report["aten"]) <= cases.OP_ATEN[run.op] | backward
    assert all(implemented_for_mps(op) for op in report["aten"])


def submissions_of_a_segment(reports: Reports) -> tuple[int, int]:
    """Return the kernels and the ATen calls of a forward segment, beside the fresh state that a call makes once."""
    report = reports(job("operation", name="one segment", dtype=OPERATIONS["one segment"].quick))
    return report["kernels"], sum(count for op, count in report["aten"].items() if op != "aten::zero_")


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="see cases.SEGMENT_EXCESS")
def test_segment_is_within_budget(reports: Reports) -> None:
    kernels, aten = submissions_of_a_segment(reports)
    assert kernels <= cases.SEGMENT
    assert aten <= cases.SEGMENT_ATEN


def test_segment_takes_what_is_said_and_no_more(reports: Reports) -> None:
    assert submissions_of_a_segment(reports) == cases.SEGMENT_EXCESS


@pytest.mark.parametrize("wanted", [
    pytest.param(job("threads", name="step", count=3), id="step"),
    pytest.param(job("threads", name="tail", count=2), id="tail", marks=pytest.mark.slow),
    pytest.param(job("threads", name="queued", count=2), id="queued", marks=pytest.mark.slow),
])
def test_threads_never_submit_at_once(reports: Reports, wanted: Job) -> None:
    report = reports(wanted)
    overlapped, threads, submissions = report["locked"]
    assert submissions > 0
    assert threads > 1
    assert overlapped == 0
    assert report["results_equal"]
    assert report["unlocked"][0] > 0  # the same without the lock: the law can fail


@pytest.mark.parametrize(("dtype", "wanted"), MODELS)
def test_patched_transformers_model_equals_its_peer(reports: Reports, dtype: str, wanted: Job) -> None:
    pytest.importorskip("transformers")
    report = reports(wanted)
    assert report["error"] <= TOLERANCE[cases.DTYPES[dtype]] + 2 * report["eager_error"]
    assert report["round_trips"] == []
    assert all(implemented_for_mps(op) for op in report["aten"])
    functions = {"mlstm.chunked", "mlstm.segment_factors", "traced.Forward", "decoding._capped"}
    assert {call["function"] for call in report["calls"]} == functions
    for call in report["calls"]:
        check_launches(call["launches"])
