"""Laws of `xlstm-ops tune`: its results are applied, shown and copied, and bad input is one line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

from tests.conftest import Command
from torch_xlstm_ops import cli, config, trace
from torch_xlstm_ops.api import mlstm_chunkwise
from torch_xlstm_ops.cli.commands import tune as command
from torch_xlstm_ops.cli.tuning import search
from torch_xlstm_ops.config import tuned_plans
from torch_xlstm_ops.maths.intervals import Interval
from torch_xlstm_ops.models import DEMO_MODEL
from torch_xlstm_ops.ops.mlstm import dispatch
from torch_xlstm_ops.tune import bench, workloads
from torch_xlstm_ops.tune.bench import Measured
from torch_xlstm_ops.tune.space import Candidate

CPU = torch.device("cpu")
SHAPE = ("--shape", "2,3,8,16", "--lengths", "40")


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Keep tuned plans and folders in the test's own place."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    config.reload(flags={})
    tuned_plans.forget()
    dispatch.forget()
    yield tmp_path / "torch_xlstm_ops" / "tuned.json"
    monkeypatch.undo()
    config.reload(flags={})
    tuned_plans.forget()
    dispatch.forget()


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure nothing, in no file: chunks of 16 in queued segments are the fastest."""

    def speed(candidate: Candidate) -> float:
        plan = candidate.plan
        return 1 + (plan.schedule == "queued") + (plan.chunk_size == 16) + 1 / plan.segment

    def measure(self: object, challenger: Candidate, best: Candidate | None, seconds: float) -> Measured:
        ratio = 1.0 if best is None else speed(challenger) / speed(best)
        return Measured(Interval(ratio, ratio / 1.001, ratio * 1.001), (), 0.0, None)

    monkeypatch.setattr(bench.Timed, "measure", measure)
    monkeypatch.setattr(bench.Timed, "trace", lambda self, candidate, path: None)
    stores = optuna.storages.InMemoryStorage()
    monkeypatch.setattr(search.study, "open_store", lambda path: stores)


def schedules_run(*, training: bool = False) -> set[tuple[str | None, int | None]]:
    """Return schedule and segment of the tasks of a call of SHAPE."""
    q, k = torch.randn(2, 2, 3, 40, 8)
    v, (igate, fgate) = torch.randn(2, 3, 40, 16), torch.randn(2, 2, 3, 40)
    with trace.record() as recording:
        h, _ = mlstm_chunkwise(q.requires_grad_(training), k, v, igate, fgate)
        if training:
            h.sum().backward()
    return {(entry.schedule, entry.segment) for entry in recording.entries()}


# The winner


@pytest.mark.slow
@pytest.mark.smoke
def test_auto_runs_the_best_plan(run: Command, kept: Path, chosen: None) -> None:
    assert schedules_run() == {("inductor", 0)}
    status, out, _ = run("tune", *SHAPE, "--method", "grid", "--trials", 1000)
    assert status == 0
    assert re.search(r"best +schedule queued, chunk_size 16", out)
    assert f"kept                    {kept}" in out
    found = schedules_run()
    assert {schedule for schedule, _ in found} == {"queued"}
    assert schedules_run(training=True) == {("inductor", 0)}


def test_a_training_step_has_a_tuned_plan_of_its_own(run: Command, chosen: None) -> None:
    run("tune", *SHAPE, "--phase", "train", "--method", "grid", "--trials", 1000)
    assert {schedule for schedule, _ in schedules_run(training=True)} == {"queued"}
    assert schedules_run() == {("inductor", 0)}


