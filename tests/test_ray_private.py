"""Laws of a Ray that we start: it listens on the loopback alone, asks for a token, and leaves nothing behind."""

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


def wait_for(law: object, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not law() and time.monotonic() < until:  # type: ignore[operator]
        time.sleep(0.1)
