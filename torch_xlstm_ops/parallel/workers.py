"""`Workers` and `prefill`: split a prompt into shards, have workers read them, and repeat those that are lost."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops import config, schedules
from torch_xlstm_ops.config import Schedule
from torch_xlstm_ops.parallel import models, shards, transport
from torch_xlstm_ops.parallel.placement import placement as place
from torch_xlstm_ops.parallel.report import Report
from torch_xlstm_ops.parallel.sequence_parallel import check_splits
from torch_xlstm_ops.parallel.shards import Shard
from torch_xlstm_ops.parallel.worker import ShardRead
from torch_xlstm_ops.parallel.worker_actors import WorkerActors
from torch_xlstm_ops.schedules.ray import cluster, serialization

MAX_REPLAYS = 3  # of shards of one prompt whose worker died
POLL_SECONDS = 2.0  # between two checks for lost states while workers read

_log = logging.getLogger("torch_xlstm_ops.ray")


class Prefilled(NamedTuple):
    """The result of a prefill: logits (B, V) of the last token, the cache to decode from, and the measurements.

    Tensors are on the device of the model.
    """

    logits: Tensor  # (B, V), of the last token
    cache: Any  # for decoding to continue from
    report: Report


def prefill(
    model: torch.nn.Module, tokens: Tensor | Sequence[int], workers: int = 2, *, threads: int = 1,
    call: models.Call | None = None, gpus: float | None = None,
) -> Prefilled:
    """Read one prompt with workers that are started for it; see `Workers`, which keeps them for the next."""
    with Workers(model, workers, threads=threads, call=call, gpus=gpus) as started:
        return started.prefill(tokens)


class Workers:
    """Ray actors that each hold a model, for a ``with`` block.

    model: an xLSTMForCausalLM of transformers, patched or not; or another whose layers call our sequence operators,
        with `call`.
    workers: number of actors, at least 1.
    threads: CPUs of each, default 1. On a GPU each worker has one of its own, unless `gpus` is less.
    call: runs the model over tokens (B, S), given the number of tokens before them, and returns the logits of the last
        token (B, V) and a cache; default that of transformers.
    gpus: GPUs of each worker, above 0 and at most 1, for a model on a GPU; of its memory a worker takes that part.
    placement: "spread" over the nodes, or "pack" into few.
    nodes, labels: Ray's ids or labels of the nodes that workers may run on.
    transport: how states and results travel: "device", from GPU to GPU of one host; "host", through Ray's object store;
        "auto", the default, "device" where two workers can.

    Raises ValueError for a model that needs `call` and for bad arguments, NotImplementedError without Ray or for layers
    that mix tokens other than through a recurrent state, RuntimeError if Ray has no room for the workers.
    """

    def __init__(
        self, model: torch.nn.Module, workers: int = 2, *, threads: int = 1, call: models.Call | None = None,
        gpus: float | None = None, placement: str = "spread", nodes: Sequence[str] | None = None,
        labels: Mapping[str, str] | None = None, transport: str = "auto",
    ) -> None:
        config.check(config.WHOLE, workers, "workers", text=False)
        config.check(config.WHOLE, threads, "threads", text=False)
        if call is None:
            models.check_transformers(model)
        check_splits(model)
        self.device = _device(model, workers)
        wanted = place(self.device.type, threads, gpus, placement, nodes, labels)
        self._layers: int | None = getattr(getattr(model, "config", None), "num_hidden_layers", None)
        self._prompts = 0
        self._weights = [1.0] * workers  # of shards
        serialization.suppress_read_only_warning()
        self._actors = WorkerActors(workers, self.device, threads, wanted, _way(transport))
        self._connected = cluster.connect()
        try:
            self._actors.start(models.serialize(model), call or models.transformers_call, _settings())
        except BaseException:
            self.close()
            raise

    def prefill(
        self, tokens: Tensor | Sequence[int], weights: Sequence[float] | None = None,
        summarize_first: bool | None = None, *, ahead: bool | None = None,
    ) -> Prefilled:
        """Read a prompt.

        tokens: (B, S) or (S,), at least two of them.
        weights: relative sizes of the workers' shards for this prompt; default equal, until the speeds measured with
            the last prompt show that others would save a tenth of the time.
        summarize_first: whether workers summarise their shards while they wait; default `shards.summarize_first`.
        ahead: another name of `summarize_first`.

        Raises ValueError for bad tokens and weights, RuntimeError if workers die repeatedly or have too little memory,
        and what a worker raises.
        """
        import ray

        if ahead is not None and summarize_first is not None:
            raise ValueError(f"ahead must come without summarize_first, got {ahead} and {summarize_first}")
        summarize_first = ahead if summarize_first is None else summarize_first
        ids = torch.as_tensor(tokens).cpu()
        ids = ids if ids.dim() == 2 else ids[None]
        split = shards.split(ids.shape[1], weights or self._weights)
        if summarize_first is None:
            summarize_first = shards.summarize_first(len(split), self._layers)
        self._actors.connect()
        self._prompts += 1
        try:
            reads, replays = self._read(ids, split, summarize_first)
        finally:
            ray.get(self._actors.directory.end.remote(self._prompts))
        if len(reads) == len(self._actors.workers) and not any(read.cold for read in reads):
            self._weights = shards.rebalance(self._weights, [read.speed for read in reads])
        logits, cache = models.deserialize(reads[-1].result, self.device, copy=True)
        report = Report(tuple(read._replace(result=None) for read in reads), summarize_first, replays)
        report.trace()
        return Prefilled(logits, cache, report)

    def _read(self, ids: Tensor, split: Sequence[Shard], summarize_first: bool) -> tuple[list[ShardRead], int]:
        """Have all shards read, and again those whose worker or states are lost; return the reads and replays."""
        import ray
        from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

        reads: dict[int, ShardRead] = {}
        running = {self._start(ids, shard, summarize_first): shard for shard in split}
        replays = 0
        while running:
            done, _ = ray.wait(list(running), num_returns=1, timeout=POLL_SECONDS)
            missed = [split[number] for number in ray.get(self._actors.directory.missed.remote())]
            again = [shard for shard in missed if shard not in running.values()]
            for reference in done:
                shard = running.pop(reference)
                try:
                    reads[shard.number] = _with_result(ray.get(reference))
                except RayTaskError as error:
                    raise error.cause from error
                except (RayActorError, ObjectLostError) as error:
                    if replays >= MAX_REPLAYS:
                        raise RuntimeError(f"{replays + 1} workers died while they read one prompt: see Ray's logs for "
                                           "the reason") from error
                    replays += 1
                    _log.warning("tokens %d to %d: their worker died; they are read again", shard.start, shard.stop)
                    self._actors.replace(shard.number)
                    again.append(shard)
            for shard in dict.fromkeys(again):
                running[self._start(ids, shard, summarize_first)] = shard
        return [reads[shard.number] for shard in split], replays

    def _start(self, ids: Tensor, shard: Shard, summarize_first: bool) -> Any:
        """Have a worker read a shard; return the reference to its result."""
        (tokens,) = serialization.to_bytes([ids[:, shard.start:shard.stop]])
        read = self._actors.workers[shard.number].read
        size = serialization.nbytes([tokens])
        with serialization.store_errors(f"tokens {shard.start} to {shard.stop}", size):
            return read.remote(self._actors.directory, self._prompts, tokens, shard, summarize_first,
                               self._actors.ways(shard.number))

    def pids(self) -> list[int]:
        """Return the workers' processes."""
        return [worker.pid for worker in self._actors.started()]

    def close(self) -> None:
        """End the workers, and the connection to Ray if it was made for them."""
        self._actors.close()
        if self._connected:
            cluster.close()
        self._connected = False

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _device(model: torch.nn.Module, workers: int) -> torch.device:
    """Return the device of a model; raise NotImplementedError if workers cannot use it."""
    device = next((t.device for t in model.parameters()), torch.device("cpu"))
    reason = schedules.unavailable(Schedule.RAY, device)
    if reason is not None:
        raise NotImplementedError(f"prefill with several workers needs Ray: {reason}")
    if device.type == "mps" and workers > 1:
        raise NotImplementedError(f"workers must be 1 on MPS, whose GPU one process owns, got {workers}")
    return device


def _way(name: str) -> str | None:
    """Return how tensors must travel, None for any way."""
    if name not in ("auto", transport.DEVICE, transport.HOST):
        raise ValueError(f"transport must be one of auto, device, host, got {name}")
    return None if name == "auto" else name


def _settings() -> dict[str, Any]:
    """Return the caller's settings for the workers; they use Ray for nothing else."""
    settings = {field: value for field, value in dataclasses.asdict(config.current()).items()
                if value is not None and field not in ("trace", "ray_address")}
    if settings["schedule"] is Schedule.RAY:
        settings["schedule"] = Schedule.INDUCTOR
    return settings


def _with_result(read: ShardRead) -> ShardRead:
    """Return a read with its result fetched from the store."""
    import ray

    return read._replace(result=ray.get(read.result)) if isinstance(read.result, ray.ObjectRef) else read
