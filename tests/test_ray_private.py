"""Laws of a Ray that we start: it listens on the loopback alone, asks for a token, leaves nothing, may lose its GCS."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.processes import marked

pytest.importorskip("ray", reason="ray is not installed")
pytestmark = [pytest.mark.ray, pytest.mark.slow,
              pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads /proc")]
LOOPBACK = ("0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000")
ALONE = """
import os, sys, time
from pathlib import Path
import ray
from torch_xlstm_ops.schedules.ray import cluster

class Actor:
    def ready(self):
        return os.environ.get("RAY_AUTH_MODE")

assert cluster.connect()
actor = ray.remote(Actor).options(num_cpus=0).remote()
Path("mode").write_text(str(ray.get(actor.ready.remote())))
Path("started").touch()
while not Path("end").exists():
    time.sleep(0.05)
if sys.argv[1] == "close":
    cluster.close()
    left = {name for name in os.environ if name.startswith(("RAY_AUTH", "RAY_ENABLE_WINDOWS"))}
    Path("left").write_text(repr((left, os.listdir(os.environ["RAY_TMPDIR"]))))
"""

END_SECONDS = 30  # after which Ray ends processes that lost their GCS, by default 60
WITHOUT_GCS = """
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


class WithoutGcs(NamedTuple):
    """A process whose Ray lost its GCS, and what it prints."""

    process: subprocess.Popen[bytes]
    output: Path


@pytest.fixture(scope="module")
def without_gcs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WithoutGcs]:
    """Start a process that outlives the time after which Ray would end it; meanwhile other tests run."""
    mark, folder = f"XLSTM_TEST_MARK={os.getpid()}-{time.time_ns()}", tmp_path_factory.mktemp("gcs")
    environment = {**os.environ, **dict([mark.split("=")]), "PYTHONPATH": str(Path(__file__).parents[1]),
                   "XLSTM_OPS_WORKERS": "1", "OMP_NUM_THREADS": "1",
                   "RAY_gcs_rpc_server_reconnect_timeout_s": str(END_SECONDS)}
    environment.pop("RAY_ADDRESS", None)
    with open(folder / "output", "w") as output:
        process = subprocess.Popen([sys.executable, "-c", WITHOUT_GCS, str(END_SECONDS + 10), mark], cwd=folder,
                                   env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield WithoutGcs(process, folder / "output")
    finally:
        process.kill()
        process.wait(60)
        for pid in marked(mark):
            os.kill(pid, signal.SIGKILL)


def test_a_gcs_that_dies_is_an_error_in_time(without_gcs):
    process, output = without_gcs
    wait_for(lambda: "told after" in output.read_text() or process.poll() is not None, 300)
    assert "told after" in output.read_text(), output.read_text()


def listening(pids: list[int]) -> list[str]:
    """Return the addresses, in hexadecimal, on which processes listen."""
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    sockets = {f"socket:[{row[9]}]": row[1].rpartition(":")[0] for row in rows if row[3] == "0A"}
    found = []
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                found.append(sockets.get(os.readlink(descriptor), ""))
            except OSError:  # closed meanwhile
                continue
    return [address for address in found if address]


@pytest.mark.parametrize("end", ["close", "exit", "term", "kill", "blocked"])
def test_it_is_on_the_loopback_behind_a_token_and_leaves_nothing(end, tmp_path):
    mark, temporary = f"XLSTM_TEST_MARK={os.getpid()}-{time.time_ns()}", Path("/tmp") / f"x{time.time_ns() % 10**9}"
    home = tmp_path / "home"
    home.mkdir()
    temporary.mkdir()
    environment = {**os.environ, **dict([mark.split("=")]), "PYTHONPATH": str(Path(__file__).parents[1]),
                   "RAY_TMPDIR": str(temporary), "HOME": str(home)}
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        environment.pop(name, None)
    blocked = (lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])) if end == "blocked" else None
    process = subprocess.Popen([sys.executable, "-c", ALONE, end], env=environment, cwd=tmp_path, preexec_fn=blocked)
    try:
        wait_for(lambda: (tmp_path / "started").exists() or process.poll() is not None, 120)
        addresses = listening(marked(mark))
        assert addresses
        assert set(addresses) <= set(LOOPBACK)
        assert (tmp_path / "mode").read_text() == "token"
        assert not list(home.iterdir())
        if end in ("term", "kill"):
            process.send_signal(signal.SIGTERM if end == "term" else signal.SIGKILL)
        elif end == "blocked":
            process.send_signal(signal.SIGINT)  # which does nothing
        (tmp_path / "end").touch()
        process.wait(60)
        wait_for(lambda: not marked(mark), 180)  # after a kill, agents of Ray notice within about a minute
        assert not marked(mark)
        if end == "close":
            assert (tmp_path / "left").read_text() == "(set(), [])"
        if end in ("close", "exit", "blocked"):
            assert not list(temporary.iterdir())
    finally:
        for pid in marked(mark):
            os.kill(pid, signal.SIGKILL)
        subprocess.run(["rm", "-rf", str(temporary)], check=True)


def test_a_process_outlives_its_gcs_and_connects_anew(without_gcs):
    process, output = without_gcs
    process.wait(400)
    assert process.returncode == 0, output.read_text()
    assert output.read_text().splitlines()[-1] == "right"


def wait_for(law: object, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not law() and time.monotonic() < until:  # type: ignore[operator]
        time.sleep(0.1)
