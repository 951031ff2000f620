"""Actors that run pickled functions on tensors: started when first needed, kept between calls, one pool a process.

Each works through a queue of its own; new work goes to the actor with the shortest one. An actor that dies costs the
work that it had: another one repeats it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from torch_xlstm_ops import trace
from torch_xlstm_ops.kernels.mlstm import Run
from torch_xlstm_ops.runtime import forks
from torch_xlstm_ops.runtime.state import on_reset
from torch_xlstm_ops.schedules.queue import task_runner
from torch_xlstm_ops.schedules.ray import cluster, serialization
from torch_xlstm_ops.schedules.ray.actor import ActorHandle

START_SECONDS = 120.0  # in which a cluster must start an actor
HEARTBEAT_SECONDS = 5.0  # between two heartbeats of an actor that works, and the timeout of each
POLL_SECONDS = 1.0  # between looks at whether the GCS is lost
MAX_RETRIES = 3  # of one task whose actor died

_log = logging.getLogger("torch_xlstm_ops.ray")


class ActorPool:
    """Actors that share a caller's work; every method may be called from any thread."""

    def __init__(self, device: str) -> None:
        """device: the type that the actors compute on."""
        serialization.suppress_read_only_warning()
        self.device = device
        self._watch = cluster.watch()
        self._actors: list[ActorHandle] = []
        self._count = 0  # of all actors ever started
        self._lock = forks.new_lock()

    @property
    def size(self) -> int:
        """Return how many actors have started or are starting."""
        return len(self._actors)

    def grow(self, size: int) -> None:
        """Start actors until there are at least `size`."""
        with self._lock:
            while len(self._actors) < size:
                self._actors.append(self._start())

    def close(self) -> None:
        """End the actors."""
        with self._lock:
            for actor in self._actors:
                actor.kill()
            self._actors.clear()

    def pids(self) -> list[int]:
        """Return the processes of all actors, once they have started."""
        import ray

        return ray.get([actor.started for actor in self._actors], timeout=START_SECONDS)  # type: ignore[no-any-return]

    def remote(self, function: Run) -> Run:
        """Return a function that has an actor call `function`; its results are read-only memory of the store."""
        from ray import cloudpickle

        pickled = cloudpickle.dumps(function)
        return lambda tensors: self._call(pickled, serialization.to_bytes(tensors))

    def _call(self, pickled: bytes, args: Sequence[serialization.TensorBytes]) -> Sequence[Tensor]:
        from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

        for _ in range(MAX_RETRIES + 1):
            actor = self._take()
            try:
                with self._connection():
                    return serialization.from_bytes(self._wait(actor, pickled, args))
            except RayTaskError as error:
                raise error.cause from error
            except (RayActorError, ObjectLostError) as error:  # the actor, or its result with its node
                lost = error
                _log.warning("%s: actor %d died; another repeats its task", task_runner.current_task(), actor.number)
                self._replace(actor)
            finally:
                self._release(actor)
        raise RuntimeError(f"{MAX_RETRIES + 1} actors died while they ran one task: see Ray's logs for the reason"
                           ) from lost

    def _connection(self) -> AbstractContextManager[None]:
        return nullcontext() if self._watch is None else self._watch.call()

    def _check(self) -> None:
        if self._watch is not None:
            self._watch.check()

    def _wait(self, actor: ActorHandle, pickled: bytes, args: Sequence[serialization.TensorBytes]) -> Any:
        import ray

        size = serialization.nbytes(args)
        with self._span(actor, "remote", size):
            began = time.monotonic()
            with serialization.store_errors("the tensors of a task", size):
                result = actor.actor.call.remote(pickled, args)
            beats = 1
            while not ray.wait([result], timeout=min(HEARTBEAT_SECONDS, POLL_SECONDS))[0]:
                self._check()
                if time.monotonic() - began >= beats * HEARTBEAT_SECONDS:
                    self._heartbeat(actor, time.monotonic() - began)
                    beats += 1
            with serialization.store_errors("the results of a task, beside its tensors", size):
                return ray.get(result)

    def _heartbeat(self, actor: ActorHandle, worked: float) -> None:
        """Ask a working actor for a heartbeat, for the trace and the log."""
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError

        task = task_runner.current_task()
        try:
            with self._span(actor, "heartbeat"):
                beat = actor.actor.heartbeat.options(concurrency_group="heartbeat").remote()
                ray.get(beat, timeout=HEARTBEAT_SECONDS)
        except GetTimeoutError:
            _log.warning("%s: actor %d has worked for %.0f s and does not answer", task, actor.number, worked)
        except RayActorError:  # its task raises this too
            return
        else:
            _log.info("%s: actor %d has worked for %.0f s, %d tasks queued", task, actor.number, worked, actor.queued)

    def _span(self, actor: ActorHandle, phase: str, size: int | None = None) -> AbstractContextManager[object]:
        band, segment = task_runner.current_task()
        return trace.span(f"actor {actor.number}", schedule="ray", phase=phase, band=band, segment=segment,
                          nbytes=size, queue_depth=actor.queued)

    def _take(self) -> ActorHandle:
        """Return the started actor with the shortest queue."""
        with self._lock:
            actors = list(self._actors)
        if not actors:
            raise RuntimeError("the actors were ended while a task waited for one")
        with self._connection():
            started = self._started(actors)
        if not started:
            raise RuntimeError(f"Ray did not start an actor on {self.device} within {START_SECONDS:g} s: "
                               f"{cluster.available('CPU')} CPUs and {cluster.available('GPU')} GPUs are free; use "
                               "fewer workers, or end other work on the cluster")
        with self._lock:
            actor = min((actor for actor in actors if actor.started in started), key=lambda actor: actor.queued)
            actor.queued += 1
            return actor

    def _started(self, actors: Sequence[ActorHandle]) -> list[Any]:
        """Return what tells of the actors that have started, once one has; nothing if none has in time."""
        import ray

        starting, until = [actor.started for actor in actors], time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            if ray.wait(starting, num_returns=1, timeout=POLL_SECONDS)[0]:
                return ray.wait(starting, num_returns=len(actors), timeout=0)[0]  # type: ignore[no-any-return]
            self._check()
        return []

    def _release(self, actor: ActorHandle) -> None:
        with self._lock:
            actor.queued -= 1

    def _replace(self, dead: ActorHandle) -> None:
        """Start a new actor in the place of a dead one, unless another thread has."""
        with self._lock:
            if dead in self._actors:
                dead.kill()  # it may be disconnected and alive
                self._actors[self._actors.index(dead)] = self._start()

    def _start(self) -> ActorHandle:
        self._count += 1
        return ActorHandle(self._count - 1, self.device)


