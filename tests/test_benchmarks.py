"""Laws of the benchmarks: the report has every measurement, and the reason for every missing one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import curves, floors, mlstm, plots, results, run, timing
from benchmarks.suites import SUITES, Part, on
from benchmarks.timing import spread
from torch_xlstm_ops.runtime.devices import energy

CASE = {
    "kind": "prefill", "shape": {"B": 1, "NH": 4, "DHQK": 64, "DHHV": 64, "S": 2048}, "dtype": "float32",
    "ms": {"ours": 1.5, "theirs 64": 3.0, "theirs 128": 4.0}, "spread": {"ours": 0.02}, "best_peer": "theirs 64",
    "ratio": 0.5, "floor_ms": 1.0, "to_floor": 1.5, "tokens_per_s": 1365333, "no_part": {"triton": "needs CUDA"},
}
MACHINE = {"device": "cpu", "threads": 2}
KEPT = {
    "suite": "mlstm_prefill", "device": "cpu", "commit": "abc", "date": "2026-11-23", "quick": False,
    "parts": [{"module": "mlstm", "result": {"machine": MACHINE, "cases": [CASE]}},
              {"module": "mlstm", "error": "it broke"}],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(results, "REPORT", tmp_path / "RESULTS.md")
    return tmp_path


def test_the_report_has_the_stored_results(folder):
    pytest.importorskip("matplotlib")
    results.keep(KEPT)
    results.write()
    text = (folder / "RESULTS.md").read_text()
    assert text.startswith(results.INTRODUCTION)
    assert text[len(results.INTRODUCTION):] == """

## mlstm_prefill, cpu

device cpu, threads 2; 2026-11-23, commit abc.

| what | ours | spread | to the floor | best peer | ratio |
| --- | --- | --- | --- | --- | --- |
| prefill (1, 4, 64, 64), S 2,048, float32 | 1.500 ms, 1,365,333 tokens/s | 2.0% | 1.50 | 3.000 ms, theirs 64 | 0.500 |

![times beside the best other package](results/mlstm_prefill.cpu.png)

