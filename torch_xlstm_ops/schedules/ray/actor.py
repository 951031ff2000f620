"""A Ray actor that runs functions sent by value, and the caller's handle to it."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from torch_xlstm_ops.config import SETTINGS
from torch_xlstm_ops.kernels.mlstm import Run
from torch_xlstm_ops.schedules.ray import serialization


class Actor:
    """What runs in an actor's process."""

    def __init__(self, device: str, threads: int) -> None:
        os.environ.pop(SETTINGS["trace"].variable, None)  # only the caller writes the trace file
        torch.set_num_threads(threads)
        serialization.suppress_read_only_warning()
        self._device = torch.device(device)
        self._functions: dict[bytes, Run] = {}

    def ready(self) -> int:
        """Return the process's id, once it has started."""
        return os.getpid()

    def heartbeat(self) -> None:
        """Return at once, also while a task runs."""

    def call(self, pickled: bytes, args: Sequence[serialization.TensorBytes]) -> list[serialization.TensorBytes]:
        """Call a pickled function with tensors."""
        from ray import cloudpickle

        function = self._functions.get(pickled)
        if function is None:
            self._functions[pickled] = function = cloudpickle.loads(pickled)
        with torch.no_grad():
            return serialization.to_bytes(function(serialization.from_bytes(args, self._device)))


class ActorHandle:
    """An actor as the caller sees it; starts it."""

    def __init__(self, number: int, device: str) -> None:
        import ray

        resources = {"num_cpus": 1} if device == "cpu" else {"num_cpus": 0, "num_gpus": 1}
        threads = 1 if device == "cpu" else torch.get_num_threads()
        options = {**resources, "scheduling_strategy": "SPREAD", "max_restarts": 0}
        self.number = number
        self.queued = 0  # tasks that it was given and has not finished
        self.actor = ray.remote(concurrency_groups={"heartbeat": 1})(Actor).options(**options).remote(device, threads)
        self.started = self.actor.ready.remote()

    def kill(self) -> None:
        """End the actor's process."""
        import ray

        ray.kill(self.actor)