_pool: ActorPool | None = None
_lock = forks.new_lock()


def get(device: str, size: int) -> ActorPool:
    """Return the process's pool with at least `size` actors; connect to Ray if the process is not connected."""
    global _pool
    import ray

    cluster.check_not_inherited()
    with _lock:
        if not ray.is_initialized():
            _pool = None  # its actors ended with the connection
            cluster.connect()
        if _pool is None or _pool.device != device:
            _check_gpu(device)
            if _pool is not None:
                _pool.close()
            _pool = ActorPool(device)
        _pool.grow(size)
        return _pool


def _check_gpu(device: str) -> None:
    """Raise RuntimeError for tensors on a GPU if no node of the cluster has one."""
    import ray

    if device != "cpu" and not ray.cluster_resources().get("GPU"):
        raise RuntimeError(f"the Ray cluster has no GPU for tensors on {device}: start it with --num-gpus")


def free(device: str) -> int:
    """Return how many actors are possible: those of the pool, and what is free in the cluster."""
    import ray

    cluster.check_not_inherited()
    if not ray.is_initialized():
        cluster.connect()
    if device == "mps":  # Apple Silicon advertises one GPU
        return 1
    held = _pool.size if _pool is not None and _pool.device == device else 0
    return held + cluster.available("CPU" if device == "cpu" else "GPU")


@on_reset
def release() -> None:
    """End the pool's actors; the next call starts new ones."""
    global _pool
    with _lock:
        if _pool is not None:
            _pool.close()
        _pool = None


def close() -> None:
    """End the pool's actors, and the connection to Ray if it was made for them."""
    release()
    cluster.close()