@pytest.mark.slow
def test_generate_uses_the_tuned_plan_and_info_shows_it(run: Command, kept: Path, chosen: None) -> None:
    prompt = "import os\n" * 4  # 40 bytes
    kind = tuned_plans.call_kind(CPU, torch.float32, 4, len(prompt), 64, 64, training=False)
    tuned_plans.store(kept, {str(kind): {"settings": {"schedule": "queued", "chunk_size": 16, "workers": 1}}})
    text = ("generate", "--prompt", prompt, "--max-new-tokens", 2)
    assert re.search(r"│ schedule +│ queued", run(*text)[2])
    assert re.search(r"│ schedule +│ inductor", run(*text, "--tuned", "off")[2])
    out = run("info", "--device", "cpu")[1]
    assert re.search(rf"kept in +{re.escape(str(kept))}\n", out)
    assert "1 of 1" in out
    assert "schedule=queued chunk_size=16 workers=1" in out


def test_a_default_that_is_as_fast_removes_an_older_tuned_plan(
    run: Command, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = tuned_plans.call_kind(CPU, torch.float32, 6, 40, 8, 16, training=False)
    tuned_plans.store(kept, {str(kind): {"settings": {"schedule": "queued"}}})
    even = Measured(Interval(1.0, 0.99, 1.01), (), 0.0, None)
    monkeypatch.setattr(bench.Timed, "measure", lambda self, challenger, best, seconds: even)
    assert "no: not better than the default beyond noise" in run("tune", *SHAPE, "--trials", 3)[1]
    assert tuned_plans.read(kept) == {}


def test_no_apply_stores_nothing(run: Command, kept: Path, chosen: None) -> None:
    assert "no, as asked" in run("tune", *SHAPE, "--trials", 5, "--no-apply")[1]
    assert not kept.exists()


def test_tuned_plans_are_exported_and_imported(run: Command, kept: Path, tmp_path: Path, chosen: None) -> None:
    run("tune", *SHAPE, "--method", "grid", "--trials", 1000)
    shared = tmp_path / "shared.json"
    assert run("tune", "--export", shared)[:2] == (0, f"1 tuned plan: {kept} -> {shared}\n")
    kept.unlink()
    tuned_plans.forget()
    dispatch.forget()
    assert schedules_run() == {("inductor", 0)}
    assert run("tune", "--import", shared)[:2] == (0, f"1 tuned plan: {shared} -> {kept}\n")
    assert {schedule for schedule, _ in schedules_run()} == {"queued"}


# Measured for real, on sizes that other tests compile


def test_a_search_measures_checks_and_keeps_every_trial(run: Command, tmp_path: Path) -> None:
    flags = ("tune", *SHAPE, "--method", "random", "--trial-seconds", 0.05, "--out", tmp_path / "out", "--phase",
             "prefill")
    status, out, err = run(*flags, "--trials", 2)
    assert status == 0
    assert "prefill 40" in out
    assert err.count(" of 2: measured") == 2
    assert run(*flags, "--trials", 2)[0] == 2
    assert run(*flags, "--trials", 3, "--resume")[0] == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "trials.jsonl").read_text().splitlines()]
    measured = [line for line in lines if line["outcome"] == "measured"]
    assert len(measured) == 3
    for line in measured:
        (timing,) = line["timings"]
        assert timing["median_ms"] > 0
        assert timing["tokens_per_second"] == pytest.approx(80 / timing["median_ms"] * 1e3)
        assert timing["error"] < 1e-5
        assert line["plan"].startswith("schedule")
        assert line["estimated_bytes"] > 0
        assert line["peak_bytes"] > 0
        events = json.loads((tmp_path / "out" / line["trace"]).read_text())["traceEvents"]
        assert any(event["name"] == "mlstm_chunkwise" for event in events)


def test_a_plan_that_computes_something_else_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    work = workloads.prefill(workloads.Sizes(2, 3, 40, 8, 16), torch.float32, CPU)
    with config.use(tuned="off"):
        wanted = work.results()
    workloads.check(wanted, wanted, work.tolerance)
    for broken in (wanted[0] * 1.001, wanted[0] * float("nan")):
        with pytest.raises(workloads.WrongResult, match="results must be within 2e-05"):
            workloads.check([broken, *wanted[1:]], wanted, work.tolerance)


