"""The actors of `Workers`: started, connected, replaced and ended together."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from torch_xlstm_ops.parallel import device_links, models, transport
from torch_xlstm_ops.parallel.placement import Placement, reserve
from torch_xlstm_ops.parallel.state_directory import StateDirectory
from torch_xlstm_ops.parallel.worker import Started, Ways, Worker
from torch_xlstm_ops.schedules.ray import actor_pool, serialization


class WorkerActors:
    """A state directory and workers with one model each, on reserved resources of the cluster."""

    def __init__(self, count: int, device: torch.device, threads: int, placement: Placement, way: str | None) -> None:
        """device: the caller's. threads: of each worker. way: how tensors travel; None: as is possible.

        Starts nothing.
        """
        self._count, self._device, self._threads, self._placement = count, device, threads, placement
        self._way = way
        self._ways: list[Ways] | None = None  # of each worker; unknown after one was replaced
        self._known: dict[str | None, list[Ways]] = {}  # of each worker, by `way`
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
        self._arguments = stored, call, settings, self._device.type, self._threads, self._placement.units
        self._reservation = reserve(self._count, self._placement)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.directory = ray.remote(StateDirectory).options(num_cpus=0, scheduling_strategy=here).remote()
        self.workers = [self._start_worker(number) for number in range(self._count)]
        _wait_until_ready(self.workers)

    def _start_worker(self, number: int) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        strategy = PlacementGroupSchedulingStrategy(self._reservation, placement_group_bundle_index=number)
        resources = {f"num_{name.lower()}s": units for name, units in self._placement.bundle.items()}
        options = {"num_cpus": 0, **resources, "scheduling_strategy": strategy, "max_restarts": 0}
        return ray.remote(Worker).options(**options).remote(*self._arguments)

    def replace(self, number: int) -> None:
        """Start a new worker in the place of a dead one; retry while Ray places it on a node that has just died."""
        import ray
        from ray.exceptions import RayActorError

        self._ways = None
        self._known.clear()
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

    def travel(self, way: str | None) -> None:
        """Have tensors travel in another way from the next prompt on; None: as is possible."""
        self._way, self._ways = way, self._known.get(way)

    def connect(self) -> None:
        """Find out how each worker can send; before a prompt, as workers do one thing after another."""
        if self._ways is not None:
            return
        host = Ways(transport.HOST, transport.HOST)
        self._ways = [host] * self._count
        if self._device.type == "cuda" and self._way != transport.HOST:
            self._ways = self._device_ways()
        if self._way == transport.DEVICE and host.result in {way for ways in self._ways[:-1] for way in ways}:
            raise RuntimeError("transport must be host or auto for workers that cannot read each other's GPU memory, "
                               "got device")
        self._known[self._way] = self._ways

    def ways(self, number: int) -> Ways:
        """Return how a worker sends, through the host until `connect` knows better."""
        return Ways(transport.HOST, transport.HOST) if self._ways is None else self._ways[number]

    def _device_ways(self) -> list[Ways]:
        import ray

        started = self.started()
        here = ray.get_runtime_context().get_node_id()
        offers = ray.get([worker.offer.remote() for worker in self.workers])
        following = [worker.accepts.remote(offered) for worker, offered in zip(self.workers[1:], offers, strict=False)]
        taken = [*ray.get(following), False]
        names = {True: transport.DEVICE, False: transport.HOST}
        nodes = [worker.node for worker in started]
        same = [*(a == b for a, b in itertools.pairwise(nodes)), False]
        return [
            Ways(names[same[number] and taken[number]],
                 names[nodes[number] == here and device_links.accepts(offers[number], self._device)])
            for number in range(self._count)
        ]

    def started(self) -> list[Started]:
        """Return the workers' processes and nodes."""
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
