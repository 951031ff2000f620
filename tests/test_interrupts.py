"""Laws of Ctrl-C: the next call in the same process works, and nothing that the interrupted one started stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.processes import marked
from torch_xlstm_ops.runtime import interrupts

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="signals need POSIX")]
SECONDS = 300.0
START = """
import os, signal, sys, threading, time
from pathlib import Path
import torch
from tests import oracle
from torch_xlstm_ops import config, mlstm_chunkwise
torch.set_num_threads(1)
args = oracle.draw(oracle.Sizes(S=400))
wanted = oracle.exact(args)

def check(schedule=None):
    h, state = mlstm_chunkwise(*args, chunk_size=16, schedule=schedule)
    oracle.assert_close([h, *state], wanted, 1e-4)

def interrupted(call, ready=lambda: None):
    try:
        Path("busy").touch()
        while True:
            call()
            ready()
    except KeyboardInterrupt:
        Path("interrupted").touch()
"""
END = """
from torch_xlstm_ops.runtime import state
state.reset()  # joins what is kept between calls
left = [t.name for t in threading.enumerate() if t is not threading.main_thread() and t.name.startswith("xlstm")]
assert not left, left
Path("right").touch()
"""
COMPILING = START + """
from torch_xlstm_ops.runtime import compiler
interrupted(lambda: (check(), compiler.clear()))
check()
check("queued")
""" + END
QUEUED = START + """
check("queued")
with config.use(segment=16, heads_per_band=1, workers=2):
    interrupted(lambda: check("queued"))
    check("queued")
""" + END
RAY = START + """
os.environ["XLSTM_OPS_WORKERS"] = "1"
check("ray")
with config.use(segment=16):
    interrupted(lambda: check("ray"))
    check("ray")
from torch_xlstm_ops.schedules.ray import actor_pool
actor_pool.close()
""" + END
MASKED = START + """
check("queued")
Path("busy").touch()
until = time.monotonic() + 3
while time.monotonic() < until:
    check("queued")
check()
""" + END


def test_a_deferred_interrupt_is_raised_at_the_end_and_a_second_one_at_once() -> None:
    done: list[str] = []

    def press(times: int, then: str) -> None:
        with interrupts.deferred():
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
            done.append(then)

    with pytest.raises(KeyboardInterrupt):
        press(1, "worked on")
    with pytest.raises(KeyboardInterrupt):
        press(2, "not stopped")
    assert done == ["worked on"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def ignore() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def block() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])


def interrupt(
    code: str, folder: Path, after: float, *, cache: Path | None = None, before: Callable[[], None] | None = None
) -> set[str]:
    """Run a program, send SIGINT once it is busy and `after` seconds have passed; return the files that it made."""
    mark = f"XLSTM_TEST_MARK={os.getpid()}-{time.time_ns()}"
    environment = {**os.environ, **dict([mark.split("=")]), "PYTHONPATH": str(Path(__file__).parents[1]),
                   "OMP_NUM_THREADS": "1"}
    if cache is not None:
        environment |= dict.fromkeys(("TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME"), str(cache))  # nothing is there
    with open(folder / "output", "w+") as output:
        process = subprocess.Popen([sys.executable, "-c", code], cwd=folder, env=environment, stdout=output,
                                   stderr=subprocess.STDOUT, preexec_fn=before)
        try:
            wait_for(lambda: (folder / "busy").exists() or process.poll() is not None)
            time.sleep(after)
            process.send_signal(signal.SIGINT)
            process.wait(SECONDS)
            wait_for(lambda: not marked(mark), 60)
            assert not marked(mark), "a process stayed"
        finally:
            for pid in marked(mark):
                os.kill(pid, signal.SIGKILL)
        output.seek(0)
        assert process.returncode == 0, output.read()
    return {path.name for path in folder.iterdir()}


def wait_for(law: Callable[[], bool], seconds: float = SECONDS) -> None:
    until = time.monotonic() + seconds
    while not law() and time.monotonic() < until:
        time.sleep(0.02)


@pytest.mark.parametrize("after", [0.5, 2.0, 4.0, 8.0])
def test_after_an_interrupt_of_a_first_compile_the_next_call_works(tmp_path: Path, after: float) -> None:
    assert interrupt(COMPILING, tmp_path, after, cache=tmp_path / "cache") >= {"interrupted", "right"}


@pytest.mark.parametrize("after", [0.3, 1.0])
def test_after_an_interrupt_of_a_queued_call_the_next_call_works(tmp_path: Path, after: float) -> None:
    assert interrupt(QUEUED, tmp_path, after) >= {"interrupted", "right"}


@pytest.mark.ray
@pytest.mark.parametrize("after", [0.3, 1.0])
def test_after_an_interrupt_of_a_ray_call_the_next_call_works(tmp_path: Path, after: float) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    assert interrupt(RAY, tmp_path, after) >= {"interrupted", "right"}


@pytest.mark.parametrize("before", [ignore, block])
def test_where_interrupts_are_ignored_or_blocked_calls_go_on(tmp_path: Path, before: Callable[[], None]) -> None:
    found = interrupt(MASKED, tmp_path, 0.5, before=before)
    assert "right" in found
    assert "interrupted" not in found
