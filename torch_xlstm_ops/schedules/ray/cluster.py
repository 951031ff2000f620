"""The process's connection to Ray; one that we made is closed by us."""

from __future__ import annotations

import math
import os
import subprocess
import sys

from torch_xlstm_ops import config
from torch_xlstm_ops.runtime import forks
from torch_xlstm_ops.runtime.state import on_reset
from torch_xlstm_ops.schedules.ray import private_ray
from torch_xlstm_ops.schedules.ray.gcs_watch import GcsWatch

SECONDS = 12.0  # in which a cluster must answer: `ray.init` itself waits for minutes
_PROBE = """
import socket, sys
host, _, port = sys.argv[1].rpartition(":")
if port.isdecimal():
    socket.create_connection((host, int(port))).close()  # refused at once, where ray.init tries for long
import ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
"""

_lock = forks.new_lock()
_ours = False
_watch: GcsWatch | None = None  # of the connection that we made
_inherited = False  # whether a parent, from which this process was forked, was connected


def connect() -> bool:
    """Connect to the cluster of `ray_address`, or start Ray here; do nothing if the process is connected.

    Returns whether a connection was made; the caller then closes it.
    Raises RuntimeError for a cluster that does not answer within 15 seconds, and in a child that was forked from a
    process with a connection.
    """
    global _ours
    check_not_inherited()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray starts; otherwise Ray reports usage
    import ray

    with _lock:
        if ray.is_initialized():
            return False
        address = config.current().ray_address
        if address is None:
            private_ray.start()
        else:
            check_reachable(address)
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        _ours = True
        _watch_gcs()
        return True


def check_not_inherited() -> None:
    """Raise RuntimeError in a child that was forked from a process connected to Ray: Ray would wait forever."""
    if _inherited:
        raise RuntimeError("Ray must be used by the process that connected to it, got a child that was forked from it: "
                           'start it by spawn (multiprocessing.get_context("spawn"))')


def _watch_gcs() -> None:
    """Watch the GCS of the connection, from which we disconnect when it is lost; one that others made stays."""
    global _watch
    import ray

    _watch = GcsWatch(ray.get_runtime_context().gcs_address, close)


def watch() -> GcsWatch | None:
    """Return the watch of the GCS, if we made the connection."""
    return _watch


def _leave_to_parent() -> None:
    """In a forked child: the connection is the parent's, and stays."""
    global _ours, _inherited, _watch
    ray = sys.modules.get("ray")
    _watch = None
    _ours, _inherited = False, _inherited or (ray is not None and ray.is_initialized())


forks.in_child(_leave_to_parent)


@on_reset
def close() -> None:
    """Disconnect, and end a cluster that was started here; do nothing if we did not make the connection."""
    global _ours, _watch
    with _lock:
        if _watch is not None:
            _watch.stop()
        if _ours:
            import ray

            ray.shutdown()
            private_ray.remove()
        _ours, _watch = False, None  # a call that comes before this hears of a lost GCS


def available(resource: str) -> int:
    """Return how many whole units of a resource, CPU or GPU, are free in the cluster."""
    return math.floor(free(resource))


def free(resource: str) -> float:
    """Return how many units of a resource, CPU or GPU, are free in the cluster."""
    import ray

    watch = _watch
    if watch is None:
        return float(ray.available_resources().get(resource, 0))
    with watch.call():
        watch.wait_for_answer()
        return float(ray.available_resources().get(resource, 0))


def describe() -> str:
    """Return what the nodes of the cluster have, as text."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    have = [", ".join(f"{node['Resources'].get(name, 0):g} {name}" for name in ("CPU", "GPU")) for node in nodes]
    return f"{len(nodes)} node{'s' * (len(nodes) != 1)} ({'; '.join(have)})"


def check_reachable(address: str) -> None:
    """Raise RuntimeError unless the cluster answers within SECONDS; a child process asks, as it can be killed."""
    wanted = f"ray_address must be that of a running Ray cluster, got {address}"
    try:
        subprocess.run([sys.executable, "-c", _PROBE, address], check=True, capture_output=True, text=True,
                       timeout=SECONDS)
    except OSError as error:
        raise RuntimeError(f"{wanted}: {error}") from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{wanted}, which did not answer in {SECONDS:g} s") from None
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RuntimeError(f"{wanted}: {last}") from None
