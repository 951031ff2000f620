"""Which processes of a host can read each other's GPU memory: tried before a prompt, with a little of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from torch_xlstm_ops.parallel import transport
from torch_xlstm_ops.parallel.device_memory import DeviceMemoryError, Mappings

_log = logging.getLogger("torch_xlstm_ops.ray")
_PATTERN = 90  # of the bytes that are tried


def offer(buffers: transport.Buffers, device: torch.device) -> transport.DeviceTensors | None:
    """Return memory of the GPU for another process to try, or None if there is none to share."""
    if device.type != "cuda":
        return None
    tried = [torch.full((1024,), _PATTERN, dtype=torch.uint8, device=device)]
    try:
        return share(tried, buffers, device, "offer")
    except DeviceMemoryError as error:
        _log.info("the memory of this GPU cannot be shared: %s", error)
        return None


def accepts(offered: transport.DeviceTensors | None, device: torch.device) -> bool:
    """Return whether this process can read memory that another offers."""
    if offered is None or device.type != "cuda":
        return False
    mappings = None
    try:
        mappings = Mappings(device)
        (found,) = transport.received(offered, mappings, device)
        return bool((found == _PATTERN).all())
    except DeviceMemoryError as error:
        _log.info("the GPU memory of another process cannot be read: %s", error)
        return False
    finally:
        if mappings is not None:
            mappings.close()


def share(
    tensors: Sequence[Tensor], buffers: transport.Buffers, device: torch.device, key: str = "result"
) -> transport.DeviceTensors:
    """Return tensors as another process reads them, packed into a buffer of the GPU; wait until they are there."""
    size = transport.buffer_bytes(transport.layout_of(tensors))
    buffer = buffers.get(key, size, device)
    transport.pack(tensors, buffer)
    torch.cuda.synchronize(device)
    return transport.exported(tensors, buffer)


def take(shared: transport.DeviceTensors, device: torch.device) -> list[Tensor]:
    """Return copies of another process's tensors on a device of this one, once they are there.

    Raises DeviceMemoryError if its memory cannot be read.
    """
    mappings = Mappings(device)
    try:
        return transport.received(shared, mappings, device)
    finally:
        mappings.close()
