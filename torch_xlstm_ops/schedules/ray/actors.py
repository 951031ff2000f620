"""A pool of Ray actors that outlives a call: each does one piece of work at a time, and keeps nothing of it.

A piece of work is a function of tensors, and all it needs is sent with it, the carry too. So an actor that dies loses
nothing: the piece is done again by another.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from torch_xlstm_ops import trace
from torch_xlstm_ops.config import SETTINGS
from torch_xlstm_ops.runtime.state import on_reset
from torch_xlstm_ops.schedules.queue import job
from torch_xlstm_ops.schedules.ray import cluster, serialization
from torch_xlstm_ops.schedules.slicing import Run

START_SECONDS = 120.0  # that a cluster has for starting an actor
BEAT = 5.0  # seconds between two signs of life of an actor that works on, and that it has for giving one
REPLAYS = 3  # times that one piece of work may lose its actor

_log = logging.getLogger("torch_xlstm_ops.ray")


class Actor:
    """What runs in an actor's process: functions that arrive by value, called with tensors."""

    def __init__(self, device: str, threads: int) -> None:
        os.environ.pop(SETTINGS["trace"].variable, None)  # the file is the caller's
        torch.set_num_threads(threads)
        serialization.expect_read_only()
        self._device = torch.device(device)
        self._known: dict[bytes, Run] = {}

    def ready(self) -> int:
        """Return the process's id, once it is there."""
        return os.getpid()

    def beat(self) -> None:
        """Give a sign of life, while the actor works."""

    def call(self, work: bytes, packed: Sequence[serialization.Packed]) -> list[serialization.Packed]:
        """Do a pickled piece of work."""
        from ray import cloudpickle

        run = self._known.get(work)
        if run is None:
            self._known[work] = run = cloudpickle.loads(work)
        with torch.no_grad():
            return serialization.pack(run(serialization.unpack(packed, self._device)))


class _Hand:
    """An actor as its pool sees it."""

    def __init__(self, number: int, device: str) -> None:
        import ray

        resources = {"num_cpus": 1} if device == "cpu" else {"num_cpus": 0, "num_gpus": 1}
        threads = 1 if device == "cpu" else torch.get_num_threads()
        options = {**resources, "scheduling_strategy": "SPREAD", "max_restarts": 0}
        self.number, self.depth = number, 0
        self.actor = ray.remote(concurrency_groups={"beat": 1})(Actor).options(**options).remote(device, threads)
        self.started = self.actor.ready.remote()

    def end(self) -> None:
        import ray

        ray.kill(self.actor)


