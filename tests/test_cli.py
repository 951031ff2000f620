"""Laws of `info` and of processes: what they print, and where."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from expecttest import assert_expected_inline

import torch_xlstm_ops
from tests.cli_models import (
    PROMPT,
    clean_settings,
    loaded,
    model_directory,
    reference,
    write,
)
from tests.conftest import Command
from torch_xlstm_ops import config, schedules
from torch_xlstm_ops.cli.commands import info
from torch_xlstm_ops.cli.shared import loading
from torch_xlstm_ops.cli.shared.quiet import third_party_messages_hidden
from torch_xlstm_ops.patch import releases, upstream
from torch_xlstm_ops.runtime import devices, torch_internals
from torch_xlstm_ops.runtime.extras import how_to_install
from torch_xlstm_ops.runtime.torch_internals.need import Status

__all__ = ["clean_settings", "loaded", "model_directory", "write"]  # fixtures
pytestmark = pytest.mark.usefixtures("one_thread")


def test_info_as_json_has_the_sections_of_the_text(run: Command) -> None:
    status, out, err = run("info", "--device", "cpu", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["versions"]["torch_xlstm_ops"] == torch_xlstm_ops.__version__
    assert {"system", "devices", "schedules on cpu", "configuration", "private APIs of torch"} <= found.keys()


def test_completion_knows_the_commands(run: Command, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit, match="0"):
        run("--completion", "bash")
    assert "generate" in capsys.readouterr().out
    status, out, err = run("--completion", "cmd")
    assert (status, out) == (2, "")
    assert "--completion must be one of" in err


def test_info_tells_devices_versions_schedules_and_sources(
    run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons = {config.Schedule.RAY: f"ray is not installed: {how_to_install('ray')}"}
    monkeypatch.setattr(schedules, "unavailable", lambda schedule, device: reasons.get(schedule), raising=False)
    monkeypatch.setattr(info, "PACKAGES", ("no_such_package",))
    table = {name: upstream.Upstream("", f"{name}-ts", (1, 4), newest, name) for name, newest in
             (("no_such_peer", (1, 4)), ("there", (1, 6)), ("fork", (1, 4)), ("copied", (1, 4)))}
    monkeypatch.setattr(upstream, "PACKAGES", table)
    monkeypatch.setattr(releases, "installed", lambda name: name != "no_such_peer")
    versions = {"there": releases.Found("1.5.2", "there-ts"), "fork": releases.Found("0.3", "my-fork"),
                "copied": releases.Found(None, None)}
    monkeypatch.setattr(releases, "found", versions.get)
    monkeypatch.setattr(info.platform, "python_version", lambda: "3.11.0")
    there = devices.Capabilities("cpu", None, ("8 threads",), False, False, devices.Memory(2**29, 2**30, None))
    gone = devices.Capabilities("mps", "MPS needs macOS, and this is linux", (), False, False, None)
    monkeypatch.setattr(devices, "report", lambda: (there, gone))
    needs = (Status("hooks", "", None, "speed"),
             Status("traced", "", "torch.moved is not there", "one graph a call"))
    monkeypatch.setattr(torch_internals, "status", lambda: needs)
    monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    monkeypatch.setattr(info.torch_internals, "compiler_missing", lambda: None)
    monkeypatch.setattr(info.energy, "missing", lambda device: None)
    monkeypatch.setenv("XLSTM_MPS_WORKERS", "6")
    status, out, err = run("info", "--device", "cpu", "--chunk-size", "64")
    assert (status, err) == (0, "")
    assert_expected_inline(out.replace(torch_xlstm_ops.__version__, "VERSION"), """\
versions
  python           3.11.0
  torch_xlstm_ops  VERSION
  no_such_package  not installed

supported packages
  no_such_peer-ts  not installed   tested with 1.4
  there-ts         1.5.2           tested with 1.4 to 1.6
  fork-ts          0.3 of my-fork  tested with 1.4
  copied-ts        unknown         tested with 1.4

devices
  cpu                          8 threads, no streams, no events, memory 0.50 GiB of unknown
  mps                          MPS needs macOS, and this is linux
  C++ compiler                 found
  energy counter               found
  PYTORCH_ENABLE_MPS_FALLBACK  on: MPS operations may run on the CPU unseen

schedules on cpu
  auto       can run
  inductor   can run
  queued     can run
  ray        cannot run: ray is not installed: run pip install -e ".[ray]" in a checkout of torch_xlstm_ops
  recurrent  can run