def test_an_operator_that_is_not_the_recurrence_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    real = workloads.mlstm_chunkwise
    monkeypatch.setattr(workloads, "mlstm_chunkwise", lambda *args, **how: (real(*args, **how)[0] * 1.01,
                                                                            real(*args, **how)[1]))
    with pytest.raises(workloads.WrongResult):
        workloads.prefill(workloads.Sizes(2, 3, 40, 8, 16), torch.float32, CPU)


# Bad input


@pytest.mark.parametrize(("flags", "message"), [
    (("--method", "annealing"), "--method must be one of random, ga, tpe, bandit, boltzmann, grid, got 'annealing'"),
    (("--trials", "1"), "--trials must be a whole number of at least 2, got '1'"),
    (("--time-budget", "0"), "--time-budget must be a number above 0, got '0'"),
    (("--phase", "prefill=0"), "--phase must be among prefill, train, decode, first-token, each once, with weights "
                               "above 0 as in prefill=0.7,decode=0.3, got 'prefill=0'"),
    (("--phase", "prefill,prefill"), "got 'prefill,prefill'"),
    (("--phase", "sleep"), "got 'sleep'"),
    (("--lengths", "2K"), "--lengths must be whole numbers of at least 1, with commas, got '2K'"),
    (("--shape", "1,2,3"), "--shape must be four whole numbers of at least 1: B,NH,DHQK,DHHV, got '1,2,3'"),
    (("--shape", "1,4,64,64", "--phase", "decode"), "--shape must come without the phases of a model, got decode"),
    (("--schedules", "auto"), "--schedules must be among inductor, queued, ray, with commas, got 'auto'"),
    (("--device", "tpu"), "--device must be one of auto, cpu, cuda, mps, got 'tpu'"),
    (("--model", "nowhere"), "--model must be a directory of a Hugging Face xLSTM, got nowhere, which is not there"),
    (("--out", "file"), "--out must be a folder, got file, which is a file"),
    (("--export", "a", "--import", "b"), "--export must come without --import, got both"),
    (("--import", "nowhere.json"), "--import must have tuned plans to read, got no file nowhere.json"),
    (("--import", "file"), "--import: file must be JSON, got"),
    (("--export", "a.json"), "--export must have tuned plans to read, got no file"),
])
def test_bad_flags_are_one_line_and_status_2(
    run: Command, tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    (tmp_path / "file").write_text("")
    status, out, err = run("tune", *flags)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("text", ['{"name": "a package"}', "plain text", '{"version": 2, "winners": {}}'])
def test_import_and_export_replace_only_tuned_plans(
    run: Command, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    other = tmp_path / "package.json"
    other.write_text(text)
    tuned_plans.store(kept, {"a": {"settings": {"schedule": "queued"}}})
    status, out, err = run("tune", "--export", other)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"--export: {other} must be" in err
    monkeypatch.setenv("XLSTM_OPS_TUNED", str(other))
    assert run("tune", "--import", kept)[0] == 2
    assert other.read_text() == text


def test_an_import_with_a_corrupt_entry_is_refused_whole(run: Command, kept: Path, tmp_path: Path) -> None:
    good = {"settings": {"schedule": "queued"}}
    (tmp_path / "shared.json").write_text(json.dumps({"version": 1, "winners": {"a": good, "b": {"settings": {}}}}))
    status, _, err = run("tune", "--import", "shared.json")
    assert status == 2
    assert "b in shared.json must have settings with a schedule" in err
    assert not kept.exists()


@pytest.mark.parametrize(("action", "package", "extra"), [
    ("search", "optuna", "tune"), ("report", "matplotlib", "plot"), ("ablate", "optuna", "tune"),
])
def test_a_missing_package_is_named_with_its_extra(
    run: Command, monkeypatch: pytest.MonkeyPatch, action: str, package: str, extra: str
) -> None:
    real: Callable[[str], Any] = command.find_spec
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == package else real(name))
    status, out, err = run("tune", action)
    assert (status, out) == (2, "")
    assert f'needs {package}: run pip install -e ".[{extra}]" in a checkout of torch_xlstm_ops' in err


def test_missing_packages_are_named_together(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert run("tune", "report")[2] == (
        'xlstm-ops: error: tune report needs optuna, matplotlib: run pip install -e ".[tune,plot]" in a checkout of '
        'torch_xlstm_ops\n')


@pytest.mark.parametrize(("words", "shown", "hidden"), [
    ("tune", "--out --export --import --trials --phase --model --resume", ""),
    ("tune search", "--out --trials --phase --model --resume", "--export --import"),
    ("tune report", "--out", "--export --import --trials --phase --model --resume"),
    ("tune ablate", "--out --phase --model --trial-seconds", "--export --trials --resume --no-apply"),
    ("cache", "--pool --bytes --remove", ""),
    ("cache prune", "--pool --bytes", "--remove"),
    ("kernels warm", "--kernels --shape --training", "FILE --bytes --remove"),
    ("kernels export", "--kernels FILE", "--shape --bytes --remove"),
])
def test_the_help_of_an_action_shows_its_own_flags(
    words: str, shown: str, hidden: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main([*words.split(), "--help"])
    text = capsys.readouterr().out
    assert text.startswith(f"usage: xlstm-ops {words}")
    assert all(flag in text for flag in shown.split())
    assert not any(flag in text for flag in hidden.split())


def test_a_space_without_a_choice_says_so(run: Command) -> None:
    assert "the space must hold at least two plans, got 1: no setting of a plan changes" in run(
        "tune", "--phase", "decode", "--model", DEMO_MODEL)[2]
    assert "the space must hold" in run("tune", "--shape", "1,1,8,16", "--lengths", "4")[2]


def test_a_budget_too_short_for_a_trial_says_so(run: Command, kept: Path, chosen: None) -> None:
    status, _, err = run("tune", *SHAPE, "--time-budget", 1e-9)
    assert status == 2
    assert "--time-budget must be enough for one trial beside the default plan, got 1e-09 s" in err
    assert not kept.exists()


def test_a_store_of_another_version_says_so(run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                            chosen: None) -> None:
    flags = ("tune", *SHAPE, "--out", tmp_path / "out", "--trials", 3)
    assert run(*flags)[0] == 0
    assert "or come with --resume" in run(*flags)[2]
    monkeypatch.setattr(search.tuned_plans, "device_name", lambda device: "another")
    status, _, err = run(*flags, "--resume")
    assert status == 2
    assert "the store must be of this device to go on, 'another', got" in err


@pytest.mark.slow
def test_a_training_step_is_timed_with_its_gradients(run: Command, tmp_path: Path) -> None:
    status, out, _ = run("tune", *SHAPE, "--phase", "train", "--trials", 3, "--trial-seconds", 0.05, "--out",
                         tmp_path / "out")
    assert status == 0
    assert "train 40" in out
    lines = [json.loads(line) for line in (tmp_path / "out" / "trials.jsonl").read_text().splitlines()]
    assert {line["outcome"] for line in lines} <= {"measured", "repeated"}
    events = json.loads((tmp_path / "out" / lines[0]["trace"]).read_text())["traceEvents"]
    assert {event["args"]["phase"] for event in events if "args" in event and "phase" in event["args"]} == {
        "forward", "backward"}


@pytest.mark.slow
def test_a_model_is_searched_by_its_phases(run: Command, tmp_path: Path) -> None:
    status, out, _ = run("tune", "--phase", "prefill=0.6,first-token=0.2,decode=0.2", "--lengths", "64", "--trials", 3,
                         "--trial-seconds", 0.3, "--out", tmp_path / "out")
    assert status == 0
    assert all(f"{phase} 64" in out for phase in ("prefill", "first-token", "decode"))
