"""Laws of the energy counter: joules since it was made, across wraps; a reason where nothing counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from torch_xlstm_ops import config, trace
from torch_xlstm_ops.cli import main
from torch_xlstm_ops.cli.generation.meter import Meter
from torch_xlstm_ops.cli.generation.report import _joules
from torch_xlstm_ops.runtime.devices import energy
from torch_xlstm_ops.schedules.plan import Machine, Shape
from torch_xlstm_ops.tune import objective
from torch_xlstm_ops.tune.bench import Timed
from torch_xlstm_ops.tune.space import Limits, Space
from torch_xlstm_ops.tune.workloads import Workload

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


class FakeCounter:
    """Uses so many joules at each call of `use`."""

    def __init__(self) -> None:
        self.joules = 0.0

    def read(self) -> float:
        return self.joules

    def use(self, joules: float) -> None:
        self.joules += joules


@pytest.mark.parametrize(("wanted", "times_as_good"), [("time", 0.5), ("energy", 4.0), ("product", 2.0)])
def test_the_tuner_makes_its_objective_small(
    wanted: str, times_as_good: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A challenger takes twice the time and a quarter of the energy of the best so far."""
    clock, counter = [0.0], FakeCounter()

    def call(seconds: float, joules: float) -> None:
        clock[0] += seconds
        counter.use(joules)

    monkeypatch.setattr(objective.time, "perf_counter", lambda: clock[0])
    costs = objective.Costs(CPU, objective.Objective(wanted), counter)
    if wanted == "time":
        monkeypatch.setattr(objective.devices, "timed", lambda call, device: 2.0 if call is slow else 1.0)

    def slow() -> None:
        call(0.02, 1.0)

    def fast() -> None:
        call(0.01, 4.0)

    ratio = costs.measure(fast).of(costs.objective) / costs.measure(slow).of(costs.objective)
    assert ratio == pytest.approx(times_as_good)


def test_energy_is_counted_over_many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, counter = [0.0], FakeCounter()

    def call() -> None:
        clock[0] += 0.03
        counter.use(1.5)

    monkeypatch.setattr(objective.time, "perf_counter", lambda: clock[0])
    found = objective.Costs(CPU, objective.Objective.ENERGY, counter).measure(call)
    assert clock[0] >= objective.COUNTED_SECONDS
    assert found == (pytest.approx(30.0), pytest.approx(1.5))


def test_energy_is_refused_with_the_reason_where_it_is_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    with pytest.raises(RuntimeError, match="this system has no energy counter"):
        objective.Costs(CPU, objective.Objective.PRODUCT)
    pytest.importorskip("optuna")
    assert main(["tune", "--objective", "energy", "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "--objective must be time where energy is not counted, got energy: this system has no energy" in error


def test_a_plan_that_takes_longer_wins_by_less_energy() -> None:
    place = Space(Shape(4, 1024, 64, 64), CPU, Machine(2), Limits(None, 0))
    frugal = next(c for c in place.plans.values() if c.plan.chunk_size == 16 != place.default.plan.chunk_size)

    class Frugal(objective.Costs):
        def measure(self, call: object) -> objective.Cost:
            return objective.Cost(*((2.0, 1.0) if config.current().chunk_size == 16 else (1.0, 3.0)))

    work = Workload("prefill", 1024, 1024, 1.0, lambda: None, lambda: [torch.ones(2)], 1e-3)
    for aim, times_as_good in (("energy", 3.0), ("product", 1.5)):
        found = Timed(place, [work], costs=Frugal(CPU, objective.Objective(aim), FakeCounter())).measure(
            frugal, place.default, 0.01)
        assert found.times_as_fast == pytest.approx((times_as_good,) * 3)
        (timing,) = found.timings
        assert (timing.median_ms, timing.joules, timing.best_so_far_ms) == (2.0, 1.0, 1.0)