class Pool:
    """Actors that share a caller's work; every method may be called from any thread."""

    def __init__(self, device: str) -> None:
        """device: the type that the actors compute on."""
        serialization.expect_read_only()
        self.device = device
        self._hands: list[_Hand] = []
        self._count = 0  # of all that were ever there
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        """Return how many actors there are, started or starting."""
        return len(self._hands)

    def grow(self, size: int) -> None:
        """Have at least `size` actors."""
        with self._lock:
            while len(self._hands) < size:
                self._hands.append(_Hand(self._count, self.device))
                self._count += 1

    def close(self) -> None:
        """End the actors."""
        with self._lock:
            for hand in self._hands:
                hand.end()
            self._hands.clear()

    def pids(self) -> list[int]:
        """Return the processes of all actors, once they have started."""
        import ray

        return ray.get([hand.started for hand in self._hands], timeout=START_SECONDS)  # type: ignore[no-any-return]

    def remote(self, work: Run) -> Run:
        """Return a function that has an actor do `work`; its results lie in the store, and are only to be read."""
        from ray import cloudpickle

        pickled = cloudpickle.dumps(work)
        return lambda tensors: self._call(pickled, serialization.pack(tensors))

    def _call(self, work: bytes, packed: Sequence[serialization.Packed]) -> Sequence[Tensor]:
        from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

        for _ in range(REPLAYS + 1):
            hand = self._take()
            try:
                return serialization.unpack(self._wait(hand, work, packed))
            except RayTaskError as error:
                raise error.cause from error
            except (RayActorError, ObjectLostError) as error:  # or its result, with its node
                lost = error
                _log.warning("%s: actor %d was lost, its work is done again", job.where(), hand.number)
                self._replace(hand)
            finally:
                self._leave(hand)
        raise RuntimeError(f"an actor must live through its work, got {REPLAYS + 1} that did not") from lost

    def _wait(self, hand: _Hand, work: bytes, packed: Sequence[serialization.Packed]) -> Any:
        import ray

        size = serialization.nbytes(packed)
        with self._span(hand, "remote", size):
            began = time.monotonic()
            with serialization.room_for("the tensors of a task", size):
                found = hand.actor.call.remote(work, packed)
            while not ray.wait([found], timeout=BEAT)[0]:
                self._beat(hand, time.monotonic() - began)
            with serialization.room_for("the results of a task, beside its tensors", size):
                return ray.get(found)

    def _beat(self, hand: _Hand, worked: float) -> None:
        """Have an actor that works on give a sign of life, for the trace and the log."""
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError

        try:
            with self._span(hand, "heartbeat"):
                ray.get(hand.actor.beat.options(concurrency_group="beat").remote(), timeout=BEAT)
        except GetTimeoutError:
            _log.warning("%s: actor %d, after %.0f s, gives no sign of life", job.where(), hand.number, worked)
        except RayActorError:  # which its work tells too
            return
        else:
            _log.info("%s: actor %d works for %.0f s, has %d to do", job.where(), hand.number, worked, hand.depth)

    def _span(self, hand: _Hand, phase: str, size: int | None = None) -> AbstractContextManager[object]:
        band, segment = job.where()
        return trace.span(f"actor {hand.number}", schedule="ray", phase=phase, band=band, segment=segment, nbytes=size,
                          queue_depth=hand.depth)

    def _take(self) -> _Hand:
        """Return the actor with the least to do of those that have started."""
        import ray

        with self._lock:
            hands = list(self._hands)
        if not hands:
            raise RuntimeError("the actors were ended while they had work")
        started, _ = ray.wait([hand.started for hand in hands], num_returns=1, timeout=START_SECONDS)
        if not started:
            raise RuntimeError(f"Ray must start an actor on {self.device} within {START_SECONDS:g} s, got none: "
                               f"{cluster.room('CPU')} CPUs and {cluster.room('GPU')} GPUs are free")
        there, _ = ray.wait([hand.started for hand in hands], num_returns=len(hands), timeout=0)
        with self._lock:
            hand = min((hand for hand in hands if hand.started in there), key=lambda hand: hand.depth)
            hand.depth += 1
            return hand

    def _leave(self, hand: _Hand) -> None:
        with self._lock:
            hand.depth -= 1

    def _replace(self, lost: _Hand) -> None:
        """Put a new actor in the place of one, unless another thread has."""
        with self._lock:
            if lost in self._hands:
                lost.end()  # it may be cut off and alive
                self._hands[self._hands.index(lost)] = _Hand(self._count, self.device)
                self._count += 1


_pool: Pool | None = None
_lock = threading.Lock()


def get(device: str, size: int) -> Pool:
    """Return the process's pool with at least `size` actors, on a connection to Ray that is made if there is none."""
    global _pool
    import ray

    with _lock:
        if not ray.is_initialized():
            _pool = None  # its actors went with the connection
            cluster.connect()
        if _pool is None or _pool.device != device:
            _check_gpu(device)
            if _pool is not None:
                _pool.close()
            _pool = Pool(device)
        _pool.grow(size)
        return _pool


def _check_gpu(device: str) -> None:
    """Raise RuntimeError for tensors on a GPU where no node of the cluster has one."""
    import ray

    if device != "cpu" and not ray.cluster_resources().get("GPU"):
        raise RuntimeError(f"Ray must have a GPU for tensors on {device}, got none: start it with --num-gpus")


def free(device: str) -> int:
    """Return how many actors there may be: those of the pool, and what is free in the cluster."""
    import ray

    if not ray.is_initialized():
        cluster.connect()
    if device == "mps":  # Apple Silicon advertises one GPU
        return 1
    held = _pool.size if _pool is not None and _pool.device == device else 0
    return held + cluster.room("CPU" if device == "cpu" else "GPU")


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