- mlstm: it broke
- triton: needs CUDA
"""
    assert (folder / "results" / "mlstm_prefill.cpu.png").stat().st_size > 1000


def test_lines_are_drawn_where_no_row_has_a_bar(folder):
    pytest.importorskip("matplotlib")
    losses = {"patched": [3.0, 2.0, 1.5], "transformers": [3.0, 2.0, 1.5]}
    model = {"batch": 1, "length": 64, "steps": 3}
    results.keep({**KEPT, "suite": "training", "parts": [
        {"module": "train_step", "error": "it broke"},
        {"module": "loss_curve", "result": {"machine": MACHINE, "model": model, "losses": losses}},
    ]})
    scaled = [{**CASE, "kind": "scaling", "shape": CASE["shape"] | {"S": S}} for S in (2048, 8192)]
    results.keep({**KEPT, "suite": "scaling", "parts": [
        {"module": "mlstm", "result": {"machine": MACHINE, "cases": scaled}},
        {"module": "schedules", "error": "it broke"},
    ]})
    results.write()
    text = (folder / "RESULTS.md").read_text()
    assert "![bits a byte, mean of 10 steps](results/training.cpu.png)" in text
    assert "![tokens a second (higher is better)](results/scaling.cpu.png)" in text
    for name in ("training.cpu.png", "scaling.cpu.png"):
        assert (folder / "results" / name).stat().st_size > 1000


def _scaling(tokens, ms):
    shape = {**CASE["shape"], "S": tokens}
    return {**CASE, "kind": "scaling", "shape": shape, "ms": ms, "ranked": [name for name in ms if name != "ours"]}


def test_a_line_of_throughput_takes_the_best_chunk_size_of_each_length():
    cases = [_scaling(512, {"ours": 1.0, "theirs 64": 4.0, "theirs 128": 2.0}),
             _scaling(1024, {"ours": 2.0, "theirs 64": 4.0, "theirs 128": 8.0}), _scaling(4096, {"ours": 4.0})]
    (panel,) = curves.throughput({"cases": cases})
    assert [line.name for line in panel.lines] == ["ours", "theirs"]
    assert panel.lines[0][1:] == ([512, 1024, 4096], [512e3, 512e3, 1024e3], True)
    assert panel.lines[1][1:] == ([512, 1024], [256e3, 256e3], False)
    assert not [*curves.throughput({"cases": cases[:1]})]


def test_waits_add_up_and_losses_are_means_of_their_steps():
    cases = {name: [{"tokens": 512, "wait_s": 2.0}, {"tokens": 777, "wait_s": wait}]
             for name, wait in (("xlstm", -0.1), ("inductor", 3.0))}
    (panel,) = curves.waits({"cases": cases})
    assert [line.y for line in panel.lines] == [[2.0, 2.0], [2.0, 5.0]]
    assert panel.ticks == ["512", "777"]
    (panel,) = curves.losses({"model": {"batch": 1, "length": 64}, "losses": {"patched": [*range(12)]}})
    assert panel.lines == [curves.Line("patched", [10, 12], [4.5, 10.5], ours=True)]


def test_a_plot_has_lines_and_bars(tmp_path):
    pytest.importorskip("matplotlib")
    panels = [*curves.throughput({"cases": [_scaling(S, {"ours": 1.0, "theirs": 90.0}) for S in (512, 8192)]})]
    rows = [*on("mlstm_prefill", "mps")[0].rows({"cases": [CASE]})]
    heights = []
    for number, (bars, lines) in enumerate(((rows, []), (rows, panels), ([], panels))):
        file = tmp_path / f"{number}.png"
        assert plots.suite(file, "title", bars, lines)
        heights.append(int.from_bytes(file.read_bytes()[20:24], "big"))  # of a PNG, in pixels
    assert heights[1] > max(heights[0], heights[2])
    assert not plots.suite(tmp_path / "none.png", "title", [], [])


def test_a_failed_part_is_reported(folder):
    part = Part("mlstm", {"cpu": ["nothing-of-this-kind"]}, [], lambda result: [])
    assert "nothing-of-this-kind" in run.run(part, "cpu", False)["error"]


@pytest.mark.slow
def test_a_part_that_ends_early_keeps_its_measurements():
    arguments = ["step", "--seconds", "0.1", "--shapes", "1,4,64,64,1", "1,4,64"]
    part = Part("mlstm", {"cpu": arguments}, [], lambda result: [])
    found = run.run(part, "cpu", False)
    assert "Shape" in found["error"]
    assert [case["shape"]["DHQK"] for case in found["result"]["cases"]] == [64]


def test_a_suite_has_the_parts_that_a_device_can_run():
    steps, others = (part.arguments["cuda"] for part in on("mlstm_step", "cuda"))
    assert (steps[0], others[:2]) == ("step", ["called", "captured"])
    assert [part.arguments["cpu"][0] for part in on("mlstm_step", "cpu")] == ["step"]


def test_spread_is_half_the_quartiles_distance():
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx((4.5 - 1.5) / 2 / 3)


def test_a_lower_bound_is_bytes_or_products():
    at = floors.Rates(bytes_per_ms=1e6, flops_per_ms=1e6)
    shape = mlstm.Shape(2, 3, 8, 16, 100)
    state, streams = 6 * (8 * 16 + 8 + 1) * 4, 6 * (8 + 8 + 16 + 16) * 2
    assert floors.step_ms(shape, torch.bfloat16, at) == pytest.approx((2 * state + streams) / 1e6)
    products = 600 * 2 * (32 * 8 + 32 * 16 + 2 * 8 * 16)
    assert floors.sequence_ms(shape, torch.float32, 32, at) == pytest.approx(products / 1e6)
    assert floors.sequence_ms(shape, torch.float32, 32, floors.Rates(1, 1e6)) == 600 * 48 * 4


def test_wrong_results_are_excluded():
    wanted = torch.ones(1, 1, 4, 2, dtype=torch.float64)
    contenders = {"right": lambda x: (x,), "wrong": lambda x: (2 * x,), "absent": "not installed"}
    usable, out = mlstm.admitted(contenders, [torch.ones(1, 1, 4, 2)], [wanted], 1e-4)
    assert list(usable) == ["right"]
    assert out == {"wrong": "it is 1.0e+00 from the recurrence", "absent": "not installed"}


@pytest.mark.slow
def test_gradients_that_leave_the_normaliser_out_are_named(monkeypatch):
    simpler = mlstm._constant_normaliser
    contenders = {"simpler": simpler, "wrong": lambda *args: (2 * simpler(*args)[0],)}
    monkeypatch.setattr(mlstm.peers, "sequences", lambda device, dtype: contenders)
    shape = mlstm.Shape(1, 2, 16, 16, 32)
    found = mlstm.measure("train", shape, torch.float32, torch.device("cpu"), 0.01)
    assert found["constant_normaliser"] == ["simpler"]
    assert found["best_peer"] == "simpler"
    assert "from the recurrence" in found["no_part"]["wrong"]


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_runs(suite, tmp_path):
    file = tmp_path / "found.json"
    command = [sys.executable, "-m", "benchmarks.run", suite, "--quick", "--device", "cpu", "--json", str(file)]
    subprocess.run(command, check=True, cwd=run.ROOT, timeout=1700)
    (found,) = json.loads(file.read_text())
    assert [*results.rows(found)]


def test_energy_is_a_row_of_its_own_where_it_is_counted_and_a_reason_elsewhere() -> None:
    (part,) = on("mlstm_prefill", "mps")
    counted = {**CASE, "joules": {"ours": 0.002048, "theirs 64": 0.004096}, "no_joules": None}
    *_, row = part.rows({"cases": [counted]})
    assert (row.what[:17], row.ours, row.peer, row.ratio) == (
        "energy of prefill", "1 uJ a token", "2 uJ a token, theirs 64", 0.5)
    (row,) = part.rows({"cases": [{**CASE, "joules": {}, "no_joules": "nothing counts"}]})
    assert row.no_part["energy"] == "nothing counts"


def test_joules_are_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    used = [0.0]

    class Counter:
        def __init__(self, device: torch.device) -> None:
            pass

        def read(self) -> float:
            return used[0]

    def call() -> None:
        used[0] += 3.0

    monkeypatch.setattr(timing, "EnergyCounter", Counter)
    assert timing.joules({"a": call, "b": lambda: None}, torch.device("cpu"), 0.002) == ({"a": 3.0, "b": 0.0}, None)
    monkeypatch.undo()
    if energy.missing(torch.device("cpu")):
        assert timing.joules({"a": call}, torch.device("cpu"), 0.1) == ({}, energy.missing(torch.device("cpu")))


def test_a_quantity_is_a_number_and_its_unit():
    assert plots.quantity("27.5 uJ a token") == (27.5, "uJ")
    assert plots.quantity("250 us") == (0.25, "ms")
