"""A worker: a Ray actor that holds a model and reads shards of prompts."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from torch_xlstm_ops import config
from torch_xlstm_ops.parallel import models
from torch_xlstm_ops.parallel.sequence_parallel import SLSTM, SequenceParallelMode
from torch_xlstm_ops.parallel.shards import Shard
from torch_xlstm_ops.parallel.state_directory import StateLink
from torch_xlstm_ops.schedules.ray import serialization


class ShardRead(NamedTuple):
    """The measurements of one shard, and the result of the last one."""

    shard: Shard
    seconds: float
    layers: tuple[str, ...]  # the operator of each layer
    waits: tuple[float, ...]  # seconds of waiting, by layer; empty in the first shard
    sent: tuple[int, ...]  # bytes, by layer; empty in the last shard
    cold: bool  # whether it was the worker's first shard, which compiles
    result: Any = None  # of the last shard: logits and cache as a SerializedModel, or a reference to it

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


class Worker:
    """An actor that holds a model."""

    def __init__(
        self, model: models.SerializedModel, call: models.Call, settings: Mapping[str, Any], device: str, threads: int
    ) -> None:
        from torch_xlstm_ops.patch import patch

        os.environ.pop(config.SETTINGS["trace"].variable, None)  # only the caller writes the trace file
        torch.set_num_threads(threads)
        serialization.suppress_read_only_warning()
        self._call, self._settings, self._device = call, settings, torch.device(device)
        self._cold = True
        self._model = models.deserialize(model, self._device, copy=False).eval()
        if call is models.transformers_call:
            models.prepare_transformers(self._model)
            patch("transformers")  # also its cache

    def ready(self) -> int:
        """Return the process's id, once the model is loaded."""
        return os.getpid()

    def read(
        self, directory: Any, prompt: int, tokens: serialization.TensorBytes, shard: Shard, summarize_first: bool
    ) -> ShardRead:
        """Read a shard's tokens (B, S), starting from the states of the previous shard in the directory."""
        began, link = time.perf_counter(), StateLink(directory, prompt, shard.number)
        (ids,) = serialization.from_bytes([tokens], self._device)
        mode = SequenceParallelMode(link, first=shard.number == 0, last=shard.last, summarize_first=summarize_first)
        with config.use(**self._settings), torch.inference_mode(), mode:
            logits, cache = self._call(self._model, ids.clone(), shard.start)
        if not mode.calls:
            raise RuntimeError("the model called none of our operators: patch it, or pass a call that uses them")
        result = self._store(models.serialize((logits, cache))) if shard.last else None
        cold, self._cold = self._cold, False
        return ShardRead(shard, time.perf_counter() - began, tuple(mode.calls), tuple(link.waits), tuple(link.sent),
                    cold, result)

    def _store(self, result: models.SerializedModel) -> Any:
        """Put the logits and the cache into the store."""
        import ray

        with serialization.store_errors("the logits and states after the prompt", serialization.nbytes(result.tensors)):
            return ray.put(result)
