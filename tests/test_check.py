"""`xlstm-ops check`: right operators pass, a wrong one fails, and one that raises does not hide the others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_xlstm_ops import cli
from torch_xlstm_ops.cli.checking import machine
from torch_xlstm_ops.cli.commands import check
from torch_xlstm_ops.patch import upstream

TOKENS = [case for case in check.CASES if case.name in ("mlstm_step", "slstm_step")]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Check the two steps in float32 only."""
    monkeypatch.setattr(check, "DTYPES", (torch.float32,))
    monkeypatch.setattr(check, "CASES", TOKENS)
    monkeypatch.setattr(check, "SIZES", ())
    monkeypatch.setattr(check, "PROBES", ())
    monkeypatch.setattr(check, "check_model", lambda device, end: iter(()))
    return monkeypatch


def checked(path: Path, seconds: float = 600) -> tuple[int, dict[str, Any]]:
    status = cli.main(["check", "--device", "cpu", "--json", str(path), "--seconds", str(seconds)])
    return status, json.loads(path.read_text())


@pytest.mark.smoke
def test_right_operators_pass(quick: pytest.MonkeyPatch, tmp_path: Path) -> None:
    status, report = checked(tmp_path / "check.json")
    assert (status, report["passed"]) == (0, True)
    assert all(0 < row["error"] <= row["tolerance"] and row["milliseconds"] > 0 for row in report["results"])


@pytest.mark.slow  # it compiles everything
def test_every_operator_is_within_tolerance(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(check, "DTYPES", (torch.float32,))
    status, report = checked(tmp_path / "check.json")
    assert status == 0, report["results"]
    assert report["passed"]
    names = {case.name for case in (*check.CASES, *check.SIZES, *check.PROBES)}
    model = {f"model: {phase}" for phase in ("prompt", "token", "generate")}
    rows = report["results"]
    assert {row["operator"] for row in rows} == names | model
    assert all(row["error"] <= row["tolerance"] for row in rows if row["operator"] != "model: generate")
    assert all(row["meaning"] and row["milliseconds"] > 0 and row["first_call_s"] > 0 for row in rows)
    assert all(row["tokens_per_s"] > 0 for row in rows if row["operator"] in model)
    assert report["versions"]["torch"] == torch.__version__


def test_the_report_names_every_supported_package() -> None:
    versions = check.report(torch.device("cpu"), [], {}, {})["versions"]
    assert {peer.distribution for peer in upstream.PACKAGES.values()} <= versions.keys()
    assert versions["torch"] == torch.__version__


def test_a_wrong_result_fails(quick: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def wrong(*args: Tensor) -> Sequence[Tensor]:
        h, *state = TOKENS[0].call(*args)
        return [h * 1.001, *state]

    quick.setattr(check, "CASES", [TOKENS[0]._replace(call=wrong), TOKENS[1]])
    status, report = checked(tmp_path / "check.json")
    assert status == 1
    assert [row["failure"] for row in report["results"]] == ["out of tolerance", ""]


def test_a_result_that_is_no_number_fails(quick: pytest.MonkeyPatch, tmp_path: Path) -> None:
    quick.setattr(check, "CASES", [TOKENS[1]._replace(call=lambda *args: [t * torch.nan for t in args[3:7]])])
    status, report = checked(tmp_path / "check.json")
    assert (status, report["passed"]) == (1, False)
    assert report["results"][0]["error"] is None


def test_an_operator_that_raises_is_recorded_and_the_rest_go_on(quick: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*args: Tensor) -> Sequence[Tensor]:
        raise RuntimeError("no such kernel")

    quick.setattr(check, "CASES", [TOKENS[0]._replace(call=broken), TOKENS[1]])
    status, report = checked(tmp_path / "check.json")
    assert status == 1
    assert [row["failure"] for row in report["results"]] == ["RuntimeError: no such kernel", ""]


def test_what_does_not_fit_into_the_time_is_neither_passed_nor_failed(
    quick: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, report = checked(tmp_path / "check.json", seconds=0)
    assert status == 1
    assert all(row["failure"].startswith("not run") for row in report["results"])
    assert "cpu: 0 passed, 0 failed, 2 not run as the time was up: give a larger --seconds; " in capsys.readouterr().out


def test_the_summary_tells_failures_from_what_was_not_run() -> None:
    def results(*failures: str) -> list[check.Result]:
        return [check.Result("mlstm_step", "float32", None, 1e-5, None, failure) for failure in failures]

    assert check.counts(results("", "", "out of tolerance", "RuntimeError: no")) == "2 passed, 2 failed"
    assert check.counts(results("", "out of tolerance", check.NOT_RUN, check.NOT_RUN)) == (
        "1 passed, 1 failed, 2 not run as the time was up: give a larger --seconds")


def test_the_table_needs_no_rich(quick: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    quick.setattr(check, "find_spec", lambda name: None)
    assert cli.main(["check", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["operator", "mlstm_step", "slstm_step"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["--device", "gpu"], "device must be one of auto, cpu, cuda, mps, got 'gpu'"),
    (["--json", "no/such/file.json"], "whose directory is not there"),
])
def test_bad_input_ends_with_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_every_row_says_what_it_means_and_whose_it_is() -> None:
    every = (*check.CASES, *check.SIZES, *check.PROBES)
    assert all(case.meaning for case in every)
    assert len({case.name for case in every}) == len(every)
    assert {case.party for case in check.PROBES} == {"torch"}
    assert all(case.dtypes == (torch.float32,) for case in (*check.SIZES, *check.PROBES))


def test_probes_of_torch_pass_on_the_cpu() -> None:
    for case in check.PROBES:
        assert check.check(case, torch.float32, torch.device("cpu"), float("inf")).failure == ""


def test_a_wrong_result_names_its_party() -> None:
    def results(**failures: str) -> list[check.Result]:
        return [check.Result(name, "float32", 1.0, 1e-5, 1.0, failure, name) for name, failure in failures.items()]

    found = machine.describe(torch.device("cpu"))
    assert "WRONG" not in check.page(results(torch="", torch_xlstm_ops=""), found, {})
    alone = check.page(results(torch="", torch_xlstm_ops="out of tolerance"), found, {})
    assert "WRONG in torch_xlstm_ops" in alone
    assert "WRONG in torch:" not in alone
    both = check.page(results(torch="out of tolerance", torch_xlstm_ops="out of tolerance"), found, {})
    assert "WRONG in torch:" in both
    assert "ours may be wrong because torch is" in both


def test_the_machine_is_described_without_other_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_MPS_FAST_MATH", "0")
    monkeypatch.setenv("SOME_TOKEN", "secret")
    found = machine.describe(torch.device("cpu"))
    assert found["environment"]["PYTORCH_MPS_FAST_MATH"] == "0"
    assert "SOME_TOKEN" not in found["environment"]
    assert all(us > 0 for us in machine.launch_costs(torch.device("cpu")).values())


@pytest.mark.parametrize("text", ["no json", "[]", '{"results": []}'])
def test_another_file_cannot_be_compared(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    assert cli.main(["check", "--compare", str(path)]) == 2
    assert "--compare must name a JSON file of `xlstm-ops check`" in capsys.readouterr().err