configuration
  schedule        auto              default
  chunk_size      64                flag --chunk-size
  segment         the plan chooses  default
  heads_per_band  the plan chooses  default
  workers         6                 environment variable XLSTM_MPS_WORKERS
  streams         the plan chooses  default
  window          the plan chooses  default
  trace           off               default
  mem_fraction    the plan chooses  default
  ray_address     none              default
  tuned           on                default
  slstm_schedule  auto              default
  kernels         on                default
  cuda_graphs     on                default
  tune            off               default

tuned plans
  none: xlstm-ops tune finds them

kernels
  off

private APIs of torch
  hooks   native
  traced  fallback: torch.moved is not there; one graph a call
""")


def _process(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "torch_xlstm_ops", *arguments], cwd=folder, capture_output=True,
                          text=True, env={**os.environ, **environment}, timeout=300)


def test_a_process_ends_with_one_line_and_status_2(tmp_path: Path) -> None:
    done = _process("generate", folder=tmp_path, XLSTM_OPS_WORKER="2")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert done.stderr.endswith("got XLSTM_OPS_WORKER\n")


@pytest.mark.smoke
def test_a_process_writes_text_to_a_pipe(model_directory: Path, loaded: loading.Loaded, tmp_path: Path) -> None:
    done = _process("generate", "--model", str(model_directory), "--prompt", PROMPT, "--no-patch",
                    "--max-new-tokens", "8", folder=tmp_path, PYTHONIOENCODING="ascii", OMP_NUM_THREADS="1")
    assert done.returncode == 0
    assert done.stdout == reference(loaded, 8).encode("ascii", "replace").decode() + "\n"
    assert done.stderr.splitlines()[:2] == ["loading tiny", "warming up"]
    assert {line[:1] for line in done.stderr.splitlines()[2:]} <= set("+|")
    assert os.listdir(tmp_path) == []


def test_a_quiet_process_writes_the_text_alone(
    model_directory: Path, loaded: loading.Loaded, tmp_path: Path
) -> None:
    done = _process("generate", "--quiet", "--model", str(model_directory), "--prompt", PROMPT, "--no-patch",
                    "--max-new-tokens", "8", "--trace", "t.csv", "--stats-log", "s.csv", folder=tmp_path,
                    OMP_NUM_THREADS="1", PYTHONIOENCODING="utf-8")
    assert (done.returncode, done.stdout, done.stderr) == (0, reference(loaded, 8) + "\n", "")
    assert sorted(os.listdir(tmp_path)) == ["s.csv", "t.csv"]


@pytest.mark.parametrize("quiet", [False, True])
def test_a_terminal_shows_the_text_and_unless_quiet_the_table(
    write: Command, loaded: loading.Loaded, monkeypatch: pytest.MonkeyPatch, quiet: bool
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _, out, err = write("--max-new-tokens", 8, *(["--quiet"] if quiet else []))
    text, _, table = out.partition("\n┌")
    assert text.removesuffix("\n") == reference(loaded, 8)
    assert ("ended by" in table, err) == ((False, "") if quiet else (True, "loading tiny\nwarming up\n"))


@pytest.mark.slow  # it compiles everything anew
@pytest.mark.parametrize("flags", [(), ("--quiet",)], ids=["talking", "quiet"])
def test_a_first_run_on_a_machine_shows_no_warning(tmp_path: Path, flags: tuple[str, ...]) -> None:
    home = {name: str(tmp_path / name) for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "TORCHINDUCTOR_CACHE_DIR")}
    done = _process("generate", "--max-new-tokens", "3", *flags, folder=tmp_path, **home)
    lines = [line for line in done.stderr.splitlines() if line[:1] not in "┌│└├"]
    assert done.returncode == 0
    assert lines == ([] if flags else ["loading demo_model", "compiling, once on this machine"])
    assert done.stdout.strip()


def test_the_messages_of_other_packages_are_hidden_by_their_text_and_for_a_while(
    caplog: pytest.LogCaptureFixture
) -> None:
    advice = "TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled. Consider"
    builder = logging.getLogger("torch.utils.cpp_extension")
    with third_party_messages_hidden():
        warnings.warn(advice, UserWarning, stacklevel=1)
        builder.warning("No CUDA runtime is found, using CUDA_HOME=%r", "/usr")
        with pytest.warns(UserWarning, match="of another kind"):
            warnings.warn("of another kind", UserWarning, stacklevel=1)
        builder.warning("of another kind")
    with pytest.warns(UserWarning, match="TensorFloat32"):
        warnings.warn(advice, UserWarning, stacklevel=1)
    builder.warning("No CUDA runtime is found")
    assert caplog.messages == ["of another kind", "No CUDA runtime is found"]
