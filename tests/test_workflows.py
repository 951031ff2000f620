"""Laws of the workflows: they cannot run here, so what can be known of them without running is checked."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from torch_xlstm_ops import cli

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / ".github/workflows").glob("*.yml"))
EXPRESSION = re.compile(r"\$\{\{(.*?)\}\}")
CONTEXTS = {"matrix", "strategy", "vars", "cancelled"}  # what expressions may read: no secret


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text())
    found["on"] = found.pop(True, found.get("on"))  # YAML 1.1 reads `on` as true
    return found


def commands(workflow: dict[str, Any]) -> list[str]:
    return [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_workflow_only_reads_and_ends(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["on"].keys() <= {"push", "pull_request", "schedule", "workflow_dispatch"}
    for job in workflow["jobs"].values():
        assert 0 < job["timeout-minutes"] <= 120
        assert all(("run" in step) != ("uses" in step) for step in job["steps"])
        assert all(re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"]) for step in job["steps"] if "uses" in step)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_expressions_read_what_a_workflow_defines(path: Path) -> None:
    for job in read(path)["jobs"].values():
        matrix = job.get("strategy", {}).get("matrix", {})
        keys = set(matrix) - {"include"} | {key for row in matrix.get("include", []) for key in row}
        for expression in EXPRESSION.findall(str(job)):
            words = re.findall(r"([a-zA-Z_]+)(?:\.([\w-]+))?", re.sub(r"'[^']*'", "", expression))
            assert {word for word, _ in words} <= CONTEXTS, expression
            assert {key for word, key in words if word == "matrix"} <= keys, expression


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_commands_are_shell_and_flags_exist(path: Path) -> None:
    for command in commands(read(path)):
        line = EXPRESSION.sub("x", command)
        subprocess.run(["bash", "-n", "-c", line], check=True, timeout=60)
        words = shlex.split(line)
        if words[0] == "xlstm-ops":
            cli.parser().parse_args(words[1:])
        if words[0].startswith("."):
            assert (ROOT / words[0]).is_file()


def test_mps_is_checked_on_two_systems_by_hand_and_every_week() -> None:
    workflow = read(ROOT / ".github/workflows/mps.yml")
    assert workflow["on"].keys() == {"schedule", "workflow_dispatch"}
    assert workflow["on"]["schedule"][0]["cron"].split()[-1] != "*"
    job = workflow["jobs"]["mps"]
    assert job["strategy"]["matrix"] == {"os": ["macos-15", "macos-26"], "torch": ["2.13.*", "2.14.*"]}
    assert job["continue-on-error"] == "${{ matrix.os == 'macos-26' }}"
