"""Laws of a Ray whose GCS dies: calls raise in time, the process lives, and the next call connects anew."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import marked

pytest.importorskip("ray", reason="ray is not installed")
pytestmark = [pytest.mark.ray, pytest.mark.slow,
              pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc")]
CODE = """
import os, signal, sys, threading, time
from pathlib import Path
import torch
from tests import oracle
from tests.processes import marked
from torch_xlstm_ops import mlstm_chunkwise
from torch_xlstm_ops.schedules.ray import actor_pool, cluster, gcs_watch

torch.set_num_threads(1)
args = oracle.draw(oracle.Sizes(S=40))
def call():
    return mlstm_chunkwise(*args, chunk_size=16, schedule="ray")[0]

wanted = call()
(gcs,) = [p for p in marked(sys.argv[2]) if b"/gcs_server" in Path(f"/proc/{p}/cmdline").read_bytes().split(b"\\0")[0]]
lost = cluster.watch()
os.kill(gcs, signal.SIGKILL)
began = time.monotonic()
with lost.call():  # until it ends the process stays connected, and no call can connect anew
    while True:
        try:
            call()
        except RuntimeError as error:
            assert "Ray's GCS at" in str(error), error
            break
        assert time.monotonic() - began < 15
        time.sleep(0.05)
assert time.monotonic() - began < 15
print("told after", time.monotonic() - began, flush=True)
while cluster.watch() is lost:  # a call hears of the loss until the process has disconnected
    try:
        assert torch.equal(call(), wanted)
    except RuntimeError as error:
        assert "Ray's GCS at" in str(error), error
    assert time.monotonic() - began < 60
time.sleep(float(sys.argv[1]))  # Ray would have ended this process
assert torch.equal(call(), wanted)
actor_pool.close()
assert not [t for t in threading.enumerate() if t.name == gcs_watch.NAME]
print("right", flush=True)
"""


def test_a_gcs_that_dies_is_an_error_in_time_and_the_process_lives(tmp_path: Path) -> None:
    mark = f"XLSTM_TEST_MARK={os.getpid()}-{time.time_ns()}"
    environment = {**os.environ, **dict([mark.split("=")]), "PYTHONPATH": str(Path(__file__).parents[1]),
                   "XLSTM_OPS_WORKERS": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    try:
        done = subprocess.run([sys.executable, "-c", CODE, "70", mark], env=environment, cwd=tmp_path, timeout=400,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.splitlines()[-1] == "right"
    finally:
        for pid in marked(mark):
            os.kill(pid, signal.SIGKILL)
