"""Laws of kernels that are kept after the call: no call waits, a fork and a kill leave whole packages or none."""

from __future__ import annotations

import itertools
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.test_kernel_store import STEP, child, kept, run_step, same, store
from torch_xlstm_ops.maths import mlstm
from torch_xlstm_ops.runtime import compiler
from torch_xlstm_ops.runtime.kernel_store import Background, Store

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kernels are kept on Linux alone")
__all__ = ["store"]  # fixtures


class Gate:
    """A job that begins, and ends when it may."""

    def __init__(self) -> None:
        self.begun, self.may_end = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.begun.set()
        assert self.may_end.wait(60)


def test_jobs_are_done_in_order_by_one_thread_that_ends() -> None:
    work, gate, done = Background(), Gate(), list[tuple[int, int]]()
    work.later(gate)
    assert gate.begun.wait(60)
    for number in range(5):
        work.later(lambda number=number: done.append((number, threading.get_ident())))
    assert not work.wait(0.01)
    assert done == []
    gate.may_end.set()
    assert work.wait(60)
    assert [number for number, _ in done] == [0, 1, 2, 3, 4]
    assert len({thread for _, thread in done} - {threading.get_ident()}) == 1
    work.later(lambda: done.append((5, 0)))
    assert work.wait(60)
    assert done[-1] == (5, 0)


def test_a_job_too_many_is_done_by_the_caller() -> None:
    work, gate, threads = Background(most=1), Gate(), list[int]()
    work.later(gate)
    assert gate.begun.wait(60)
    work.later(lambda: None)
    work.later(lambda: threads.append(threading.get_ident()))
    assert threads == [threading.get_ident()]
    gate.may_end.set()
    assert work.wait(60)


def test_jobs_after_one_that_fails_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    work, gate, told, done = Background(), Gate(), list[object](), list[int]()
    monkeypatch.setattr(threading, "excepthook", lambda about: told.append(about.exc_value))
    work.later(gate)
    assert gate.begun.wait(60)
    error = OSError("disk full")

    def fail() -> None:
        raise error

    work.later(fail)
    work.later(lambda: done.append(1))
    gate.may_end.set()
    assert work.wait(60)
    assert done == [1]
    assert told == [error]


def test_dropped_jobs_are_not_done() -> None:
    work, gate, done = Background(), Gate(), list[int]()
    work.later(gate)
    assert gate.begun.wait(60)
    work.later(lambda: done.append(1))
    threading.Timer(0.05, gate.may_end.set).start()
    work.drop()
    assert done == []
    assert work.wait(60)


def test_a_call_does_not_wait_until_its_kernel_is_packed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, original = Gate(), Store._pack
    monkeypatch.setattr(Store, "_pack", lambda *args: (gate(), original(*args)))  # type: ignore[arg-type]
    compiled = run_step()
    assert gate.begun.wait(60)
    assert store.entries() == []
    assert same(run_step(), compiled)  # served from memory
    gate.may_end.set()
    assert len(kept(store)) == 1


FORK = """
import os, threading
from torch_xlstm_ops.runtime.kernel_store import background
begun, may_end, done = threading.Event(), threading.Event(), []
background.later(lambda: (begun.set(), may_end.wait(60), done.append(1)))
background.later(lambda: done.append(2))
assert begun.wait(60)
child = os.fork()
if child == 0:
    ok = background.wait(0.0) and done == []
    background.later(lambda: done.append(3))
    os._exit(0 if ok and background.wait(60) and done == [3] else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
may_end.set()
assert background.wait(60)
assert done == [1, 2]
"""


def test_a_forked_child_begins_without_the_jobs_of_its_parent(tmp_path: Path) -> None:
    done = child(FORK, tmp_path)
    assert done.returncode == 0, done.stderr


ENDS = """
import os, signal, time
from pathlib import Path
from tests.test_kernel_store import add
from torch_xlstm_ops.runtime.kernel_store import Store, background
store = Store(Path({folder!r}))
for number in range(8):
    background.later(lambda number=number: add(store, number, size=8 << 20))
time.sleep({seconds})
{end}
"""


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 0.02])
def test_a_process_that_is_killed_while_it_packs_leaves_whole_packages(seconds: float, tmp_path: Path) -> None:
    kept_in = Store(tmp_path / "kernels")
    script = ENDS.format(folder=str(kept_in.folder), seconds=seconds, end="os.kill(os.getpid(), signal.SIGKILL)")
    assert child(script, kept_in.folder).returncode == -signal.SIGKILL
    left = kept_in.entries()
    assert len(left) < 8
    assert [kept_in.wrong(entry.key) for entry in left] == [None] * len(left)


@pytest.mark.slow
def test_a_process_that_ends_packs_what_waits(tmp_path: Path) -> None:
    kept_in = Store(tmp_path / "kernels")
    done = child(ENDS.format(folder=str(kept_in.folder), seconds=0.0, end=""), kept_in.folder)
    assert done.returncode == 0, done.stderr
    assert len(kept_in.entries()) == 8


def longest_pause(call: Callable[[], object]) -> float:
    """Return the longest time in which this thread did not run while another one made a call, as a share of the call.

    The share is 1 where the call holds the GIL throughout, on a busy machine too.
    """
    times = list[float]()

    def timed() -> None:
        began = time.perf_counter()
        call()
        times.extend((began, time.perf_counter()))

    ticks, thread = list[float](), threading.Thread(target=timed)
    thread.start()
    while thread.is_alive():
        time.sleep(0.001)
        ticks.append(time.perf_counter())
    thread.join(60)
    began, ended = times
    moments = [began, *(tick for tick in ticks if began < tick < ended), ended]
    return max(later - earlier for earlier, later in itertools.pairwise(moments)) / (ended - began)


@pytest.mark.slow
def test_the_gil_is_released_in_a_kernel_that_was_kept(store: Store, compiles: list[object]) -> None:
    """One kernel takes a hundred milliseconds; a thread that needs the GIL runs in them."""
    sizes = [(1, 2, 4), (1, 2, 4), (1, 2, 4), (1, 2, 1), (1, 2, 1), (1, 2, 4, 4), (1, 2, 4), (1, 2, 1)]
    large = [torch.randn(size).expand(400_000, *size[1:]).contiguous() for size in sizes]

    def call(release_gil: bool) -> Callable[[], object]:
        kernel = compiler.get(mlstm.step_, STEP, large, release_gil=release_gil, threads=1, eps=1e-6)
        kernel(list(large))
        return lambda: kernel(list(large))

    for release_gil in (True, False):
        call(release_gil)
    assert len(kept(store)) == 2
    compiler.clear()
    released, held = call(True), call(False)
    assert len(compiles) == 2  # both were found in the store
    # Medians: the machine may stop either thread for as long as a call takes, now and then.
    pauses = [(longest_pause(released), longest_pause(held)) for _ in range(9)]
    while_released, while_held = (statistics.median(shares) for shares in zip(*pauses, strict=True))
    assert while_held > 0.7
    assert while_released < 0.5
