"""Laws of `xlstm-ops run`: the script runs as Python would run it, and what it imports is patched as it comes in."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parameters import tail
from torch_xlstm_ops import cli

SCRIPT = """
import sys
print(__name__, sys.argv, sys.path[0])
print("imported before:", "transformers" in sys.modules)
from transformers.models.xlstm import modeling_xlstm
print("patched:", modeling_xlstm.xLSTMCache.__init__.__wrapped__ is not None)
{end}
"""


def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("transformers")
    command = [sys.executable, "-m", "torch_xlstm_ops", "run", *arguments]
    found = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True,
                           timeout=300)
    assert "Warning" not in found.stderr
    return found


def script(directory: Path, end: str = "") -> str:
    path = directory / "here" / "script.py"
    path.parent.mkdir()
    path.write_text(SCRIPT.format(end=end))
    return "here/script.py"


def test_a_script_is_patched_and_sees_what_python_shows(tmp_path: Path) -> None:
    done = run("--report", "--only", "transformers", script(tmp_path), "one", "--report", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shown, before, patched = done.stdout.splitlines()
    assert shown == f"__main__ ['here/script.py', 'one', '--report'] {tmp_path}/here"
    assert (before, patched) == ("imported before: False", "patched: True")
    assert "modeling_xlstm.xLSTMCache.__init__: states stay float32" in done.stderr


@pytest.mark.slow
def test_a_module_is_run_by_name(tmp_path: Path) -> None:
    script(tmp_path)
    done = run("-m", "here.script", "one", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "patched: True" in done.stdout
    assert f"'one'] {tmp_path}\n" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("end", "status"), [("sys.exit(5)", 5), ("raise KeyError('mine')", 1)])
def test_its_end_is_its_own(tmp_path: Path, end: str, status: int) -> None:
    done = run(script(tmp_path, end), cwd=tmp_path)
    assert done.returncode == status
    assert status == 5 or "KeyError: 'mine'" in done.stderr


@pytest.mark.parametrize(("value", "patched"), tail([("auto", True), ("flashrnn", False), ("transformers", True),
                                                      ("", False)]))
def test_the_environment_alone_patches_a_program_that_imports_us(tmp_path: Path, value: str, patched: bool) -> None:
    pytest.importorskip("transformers")
    program = """
import importlib.util, sys, torch_xlstm_ops
assert "transformers" not in sys.modules
assert importlib.util.find_spec("transformers.models.xlstm.modeling_xlstm")
from transformers.models.xlstm.modeling_xlstm import xLSTMCache
print(hasattr(xLSTMCache.__init__, "__wrapped__"))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "XLSTM_OPS_PATCH": value}, timeout=300)
    assert done.stdout == f"{patched}\n", done.stderr


@pytest.mark.parametrize(("arguments", "message"), [
    (["run", "nowhere.py"], "SCRIPT must be a Python file, got nowhere.py"),
    (["run", "-m", "no_such_package.at_all"], "-m must be followed by a module that can be imported, got no_such_pack"),
    (["run", "--only", "keras", __file__], "--only: a package to patch must be one of transformers, .*, got 'keras'"),
    (["run"], "the following arguments are required: SCRIPT"),
])
def test_bad_input_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("xlstm-ops: error: ")
    assert error.count("\n") == 1
    assert re.search(message, error)
