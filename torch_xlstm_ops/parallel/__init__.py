"""A long prompt read by several workers at once, each a stretch of it; decoding goes on where the caller is.

    with Workers(model, 4) as workers:
        logits, cache, report = workers.prefill(tokens)

Every worker holds the model. What a stretch needs of those before is, for each layer, the recurrent state at its
beginning, and that alone goes from worker to worker, whatever the length of the prompt.

A worker may wait for the state, compute its own, and hand that on: it then runs one mLSTM behind the worker before, in
every layer the same one, so that waiting costs (workers - 1) mLSTMs in all. Where that is too much, workers sum up
their stretch (the monoid element F, M, dC, dn) while they wait, and hand on the state as soon as they have the one
before. sLSTM layers cannot be summed up, and always wait.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops import config
from torch_xlstm_ops.config import Schedule
from torch_xlstm_ops.parallel import models, stretches
from torch_xlstm_ops.parallel.keeper import Keeper
from torch_xlstm_ops.parallel.passing import check_splits
from torch_xlstm_ops.parallel.report import Report
from torch_xlstm_ops.parallel.stretches import Stretch
from torch_xlstm_ops.parallel.worker import Read, Worker
from torch_xlstm_ops.schedules.ray import actors, cluster, serialization

__all__ = ["Prefilled", "Report", "Workers", "prefill"]

REPLAYS = 3  # times that the workers of one prompt may be lost
ROOM_SECONDS = 15.0  # that a cluster has to find room for workers
BEAT = 2.0  # seconds between two looks at workers that read

_log = logging.getLogger("torch_xlstm_ops.ray")


class Prefilled(NamedTuple):
    """What a prompt leaves, where the model is."""

    logits: Tensor  # (B, V), of the last token
    cache: Any  # what decoding goes on from
    report: Report


def prefill(
    model: torch.nn.Module, tokens: Tensor | Sequence[int], workers: int = 2, *, threads: int = 1,
    call: models.Call | None = None,
) -> Prefilled:
    """Read one prompt with workers that are started for it; see `Workers`, which keeps them for the next."""
    with Workers(model, workers, threads=threads, call=call) as started:
        return started.prefill(tokens)


class Workers:
    """Ray actors that each hold a model, for a ``with`` block.

    model: an xLSTMForCausalLM of transformers, patched or not; or another whose layers call our sequence operators,
        with `call`.
    workers: how many, on as many nodes as there are; at least 1.
    threads: CPUs of each, default 1. On a GPU each worker has one of its own.
    call: runs the model over tokens (B, S), given how many stand before them, and returns the logits of the last
        (B, V) and what decoding goes on from; default that of transformers.

    Raises ValueError for a model that `call` must be given for, NotImplementedError without Ray or for layers that mix
    tokens by other means than a recurrent state, RuntimeError where Ray has no room for the workers.
    """

    def __init__(
        self, model: torch.nn.Module, workers: int = 2, *, threads: int = 1, call: models.Call | None = None
    ) -> None:
        from torch_xlstm_ops import schedules

        config.check(config.WHOLE, workers, "workers", text=False)
        config.check(config.WHOLE, threads, "threads", text=False)
        if call is None:
            models.check_transformers(model)
        check_splits(model)
        self.device = next((t.device for t in model.parameters()), torch.device("cpu"))
        reason = schedules.unavailable(Schedule.RAY, self.device)
        if reason is not None:
            raise NotImplementedError(f"a prompt is read by several workers with Ray, got {reason}")
        if self.device.type == "mps" and workers > 1:
            raise NotImplementedError(f"workers must be 1 on MPS, whose GPU one process owns, got {workers}")
        self._layers: int | None = getattr(getattr(model, "config", None), "num_hidden_layers", None)
        self._workers: list[Any] = []
        self._keeper: Any = None
        self._room: Any = None
        self._prompts = 0
        self._weights = [1.0] * workers  # of stretches
        serialization.expect_read_only()
        self._ours = cluster.connect()
        try:
            self._start(model, workers, threads, call or models.transformers_call)
        except BaseException:
            self.close()
            raise

    def _start(self, model: torch.nn.Module, workers: int, threads: int, call: models.Call) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        settings = {field: value for field, value in dataclasses.asdict(config.current()).items()
                    if value is not None and field not in ("trace", "ray_address")}
        if settings["schedule"] is Schedule.RAY:
            settings["schedule"] = Schedule.INDUCTOR
        self._bundle = {"CPU": threads} if self.device.type == "cpu" else {"GPU": 1}
        parcel = models.pack(model)
        with serialization.room_for("the model", serialization.nbytes(parcel.tensors)):
            there = ray.put(parcel)
        self._arguments: tuple[Any, ...] = (there, call, settings, self.device.type, threads)
        self._room = self._reserve(workers)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._keeper = ray.remote(Keeper).options(num_cpus=0, scheduling_strategy=here).remote()
        self._workers = [self._worker(number) for number in range(workers)]
        self._wait_for(self._workers)

    def prefill(
        self, tokens: Tensor | Sequence[int], weights: Sequence[float] | None = None, ahead: bool | None = None
    ) -> Prefilled:
        """Read a prompt.

        tokens: (B, S) or (S,), at least two of them.
        weights: of the workers' stretches, this once; default equal ones, until the speeds measured with the last
            prompt say that others would save a tenth of the time.
        ahead: whether to sum up stretches while waiting, default as `stretches.ahead` finds best.

        Raises ValueError for bad tokens and weights, RuntimeError where workers are lost again and again, and what a
        worker raises.
        """
        import ray

        ids = torch.as_tensor(tokens).cpu()
        ids = ids if ids.dim() == 2 else ids[None]
        cuts = stretches.cut(ids.shape[1], weights or self._weights)
        ahead = stretches.ahead(len(cuts), self._layers) if ahead is None else ahead
        self._prompts += 1
        try:
            found, replays = self._read(ids, cuts, ahead)
        finally:
            ray.get(self._keeper.end.remote(self._prompts))
        assert found[-1].result is not None
        if len(found) == len(self._workers) and not any(read.cold for read in found):
            self._weights = stretches.replan(self._weights, [read.speed for read in found])
        logits, cache = models.unpack(found[-1].result, self.device, owned=True)
        return Prefilled(logits, cache, Report(tuple(r._replace(result=None) for r in found), ahead, replays))

    def _read(self, ids: Tensor, cuts: Sequence[Stretch], ahead: bool) -> tuple[list[Read], int]:
        """Have every stretch read, those again whose worker or whose states are lost."""
        import ray
        from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

        found: dict[int, Read] = {}
        running: dict[Any, Stretch] = {}
        replays = 0

        def start(stretch: Stretch) -> None:
            (part,) = serialization.pack([ids[:, stretch.start:stretch.stop]])
            read = self._workers[stretch.number].read
            with serialization.room_for(f"tokens {stretch.start} to {stretch.stop}", serialization.nbytes([part])):
                running[read.remote(self._keeper, self._prompts, part, stretch, ahead)] = stretch

        for stretch in cuts:
            start(stretch)
        while running:
            done, _ = ray.wait(list(running), num_returns=1, timeout=BEAT)
            missed = [cuts[number] for number in ray.get(self._keeper.missed.remote())]
            again = [stretch for stretch in missed if stretch not in running.values()]
            for reference in done:
                stretch = running.pop(reference)
                try:
                    found[stretch.number] = _whole(ray.get(reference))
                except RayTaskError as error:
                    raise error.cause from error
                except (RayActorError, ObjectLostError) as error:
                    if replays >= REPLAYS:
                        raise RuntimeError(f"workers must live through a prompt, got {replays + 1} lost") from error
                    replays += 1
                    _log.warning("tokens %d to %d: their worker was lost, they are read again", *stretch[1:3])
                    self._replace(stretch.number)
                    again.append(stretch)
            for stretch in dict.fromkeys(again):
                start(stretch)
        return [found[stretch.number] for stretch in cuts], replays

    def pids(self) -> list[int]:
        """Return the workers' processes."""
        import ray

        return ray.get([worker.ready.remote() for worker in self._workers])  # type: ignore[no-any-return]

    def close(self) -> None:
        """End the workers, and Ray if it was started for them."""
        import ray
        from ray.util import remove_placement_group

        if ray.is_initialized():
            for actor in filter(None, (*self._workers, self._keeper)):
                ray.kill(actor)
            if self._room is not None:
                remove_placement_group(self._room)
        self._workers, self._keeper, self._room, self._arguments = [], None, None, ()
        if self._ours:
            cluster.close()
        self._ours = False

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _reserve(self, workers: int) -> Any:
        """Return room for all workers or for none, so that two callers never wait for each other's half."""
        from ray.util import placement_group, remove_placement_group

        (resource, count), = self._bundle.items()
        if cluster.room(resource) < workers * count:
            actors.release()  # of the ray schedule, which starts them again
        room = placement_group([self._bundle] * workers, strategy="SPREAD")
        if not room.wait(ROOM_SECONDS):
            remove_placement_group(room)
            raise RuntimeError(f"Ray must have room for {workers} workers of {count} {resource} within "
                               f"{ROOM_SECONDS:g} s, got {cluster.room(resource)} {resource} free")
        return room

    def _worker(self, number: int) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        place = PlacementGroupSchedulingStrategy(self._room, placement_group_bundle_index=number)
        resources = {f"num_{name.lower()}s": count for name, count in self._bundle.items()}
        options = {"num_cpus": 0, **resources, "scheduling_strategy": place, "max_restarts": 0}
        return ray.remote(Worker).options(**options).remote(*self._arguments)

    def _replace(self, number: int) -> None:
        """Start a worker in the place of one; again while Ray puts it on a node whose death it has not noticed."""
        import ray
        from ray.exceptions import RayActorError

        until = time.monotonic() + actors.START_SECONDS
        while True:
            ray.kill(self._workers[number])  # it may be cut off and alive
            self._workers[number] = self._worker(number)
            try:
                return self._wait_for([self._workers[number]])
            except RayActorError:
                if time.monotonic() > until:
                    raise
            time.sleep(1)

    def _wait_for(self, workers: Sequence[Any]) -> None:
        import ray

        started = [worker.ready.remote() for worker in workers]
        there, missing = ray.wait(started, num_returns=len(started), timeout=actors.START_SECONDS)
        ray.get(there)  # raises what a worker raised
        if missing:
            raise RuntimeError(f"Ray must start all {len(started)} workers within {actors.START_SECONDS:g} s, got "
                               f"{len(there)}")


def _whole(read: Read) -> Read:
    """Return what became of a stretch with the result that its worker left in the store."""
    import ray

    return read if read.result is None else read._replace(result=ray.get(read.result))
