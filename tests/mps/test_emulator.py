"""The emulator tested on what is known: hand-written kernels, and torch's reductions intact and broken on purpose."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import pytest
import torch

from .emulator import missing
from .jobs import Reports, job, run

BARRIER = "::metal::threadgroup_barrier(::metal::mem_flags::mem_threadgroup);"
SUM, MAX = "opmath_t<T> threadgroup_sum(", "T threadgroup_max("
WELFORD = "float3 threadgroup_welford_reduce("
# Where a barrier is dropped: function and which of its barriers. pytorch#184328 is the second but last of these.
DROPPED_BARRIERS = {"sum 1": (SUM, 1), "sum 2": (SUM, 2), "max 2": (MAX, 2), "welford 1": (WELFORD, 1)}
BASICS = job("basics")
MUTATIONS = [
    *(pytest.param(name, id=name) for name in DROPPED_BARRIERS),
    pytest.param("simd group count", id="simd group count"),
]


def broken(header: str, mutation: str) -> str:
    if mutation == "simd group count":
        return header.replace("idx < ((size + simdgroup_size - 1) / simdgroup_size)", "idx < (size / simdgroup_size)")
    function, count = DROPPED_BARRIERS[mutation]
    at = header.index(function)
    for _ in range(count):
        at = header.index(BARRIER, at) + 1
    return header[: at - 1] + header[at - 1 + len(BARRIER) :]


@pytest.fixture(scope="module")
def header() -> str:
    return (Path(torch.__file__).parent / "include/c10/metal/reduction_utils.h").read_text()


def test_device_is_mps_and_records_host_traffic(reports: Reports) -> None:
    report = reports(BASICS)["device"]
    assert report["device"] == "mps:0"
    assert report["available"]
    assert report["event"]
    assert "doesn't support float64" in report["float64"]
    assert report["round_trips"] == ["_local_scalar_dense", "copy_"]
    assert report["uploads"] == ["copy_"]
    assert set(report["compute"]) == {"sum", "mm"}
    assert "view" in report["views"]


def test_kernel_runs_the_same_in_every_order(reports: Reports) -> None:
    report = reports(BASICS)["shaders"]["double"]
    assert report["results"] == [[2.0 * i for i in range(64)]] * 3


@pytest.mark.parametrize("name", ["race", "race_in_threadgroup"])
def test_race_shows_in_some_order(reports: Reports, name: str) -> None:
    results = reports(BASICS)["shaders"][name]["results"]
    assert len(results) == 3
    assert any(result != results[0] for result in results)


def test_race_in_place_is_counted_and_one_thread_alone_is_none(reports: Reports) -> None:
    shaders = reports(BASICS)["shaders"]
    assert all(statistics["racing_accesses"] > 0 for statistics in shaders["race_in_place"]["statistics"])
    assert all(statistics["racing_accesses"] == 0 for statistics in shaders["double"]["statistics"])


def test_store_after_a_barrier_is_no_race(reports: Reports) -> None:
    statistics = reports(BASICS)["shaders"]["in_place_after_barrier"]["statistics"]
    assert len(statistics) == 3
    assert all(found["racing_accesses"] == 0 for found in statistics)


@pytest.mark.parametrize(("name", "message"), [
    ("out_of_bounds", "index 64 is outside a buffer of 64 elements"),
    ("divergent_barrier", "threadgroup_barrier is not reached by every thread"),
])
def test_wrong_kernel_fails(reports: Reports, name: str, message: str) -> None:
    assert message in reports(BASICS)["shaders"][name]["error"]


@pytest.mark.parametrize(("name", "message"), [
    ("texture", "cannot read parameter 'texture2d<float> in [[texture(0)]]'"),
    ("unknown_function", "no_such_function"),
    ("32_buffers", "32 buffers, Metal allows 31"),
])
def test_kernel_not_understood_names_its_saved_source(reports: Reports, name: str, message: str) -> None:
    error = reports(BASICS)["shaders"][name]["error"]
    assert message in error
    saved = [word.rstrip(":") for word in error.split() if ".metal" in word]
    assert "kernel void run" in Path(saved[0]).read_text()


@pytest.mark.slow
def test_reductions_equal_the_cpu_in_every_order(reports: Reports) -> None:
    errors = reports(job("reductions", mutation="none"))["errors"]
    assert errors.keys() == {"0", "1", "2"}
    assert all(error < 1e-4 for error in errors.values())


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_broken_reduction_is_caught(reports: Reports, header: str, mutation: str, tmp_path: Path) -> None:
    changed = tmp_path / "c10/metal/reduction_utils.h"
    changed.parent.mkdir(parents=True)
    changed.write_text(broken(header, mutation))
    assert changed.read_text() != header
    errors = run(job("reductions", mutation=mutation), MPS_EMULATOR_HEADERS=str(tmp_path))["errors"]
    assert not all(isinstance(error, float) and error < 1e-4 for error in errors.values())


def test_two_threads_without_a_lock_are_seen_to_overlap(reports: Reports) -> None:
    report = reports(BASICS)["threads"]
    assert report["threads"] == 2
    assert report["overlapped"] > 0


@pytest.mark.parametrize(("module", "name", "value", "reason"), [
    (platform, "machine", lambda: "aarch64", "x86-64 assembly, this is aarch64"),
    (shutil, "which", lambda program: None, "g++, which is not installed"),
    (torch, "__version__", "2.14.0", "written for torch 2.13, this is 2.14.0"),
])
def test_missing_names_the_reason(
    monkeypatch: pytest.MonkeyPatch, module: object, name: str, value: object, reason: str
) -> None:
    monkeypatch.setattr(module, name, value)
    assert reason in (missing() or "")
