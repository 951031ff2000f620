"""Profiles of the drawn tests, and the seeds of the others."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # processes share the cores: a thread that waits must sleep, not spin
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read where torch is loaded

import hypothesis
import pytest
import torch

from tests import branches
from tests.ray_cluster import ray_cluster as ray_cluster

hypothesis.settings.register_profile("dev", max_examples=20, deadline=None)
hypothesis.settings.register_profile("ci", max_examples=50, deadline=None, derandomize=True)
hypothesis.settings.register_profile("fuzz", max_examples=2000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("XLSTM_TEST_PROFILE", "ci" if os.environ.get("CI") else "dev"))

# No test, nor a process that one starts, sees plans that the user has tuned; what tests build stays where it was.
os.environ.setdefault("XLSTM_TEST_CACHE", os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache"))
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="xlstm-ops-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Keep tiny products off other cores, where waiting for a busy one costs far more than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command line in this process; return its status, stdout and stderr."""
    from torch_xlstm_ops import cli

    def run(*arguments: object) -> tuple[int, str, str]:
        status = cli.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Start and end without compiled frames, and count from zero."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


branches.choose()
