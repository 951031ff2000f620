"""Laws of output that cannot be written: one line and exit status 1, or it works; never a traceback."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli_models import model_directory
from tests.forked import CLOSED, UNREAD, Forked
from torch_xlstm_ops.cli.generation.prompt_text import prompt_text
from torch_xlstm_ops.cli.shared.errors import BadInput

__all__ = ["model_directory"]  # a fixture
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")]
MODULE = ("-m", "torch_xlstm_ops")
LINE = "xlstm-ops: error: could not read or write "


def command(*arguments: object, shell: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `xlstm-ops` in a shell, with redirections; return what it left."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", **environment}
    env.pop("PYTHONUNBUFFERED", None)  # output that cannot be written is left in a buffer
    words = [sys.executable, "-m", "torch_xlstm_ops", *map(str, arguments)]
    return subprocess.run(["bash", "-c", f'"$@" {shell}', "bash", *words], capture_output=True, text=True, env=env,
                          timeout=300)


def commands(model: Path, folder: Path) -> dict[str, list[object]]:
    (folder / "pool").mkdir()
    (folder / "hi.py").write_text("print('hi')\n")
    return {
        "version": ["--version"], "help": ["--help"], "info": ["info"],
        "cache": ["cache", "ls", "--pool", folder / "pool"],
        "check": ["check", "--device", "cpu", "--seconds", 0], "run": ["run", folder / "hi.py"],
        "generate": ["generate", "--model", model, "--no-patch", "--max-new-tokens", 3, "--prompt", "a"],
    }


@pytest.mark.parametrize("name", ["info", "cache", "check", "generate", "version", "help"])
def test_a_full_output_is_one_line(name: str, model_directory: Path, forked: Forked, tmp_path: Path) -> None:
    done = forked.run(*MODULE, *commands(model_directory, tmp_path)[name], folder=tmp_path, stdout="/dev/full")
    assert "Traceback" not in done.stderr
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1] == LINE + "the output: No space left on device"


@pytest.mark.parametrize("name", ["info", "cache", "check", "generate", "run"])
@pytest.mark.parametrize(("stdout", "stderr"), [
    (UNREAD, ""), ("", "/dev/full"), (CLOSED, ""), ("", CLOSED), (CLOSED, CLOSED),
])
def test_output_that_nobody_reads_is_no_traceback(
    name: str, stdout: str, stderr: str, model_directory: Path, forked: Forked, tmp_path: Path
) -> None:
    done = forked.run(*MODULE, *commands(model_directory, tmp_path)[name], folder=tmp_path, stdout=stdout,
                      stderr=stderr)
    assert "Traceback" not in done.stderr + done.stdout
    assert done.returncode in (0, 1)


def test_a_message_that_cannot_be_written_keeps_the_status(forked: Forked, tmp_path: Path) -> None:
    done = forked.run(*MODULE, "generate", "--model", tmp_path / "none", folder=tmp_path, stderr="/dev/full")
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize("shell", [">/dev/full", "| true", "2>/dev/full", ">&-", "2>&-", ">&- 2>&-"])
def test_an_interpreter_that_starts_without_outputs_shows_no_traceback(shell: str, tmp_path: Path) -> None:
    """The shell's redirections are there before Python starts, not from a fork on."""
    (tmp_path / "pool").mkdir()
    done = command("cache", "ls", "--pool", tmp_path / "pool", shell=shell)
    assert "Traceback" not in done.stderr + done.stdout
    assert done.returncode in (0, 1)


def test_a_prompt_in_utf_8_is_read_in_any_locale() -> None:
    def read(prompt: str) -> object:
        return prompt_text(argparse.Namespace(prompt=prompt, prompt_file=None))

    assert read("caf\u00e9") == read("caf\udcc3\udca9") == "caf\u00e9"  # the latter as ASCII locales decode it
    with pytest.raises(BadInput, match="--prompt must be UTF-8 text, got 'caf"):
        read("caf\udce9")


def test_a_locale_that_is_not_utf_8_is_no_traceback(model_directory: Path) -> None:
    done = command("generate", "--model", model_directory, "--no-patch", "--quiet", "--max-new-tokens", 3, "--prompt",
                   "caf\u00e9", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 1  # transformers itself opens files in the encoding of the locale
    assert (done.returncode, bool(done.stderr)) in ((0, False), (2, True))


@pytest.mark.parametrize("flags", [("--trace",), ("--no-patch", "--stats-log")], ids=lambda flags: flags[-1])
def test_a_full_disk_keeps_the_old_file(flags: tuple[str, ...], model_directory: Path, tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    old.write_text("old")
    code = ("import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (16, 16)); sys.argv[0] = 'xlstm-ops'; "
            "from torch_xlstm_ops.cli import main; sys.exit(main(sys.argv[1:]))")
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    arguments = ["generate", "--model", model_directory, "--max-new-tokens", 3, "--prompt", "a", *flags, old]
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], env=env, timeout=300,
                          capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1] == f"{LINE}{old}: File too large"
    assert old.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]
