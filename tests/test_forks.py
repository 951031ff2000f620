"""Laws of forked children: operators work in them on one thread, whatever the parent did, and never wait forever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forking needs POSIX")
SECONDS = 400  # for a process, and for what it forks

START = """
import os, sys, threading, time, warnings
import torch
from torch_xlstm_ops import mlstm_chunkwise
torch.set_num_threads(2)

def call(S=2048, schedule=None):
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 3, S, 8).requires_grad_().unbind()
    v, (igate, fgate) = torch.randn(2, 3, S, 16), torch.randn(2, 2, 3, S)
    h, _ = mlstm_chunkwise(q, k, v, igate, fgate, chunk_size=16, schedule=schedule)
    return [h.detach(), *torch.autograd.grad(h.sum(), k)]

def in_child(work):
    child = os.fork()
    if child == 0:
        try:
            work()
            sys.stdout.flush()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
            os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def same(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)

a = torch.randn(400, 400)
a @ a  # plain torch has started its threads
"""
AFTER_THE_PARENT = START + """
wanted = call(), call(schedule="queued")
def child():
    assert torch.get_num_threads() == 1
    same(call(), wanted[0])
    same(call(schedule="queued"), wanted[1])
    assert in_child(lambda: same(call(), wanted[0])) == 0
assert in_child(child) == 0
assert torch.get_num_threads() == 2
same(call(), wanted[0])
"""
COMPILES_TOO = START + """
from torch_xlstm_ops import mlstm_step

def step(D):
    one = torch.ones(1, 1, D)
    return mlstm_step(one, one, one, one[..., :1], one[..., :1], torch.zeros(1, 1, D, D), 0 * one, one[..., :1])[0]

step(8)
assert in_child(lambda: step(12)) == 0  # whose kernel is nowhere yet
"""
AFTER_IMPORT = START + """
def child():
    assert torch.get_num_threads() == 2  # importing the package has changed nothing
    call()
    assert torch.get_num_threads() == 1
assert in_child(child) == 0
assert torch.get_num_threads() == 2
"""
WHILE_A_THREAD_COMPILES = START + """
from torch_xlstm_ops.runtime import compiler
thread = threading.Thread(target=call)
thread.start()
while not compiler._families:
    time.sleep(0.001)
time.sleep(0.2)

def child():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found.extend(call())
    assert not compiler._forked_from_compiling or any("start processes by spawn" in str(w.message) for w in told)
    assert all(t.isfinite().all() for t in found)

found = []
assert in_child(child) == 0
thread.join()
"""
DATA_LOADER = START + """
from torch.utils.data import DataLoader

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, at):
        return call()[0]

def collate(found):
    same(call(), [found[0], call()[1]])
    return torch.stack(found)

wanted = call()
for persistent in (False, True):
    loader = DataLoader(Data(), 2, num_workers=2, multiprocessing_context="fork", collate_fn=collate,
                        persistent_workers=persistent, timeout=300)
    for batch in loader:
        for found in batch:
            torch.testing.assert_close(found, wanted[0])
"""
WITH_RAY = START + """
import ray
from torch_xlstm_ops.schedules.ray import cluster, private_ray
assert cluster.connect()
def child():
    try:
        call(schedule="ray")
    except RuntimeError as error:
        assert "start it by spawn" in str(error), error
    else:
        raise AssertionError("a forked child used its parent's Ray")
    call()
    cluster.close()
    private_ray.remove()
assert in_child(child) == 0
folder = private_ray._folder
assert folder.exists() and ray.is_initialized()
os.environ["XLSTM_OPS_WORKERS"] = "1"
call(schedule="ray")
cluster.close()
assert not folder.exists()
"""


def finish(code: str, tmp_path: Path, **environment: str) -> None:
    """Run a program in a session of its own; end it, and all that it forked, if it does not end in time."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **environment}
    with open(tmp_path / "output", "w+") as output:
        process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=output,
                                   stderr=subprocess.STDOUT, start_new_session=True)
        until = time.monotonic() + SECONDS
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)
        output.seek(0)
        assert process.returncode == 0, output.read()


@pytest.mark.slow
def test_a_child_computes_what_its_parent_did(tmp_path: Path) -> None:
    finish(AFTER_THE_PARENT, tmp_path)


@pytest.mark.slow
def test_a_child_compiles_as_its_parent_did(tmp_path: Path) -> None:
    finish(COMPILES_TOO, tmp_path, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"), XLSTM_OPS_KERNELS="off")


@pytest.mark.slow
def test_a_child_of_a_process_that_called_nothing_has_its_threads_until_it_does(tmp_path: Path) -> None:
    finish(AFTER_IMPORT, tmp_path)


@pytest.mark.slow
def test_workers_of_a_data_loader_call_operators(tmp_path: Path) -> None:
    finish(DATA_LOADER, tmp_path)


@pytest.mark.slow
def test_a_child_forked_while_a_thread_compiles_compiles_by_itself(tmp_path: Path) -> None:
    for _ in range(3):
        finish(WHILE_A_THREAD_COMPILES, tmp_path)


@pytest.mark.slow
@pytest.mark.ray
def test_a_child_is_told_that_ray_is_its_parents(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    finish(WITH_RAY, tmp_path)
