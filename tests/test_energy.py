"""Laws of the energy counter: joules since it was made, across wraps; a reason where nothing counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from torch_xlstm_ops import trace
from torch_xlstm_ops.cli.generation.meter import Meter
from torch_xlstm_ops.cli.generation.report import _joules
from torch_xlstm_ops.runtime.devices import energy

CPU = torch.device("cpu")


@pytest.fixture
def zones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two packages, the first with a part of its own, whose counters wrap at 100 J."""
    for name in ("intel-rapl:0", "intel-rapl:0:0", "intel-rapl:1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "max_energy_range_uj").write_text("100000000\n")
        count(tmp_path, name, 90)
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    return tmp_path


def count(folder: Path, name: str, joules: int) -> None:
    (folder / name / "energy_uj").write_text(f"{joules * 10**6}\n")


def test_packages_add_up_and_wrap(zones: Path) -> None:
    counter = energy.EnergyCounter(CPU)
    count(zones, "intel-rapl:0", 95)
    count(zones, "intel-rapl:0:0", 99)  # part of the package above it
    assert counter.read() == pytest.approx(5)
    count(zones, "intel-rapl:0", 3)
    count(zones, "intel-rapl:1", 91)
    assert counter.read() == pytest.approx(5 + 8 + 1)


def test_a_phase_has_its_joules_a_token(zones: Path) -> None:
    meter = Meter(CPU)
    count(zones, "intel-rapl:1", 92)
    meter.start("decode")
    count(zones, "intel-rapl:1", 98)
    meter.add(12, last=True)
    row = meter.final("decode")
    assert row is not None
    assert row.joules == pytest.approx(6)
    assert _joules(row, meter) == 0.5


def test_without_a_counter_the_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    assert energy.missing(CPU) == f"this system has no energy counter of the CPU in {tmp_path}"
    assert "powermetrics" in str(energy.missing(torch.device("mps")))
    meter = Meter(CPU)
    meter.start("decode")
    meter.add(1, last=True)
    assert str(_joules(meter.final("decode"), meter)).startswith("not counted: this system")


def test_a_trace_has_the_joules_of_its_devices_until_it_ends(zones: Path) -> None:
    with trace.record(str(zones / "trace.json")) as recording, trace.span("op"):
        count(zones, "intel-rapl:1", 97)
    count(zones, "intel-rapl:1", 99)
    assert recording.energy() == {"cpu": pytest.approx(7)}
    assert recording.summary().splitlines()[-1] == "energy of cpu: 7 J, all processes together"
    assert json.loads((zones / "trace.json").read_text())["otherData"]["joules"] == {"cpu": pytest.approx(7)}


def test_a_trace_without_a_counter_has_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    with trace.record() as recording, trace.span("op"):
        pass
    assert recording.summary().splitlines()[-1].startswith("energy of cpu: not counted: this system has no")
