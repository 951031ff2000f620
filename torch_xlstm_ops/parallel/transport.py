"""Tensors between processes: from GPU to GPU of one host, or as bytes through Ray's store."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops.parallel import device_memory
from torch_xlstm_ops.runtime import devices
from torch_xlstm_ops.schedules.ray.serialization import TensorBytes

ALIGNMENT = 16  # bytes, of a tensor in a buffer
DEVICE, HOST = "device", "host"  # where tensors travel


class DeviceTensors(NamedTuple):
    """Tensors in one buffer of another process's GPU."""

    memory: device_memory.Exported
    layout: tuple[tuple[torch.dtype, tuple[int, ...]], ...]


class Buffers:
    """Buffers that are kept from prompt to prompt, by key; another process may read them until the next prompt."""

    def __init__(self) -> None:
        self._kept: dict[Any, Tensor] = {}

    def get(self, key: Any, nbytes: int, device: torch.device) -> Tensor:
        """Return a buffer (nbytes,) on a GPU, or of pinned memory for the CPU."""
        found = self._kept.get((key, device.type))
        if found is None or found.numel() != nbytes:
            pinned = device.type == "cpu"
            found = torch.empty(nbytes, dtype=torch.uint8, device=device, pin_memory=pinned)
            self._kept[key, device.type] = found
        return found


def layout_of(tensors: Sequence[Tensor]) -> tuple[tuple[torch.dtype, tuple[int, ...]], ...]:
    """Return what `views` needs to know of tensors."""
    return tuple((t.dtype, tuple(t.shape)) for t in tensors)


def buffer_bytes(layout: Sequence[tuple[torch.dtype, tuple[int, ...]]]) -> int:
    """Return the size of a buffer for tensors; at least 1."""
    return max(1, sum(_padded(dtype, shape) for dtype, shape in layout))


def views(buffer: Tensor, layout: Sequence[tuple[torch.dtype, tuple[int, ...]]]) -> list[Tensor]:
    """Return the tensors that lie in a buffer of bytes."""
    found, start = [], 0
    for dtype, shape in layout:
        size = math.prod(shape) * dtype.itemsize
        found.append(buffer[start:start + size].view(dtype).view(shape))
        start += _padded(dtype, shape)
    return found


def pack(tensors: Sequence[Tensor], buffer: Tensor) -> None:
    """Copy tensors into a buffer, on the current stream; return before it is done."""
    for target, t in zip(views(buffer, layout_of(tensors)), tensors, strict=True):
        target.copy_(t, non_blocking=True)


def exported(tensors: Sequence[Tensor], buffer: Tensor) -> DeviceTensors:
    """Return what another process needs to read packed tensors."""
    return DeviceTensors(device_memory.export(buffer), layout_of(tensors))


def pinned_bytes(tensors: Sequence[Tensor], buffer: Tensor) -> list[TensorBytes]:
    """Return the bytes of tensors packed into pinned memory, once they are there."""
    return [TensorBytes(part.reshape(-1).view(torch.uint8).numpy(), part.dtype, tuple(part.shape))
            for part in views(buffer, layout_of(tensors))]


def received(data: DeviceTensors, mappings: device_memory.Mappings, device: torch.device) -> list[Tensor]:
    """Copy tensors from another process's GPU, on the current stream; return before it is done."""
    buffer = torch.empty(data.memory.nbytes, dtype=torch.uint8, device=device)
    mappings.copy(data.memory, buffer)
    return views(buffer, data.layout)


def _padded(dtype: torch.dtype, shape: Sequence[int]) -> int:
    return -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT


class Sender:
    """A thread that waits for the GPU, and then does what sends its results; the thread of the model never waits."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[tuple[devices.Event, Callable[[], None]] | None] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._failed: BaseException | None = None
        threading.Thread(target=self._run, name="xlstm-sender", daemon=True).start()

    def after(self, event: devices.Event, action: Callable[[], None]) -> None:
        """Have an action done once the GPU has reached an event; actions are done in order."""
        self._work.put((event, action))

    def flush(self) -> None:
        """Wait until all is done; raise the first exception of an action."""
        self._work.put(None)
        self._idle.acquire()
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed

    def _run(self) -> None:
        while True:
            item = self._work.get()
            if item is None:
                self._idle.release()
                continue
            event, action = item
            try:
                event.synchronize()
                action()
            except BaseException as error:  # `flush` raises it
                self._failed = self._failed or error
