"""The actors of `Workers`: reserved, started, replaced and ended together."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch_xlstm_ops.parallel import models
from torch_xlstm_ops.parallel.state_directory import StateDirectory
from torch_xlstm_ops.parallel.worker import Worker
from torch_xlstm_ops.schedules.ray import actor_pool, cluster, serialization

RESERVE_SECONDS = 15.0  # in which a cluster must find resources for all workers


class WorkerActors:
    """A state directory and workers with one model each, on reserved resources of the cluster."""

    def __init__(self, count: int, device: str, threads: int) -> None:
        """device: its type; threads: CPUs of each worker, unless on a GPU. Starts nothing."""
        self._count, self._device, self._threads = count, device, threads
        self._bundle = {"CPU": threads} if device == "cpu" else {"GPU": 1}
        self.workers: list[Any] = []
        self.directory: Any = None
        self._reservation: Any = None
        self._arguments: tuple[Any, ...] = ()  # of a worker

    def start(self, model: models.SerializedModel, call: models.Call, settings: Mapping[str, Any]) -> None:
        """Start the actors, and return when all have loaded the model."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        with serialization.store_errors("the model", serialization.nbytes(model.tensors)):
            stored = ray.put(model)
        self._arguments = stored, call, settings, self._device, self._threads
        self._reservation = self._reserve()
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.directory = ray.remote(StateDirectory).options(num_cpus=0, scheduling_strategy=here).remote()
        self.workers = [self._start_worker(number) for number in range(self._count)]
        _wait_until_ready(self.workers)

    def _reserve(self) -> Any:
        """Reserve resources for all workers or for none, so that two callers never each wait for the other's part."""
        from ray.util import placement_group, remove_placement_group

        (resource, units), = self._bundle.items()
        if cluster.available(resource) < self._count * units:
            actor_pool.release()  # the ray schedule starts its actors again
        reservation = placement_group([self._bundle] * self._count, strategy="SPREAD")
        if not reservation.wait(RESERVE_SECONDS):
            remove_placement_group(reservation)
            raise RuntimeError(f"Ray had no room for {self._count} workers of {units} {resource} within "
                               f"{RESERVE_SECONDS:g} s: {cluster.available(resource)} {resource} are free; use fewer "
                               "workers")
        return reservation

    def _start_worker(self, number: int) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        strategy = PlacementGroupSchedulingStrategy(self._reservation, placement_group_bundle_index=number)
        resources = {f"num_{name.lower()}s": units for name, units in self._bundle.items()}
        options = {"num_cpus": 0, **resources, "scheduling_strategy": strategy, "max_restarts": 0}
        return ray.remote(Worker).options(**options).remote(*self._arguments)

    def replace(self, number: int) -> None:
        """Start a new worker in the place of a dead one; retry while Ray places it on a node that has just died."""
        import ray
        from ray.exceptions import RayActorError

        until = time.monotonic() + actor_pool.START_SECONDS
        while True:
            ray.kill(self.workers[number])  # it may be disconnected and alive
            self.workers[number] = self._start_worker(number)
            try:
                return _wait_until_ready([self.workers[number]])
            except RayActorError:
                if time.monotonic() > until:
                    raise
            time.sleep(1)

    def pids(self) -> list[int]:
        """Return the workers' processes."""
        import ray

        return ray.get([worker.ready.remote() for worker in self.workers])  # type: ignore[no-any-return]

    def close(self) -> None:
        """End the actors and release the resources."""
        import ray
        from ray.util import remove_placement_group

        if ray.is_initialized():
            for actor in filter(None, (*self.workers, self.directory)):
                ray.kill(actor)
            if self._reservation is not None:
                remove_placement_group(self._reservation)
        self.workers, self.directory, self._reservation, self._arguments = [], None, None, ()


def _wait_until_ready(workers: Sequence[Any]) -> None:
    import ray

    ready = [worker.ready.remote() for worker in workers]
    started, missing = ray.wait(ready, num_returns=len(ready), timeout=actor_pool.START_SECONDS)
    ray.get(started)  # raises what a worker raised
    if missing:
        raise RuntimeError(f"Ray started {len(started)} of {len(ready)} workers within {actor_pool.START_SECONDS:g} s; "
                           "use fewer workers, or end other work on the cluster")
