"""Laws of devices: a name resolves or raises with the reason; memory and events are right on the CPU."""

from __future__ import annotations

import sys
import threading
import time

import pytest
import torch
from expecttest import assert_expected_inline

from torch_xlstm_ops.runtime import devices

CPU = torch.device("cpu")


def _mps(monkeypatch: pytest.MonkeyPatch, *, platform: str, available: bool, built: bool, recent: bool) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: available)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: built)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: recent)


@pytest.mark.parametrize(("value", "on"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_relaxed_arithmetic_is_seen(monkeypatch: pytest.MonkeyPatch, value: str | None, on: bool) -> None:
    monkeypatch.delenv("PYTORCH_MPS_FAST_MATH", raising=False)
    if value is not None:
        monkeypatch.setenv("PYTORCH_MPS_FAST_MATH", value)
    assert devices.mps_fast_math() is on


def test_each_reason_against_mps_has_one_text(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = []
    for platform, available, built, recent in (
        ("linux", False, False, False),
        ("darwin", False, False, True),
        ("darwin", False, True, False),
        ("darwin", False, True, True),
        ("darwin", True, True, True),
    ):
        _mps(monkeypatch, platform=platform, available=available, built=built, recent=recent)
        reasons.append(devices.mps_missing())
    monkeypatch.delattr(torch.mps, "compile_shader")
    reasons.append(devices.mps_missing())
    assert_expected_inline("\n".join(map(str, reasons)), """\
MPS needs macOS, and this is linux
this torch was built without MPS
MPS needs macOS 14.0 or newer
Metal shows no device to this process
None
this torch cannot compile for MPS: 2.11 or newer can""")


def test_resolve_refuses_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    _mps(monkeypatch, platform="linux", available=False, built=False, recent=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    messages = []
    for name, kind in (("mps", RuntimeError), ("cuda", RuntimeError), ("gpu", ValueError), ("cuda:1", ValueError)):
        with pytest.raises(kind) as caught:
            devices.resolve_device(name)
        messages.append(str(caught.value))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    messages.append(str(devices.missing("cuda")))
    assert_expected_inline("\n".join(messages), """\
device mps cannot be used: MPS needs macOS, and this is linux
device cuda cannot be used: this torch was built without CUDA
device must be one of auto, cpu, cuda, mps, got 'gpu'
device must be one of auto, cpu, cuda, mps, got 'cuda:1'
CUDA shows no device to this process""")


@pytest.mark.parametrize(("cuda", "mps", "chosen"), [(0, 0, "cpu"), (0, 1, "mps"), (1, 0, "cuda"), (1, 1, "cuda")])
def test_auto_takes_cuda_then_mps_then_cpu(monkeypatch: pytest.MonkeyPatch, cuda: int, mps: int, chosen: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(mps))
    assert devices.resolve_device("auto") == torch.device(chosen)
    assert devices.resolve_device() == torch.device(chosen)


@pytest.mark.parametrize(("value", "expected"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_fallback_is_reported(monkeypatch: pytest.MonkeyPatch, value: str | None, expected: bool) -> None:
    monkeypatch.delenv("PYTORCH_ENABLE_MPS_FALLBACK", raising=False)
    if value is not None:
        monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", value)
    assert devices.mps_fallback() is expected


def test_mps_streams_are_detected_not_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    mps = torch.device("mps")
    monkeypatch.delattr(torch.mps, "Stream", raising=False)
    assert not devices.has_streams(mps)
    monkeypatch.setattr(torch.mps, "Stream", object, raising=False)
    assert devices.has_streams(mps)
    assert not devices.has_streams(CPU)


def test_submission_excludes_other_threads_on_mps_alone() -> None:
    def free() -> bool:
        taken: list[bool] = []
        thread = threading.Thread(target=lambda: taken.append(devices.mps_lock.acquire(blocking=False)))
        thread.start()
        thread.join(60)
        return taken[0]

    with devices.submission(CPU), devices.submission(CPU):
        pass
    with devices.submission(torch.device("mps")), devices.submission(torch.device("mps")):
        assert not free()


def test_cpu_events_are_finished_clock_readings() -> None:
    start, end = devices.event(CPU, timing=True), devices.event(CPU, timing=True)
    start.record()
    time.sleep(0.01)
    end.record()
    end.synchronize()
    assert end.query()
    assert 10 <= start.elapsed_time(end) < 1000


def test_cpu_memory_grows_with_what_is_held() -> None:
    before = devices.memory(CPU)
    held = torch.ones(256 << 20, dtype=torch.uint8)  # more than malloc ever takes from memory freed before
    after = devices.memory(CPU)
    assert before.used is not None
    assert after.used is not None
    assert after.peak is not None
    assert after.budget is not None
    assert after.used - before.used > held.numel() // 2
    assert after.used <= after.peak * 1.01 <= after.budget * 1.01


def test_report_has_every_kind_and_memory_exactly_where_a_device_is() -> None:
    rows = devices.report()
    assert [row.kind for row in rows] == ["cpu", "cuda", "mps"]
    assert all((row.missing is None) == (row.memory is not None) == bool(row.names) for row in rows)
