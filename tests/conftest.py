"""What every test starts from: signals, environment, profiles of the drawn tests, the order of files, seeds."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Background jobs of a shell start with Ctrl-C ignored, and would pass that on to each process that a test starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if "PYTEST_XDIST_WORKER" in os.environ:  # processes share the cores; read where torch is loaded, by their children too
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a thread that waits must sleep, not spin

import hypothesis
import pytest
import torch

from tests import branches
from tests.forked import forked as forked
from tests.ray_cluster import ray_cluster as ray_cluster

hypothesis.settings.register_profile("quick", max_examples=10, deadline=None, derandomize=True)
hypothesis.settings.register_profile("ci", max_examples=50, deadline=None, derandomize=True)
hypothesis.settings.register_profile("fuzz", max_examples=2000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("XLSTM_TEST_PROFILE", "quick"))

# No test, nor a process that one starts, sees plans, settings, a Ray cluster, or a terminal of the user's.
TERMINAL = ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
for name in [name for name in os.environ if name.startswith("XLSTM_OPS_") or name in ("RAY_ADDRESS", *TERMINAL)]:
    del os.environ[name]
# Names of Ray's sockets are in it, which must be short.
os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="xlstm-ray-", dir="/tmp" if Path("/tmp").is_dir() else None)
os.environ.setdefault("XLSTM_TEST_CACHE", os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache"))
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="xlstm-ops-tests-")


def remove_folders() -> None:
    """Remove what this process made for its tests."""
    for variable in ("RAY_TMPDIR", "XDG_CACHE_HOME"):
        shutil.rmtree(os.environ[variable], ignore_errors=True)


atexit.register(remove_folders)

# Files whose tests take longest, which two processes must start first.
LONGEST = (
    "test_kernels", "test_laws_values", "test_mlstm_ops", "test_backend_transformers", "test_ray", "test_backend_peers",
    "test_parallel", "test_derivatives", "test_backend", "test_run", "test_patch_branches", "test_patch_transformers",
    "test_queued", "test_slstm", "test_memory", "test_examples", "test_interrupts", "test_check", "test_ray_private",
    "test_torch_internals", "test_no_compiler", "test_forks", "test_kernel_store", "test_cli_output",
)


def pytest_configure(config: pytest.Config) -> None:
    """Have xdist hand files out in our order, not by their number of tests."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_unconfigure() -> None:
    """Remove folders even where xdist ends the process at once."""
    remove_folders()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark drawn tests, and start the longest files first."""
    for item in items:
        if getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
            item.add_marker(pytest.mark.drawn)
    place = {name: at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(autouse=True, scope="session")
def _compile_here() -> None:
    """Have operators in this process compile what they need, not load what another test compiled."""
    from torch_xlstm_ops.runtime import kernel_store

    kernel_store.follow(lambda: None)


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


@pytest.fixture
def small_chunks() -> Iterator[None]:
    """Have a call that names no chunk size take that of most tests, whose kernels are there."""
    from torch_xlstm_ops import config

    with config.use(chunk_size=16):
        yield


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
def compiles(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Count compiles: the functions that were compiled, in order."""
    from torch_xlstm_ops.runtime import compiler

    count: list[object] = []
    original = compiler._compile
    monkeypatch.setattr(compiler, "_compile", lambda *args: count.append(args[0]) or original(*args))
    return count


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Start and end without compiled frames, and count from zero."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


branches.choose()
