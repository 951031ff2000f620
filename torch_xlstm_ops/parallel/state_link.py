"""A shard's connection to the shards before and after it: sends and receives the states between them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_xlstm_ops.parallel import transport
from torch_xlstm_ops.parallel.clock import WaitClock
from torch_xlstm_ops.parallel.device_memory import DeviceMemoryError, Mappings
from torch_xlstm_ops.runtime import devices
from torch_xlstm_ops.schedules.ray import serialization

CPU = torch.device("cpu")


class StateLink:
    """Sends and receives states for one shard; records waiting times and sizes.

    On CUDA nothing here waits for the GPU: a state is announced by the sender once the GPU has it.
    """

    def __init__(
        self, directory: Any, prompt: int, shard: int, device: torch.device = CPU, *,
        sender: transport.Sender | None = None, buffers: transport.Buffers | None = None, way: str = transport.HOST,
    ) -> None:
        """way: how states go to the next shard; sender, buffers: of the worker, on CUDA."""
        self._directory, self._prompt, self._shard, self._device = directory, prompt, shard, device
        self._sender, self._buffers, self._way = sender, buffers, way
        self._clock = WaitClock(device)
        self._mappings = Mappings(device) if device.type == "cuda" else None
        self._asked: dict[int, Any] = {}  # references to places that were asked for ahead, by layer
        self.sent: list[int] = []  # bytes, layer by layer
        self.hops: list[float] = []  # seconds from when a state was there and wanted until it was received

    @property
    def waits(self) -> list[float]:
        """Return the seconds of waiting, layer by layer."""
        return self._clock.seconds()

    def find(self, layer: int) -> list[Tensor]:
        """Return the state after a layer of the previous shard; wait until it is stored."""
        import ray
        from ray.exceptions import ObjectLostError

        self._clock.start()
        wanted, lost = time.time(), 0
        while True:
            place = ray.get(self._asked.pop(layer, None) or self._ask(layer, lost))
            if not place:
                raise RuntimeError(f"prompt {self._prompt} ended before shard {self._shard - 1} was read")
            state, stored = place
            try:
                found = self._receive(state)
            except (ObjectLostError, DeviceMemoryError):  # its owner or its node died
                lost += 1
                continue
            self._clock.stop()
            self.hops.append(max(0.0, time.time() - max(wanted, stored)))
            if self._mappings is not None:
                self._asked[layer + 1] = self._ask(layer + 1, 0)
            return found

    def _ask(self, layer: int, lost: int) -> Any:
        return self._directory.find.remote(self._prompt, self._shard - 1, layer, lost)

    def _receive(self, state: Any) -> list[Tensor]:
        import ray

        if isinstance(state, transport.DeviceTensors):
            assert self._mappings is not None
            return transport.received(state, self._mappings, self._device)
        return serialization.from_bytes(ray.get(state), self._device)

    def store(self, layer: int, state: Sequence[Tensor]) -> None:
        """Store the state after a layer, for the next shard."""
        if self._sender is None or self._buffers is None:
            data = serialization.to_bytes(state)
            self.sent.append(serialization.nbytes(data))
            self._announce_bytes(layer, data)
            return
        tensors = list(state)
        self.sent.append(sum(t.numel() * t.element_size() for t in tensors))
        device = self._device if self._way == transport.DEVICE else CPU
        size = transport.buffer_bytes(transport.layout_of(tensors))
        buffer = self._buffers.get(layer, size, device)
        transport.pack(tensors, buffer)
        event = devices.event(self._device, timing=False)
        event.record()
        if self._way == transport.DEVICE:
            where = transport.exported(tensors, buffer)
            self._sender.after(event, lambda: self._announce(layer, where))
        else:
            data = transport.pinned_bytes(tensors, buffer)
            self._sender.after(event, lambda: self._announce_bytes(layer, data))

    def _announce_bytes(self, layer: int, data: list[serialization.TensorBytes]) -> None:
        import ray

        with serialization.store_errors(f"the state after layer {layer}", serialization.nbytes(data)):
            reference = ray.put(data)
        self._announce(layer, reference)

    def _announce(self, layer: int, where: Any) -> None:
        self._directory.store.remote(self._prompt, self._shard, layer, [where, time.time()])

    def close(self) -> None:
        """Wait for what is on its way, and close the memory of other processes; raise what failed in sending."""
        try:
            if self._mappings is not None:
                self._mappings.close()
        finally:
            if self._sender is not None:
                self._sender.flush()
