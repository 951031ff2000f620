"""A worker: a Ray actor that holds a model and reads shards of prompts."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from torch_xlstm_ops import config
from torch_xlstm_ops.parallel import device_links, models, transport
from torch_xlstm_ops.parallel.sequence_parallel import SLSTM, SequenceParallelMode
from torch_xlstm_ops.parallel.shards import Shard
from torch_xlstm_ops.parallel.state_link import StateLink
from torch_xlstm_ops.schedules.ray import serialization


class ShardRead(NamedTuple):
    """The measurements of one shard, and the result of the last one."""

    shard: Shard
    seconds: float
    layers: tuple[str, ...]  # the operator of each layer
    waits: tuple[float, ...]  # seconds of waiting, of the GPU on CUDA, by layer; empty in the first shard
    sent: tuple[int, ...]  # bytes, by layer; empty in the last shard
    cold: bool  # whether it was the worker's first shard, which compiles
    result: Any = None  # of the last shard: logits and cache as a SerializedModel, or a reference to it
    hops: tuple[float, ...] = ()  # seconds until a state that was there and wanted was received, by layer
    way: str = transport.HOST  # how its states were sent: from device to device, or through the host

    @property
    def waited(self) -> float:
        """Return the seconds of waiting for states."""
        return sum(self.waits)

    @property
    def slstm_wait(self) -> float:
        """Return the seconds of waiting in sLSTM layers, which have no summary."""
        return sum(wait for layer, wait in zip(self.layers, self.waits, strict=False) if layer == SLSTM)

    @property
    def speed(self) -> float:
        """Return the tokens per second, waiting excluded."""
        return (self.shard.stop - self.shard.start) / max(self.seconds - self.waited, 1e-9)


class Ways(NamedTuple):
    """How a worker sends: `transport.DEVICE` or `transport.HOST`."""

    states: str  # to the next worker
    result: str  # to the caller


class Started(NamedTuple):
    """What a worker says of itself."""

    pid: int
    node: str  # Ray's id


class Worker:
    """An actor that holds a model."""

    def __init__(
        self, model: models.SerializedModel, call: models.Call, settings: Mapping[str, Any], device: str, threads: int,
        gpus: float = 1,
    ) -> None:
        """gpus: GPUs of this worker; with less than one it takes that fraction of the memory."""
        from torch_xlstm_ops.patch import patch

        os.environ.pop(config.SETTINGS["trace"].variable, None)  # only the caller writes the trace file
        torch.set_num_threads(threads)
        serialization.suppress_read_only_warning()
        self._call, self._settings, self._device = call, settings, torch.device(device)
        self._sender, self._cold = None, True
        self._buffers = transport.Buffers()
        if self._device.type == "cuda":
            self._device = torch.device("cuda", torch.cuda.current_device())
            if gpus < 1:
                torch.cuda.set_per_process_memory_fraction(gpus)
            self._sender = transport.Sender()
        self._model = models.deserialize(model, self._device, copy=False).eval()
        if call is models.transformers_call:
            models.prepare_transformers(self._model)
            patch("transformers")  # also its cache

    def ready(self) -> Started:
        """Return the process and its node, once the model is loaded."""
        import ray

        return Started(os.getpid(), ray.get_runtime_context().get_node_id())

    def offer(self) -> transport.DeviceTensors | None:
        """Return some memory of the GPU for another process to try, or None if there is none to share."""
        return device_links.offer(self._buffers, self._device)

    def accepts(self, offered: transport.DeviceTensors | None) -> bool:
        """Return whether this process can read another's memory."""
        return device_links.accepts(offered, self._device)

    def read(
        self, directory: Any, prompt: int, tokens: serialization.TensorBytes, shard: Shard, summarize_first: bool,
        ways: Ways,
    ) -> ShardRead:
        """Read a shard's tokens (B, S), starting from the states of the previous shard in the directory.

        Raises RuntimeError if the memory of the GPU does not suffice; the worker can read the next prompt.
        """
        try:
            return self._read(directory, prompt, tokens, shard, summarize_first, ways)
        except torch.OutOfMemoryError as error:
            reason = str(error).split(". ")[0]
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        raise RuntimeError(f"worker {shard.number} ran out of memory while it read tokens {shard.start} to "
                           f"{shard.stop}: use more workers, a larger part of a GPU for each, or a shorter prompt "
                           f"({reason})")

    def _read(
        self, directory: Any, prompt: int, tokens: serialization.TensorBytes, shard: Shard, summarize_first: bool,
        ways: Ways,
    ) -> ShardRead:
        began = time.perf_counter()
        link = StateLink(directory, prompt, shard.number, self._device, sender=self._sender, buffers=self._buffers,
                         way=ways.states)
        (ids,) = serialization.from_bytes([tokens], self._device)
        mode = SequenceParallelMode(link, first=shard.number == 0, last=shard.last, summarize_first=summarize_first)
        try:
            with config.use(**self._settings), torch.inference_mode(), mode:
                found = self._call(self._model, ids.clone(), shard.start)
        finally:
            link.close()
        if not mode.calls:
            raise RuntimeError("the model called none of our operators: patch it, or pass a call that uses them")
        result = self._store(found, ways.result) if shard.last else None
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        cold, self._cold = self._cold, False
        return ShardRead(shard, time.perf_counter() - began, tuple(mode.calls), tuple(link.waits), tuple(link.sent),
                         cold, result, tuple(link.hops), ways.states)

    def _store(self, found: Any, way: str) -> Any:
        """Return the logits and the cache as the caller reads them: in memory of the GPU, or from the store."""
        import ray

        if way == transport.DEVICE:
            with torch.inference_mode():
                return models.serialize(found, lambda tensors: device_links.share(tensors, self._buffers, self._device))
        result = models.serialize(found)
        with serialization.store_errors("the logits and states after the prompt", serialization.nbytes(result.tensors)):
            return ray.put(result)
