"""CUDA memory that other processes of the host read: the driver's interprocess handles, and copies from them.

A process may open memory of a GPU that CUDA_VISIBLE_DEVICES hides from it; the copy then goes over NVLink or PCIe.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1  # flag of cuIpcOpenMemHandle


class DeviceMemoryError(RuntimeError):
    """Memory cannot be shared, or its process has ended."""


class Exported(NamedTuple):
    """Memory of this or another process."""

    handle: bytes  # of the allocation that it lies in
    offset: int  # in bytes, from the start of the allocation
    nbytes: int


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_ubyte * HANDLE_BYTES),)


def export(t: Tensor) -> Exported:
    """Return a handle to the memory of a contiguous CUDA tensor, which the caller keeps.

    Raises DeviceMemoryError where the driver has none, as for expandable segments.
    """
    base, size, handle = ctypes.c_uint64(), ctypes.c_size_t(), _Handle()
    pointer = ctypes.c_uint64(t.data_ptr())
    _call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), pointer)
    _call("cuIpcGetMemHandle", ctypes.byref(handle), base)
    return Exported(bytes(handle.reserved), t.data_ptr() - base.value, t.numel() * t.element_size())


class Mappings:
    """Memory of other processes, open in this one until `close`; used by one thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._bases: dict[bytes, int] = {}
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # makes the context of the device current in this thread

    def copy(self, exported: Exported, into: Tensor) -> None:
        """Copy memory into a contiguous tensor of the device, on its current stream; return before it is done.

        Raises DeviceMemoryError if the memory cannot be opened, as that of a process that has ended.
        """
        with torch.cuda.device(self._device):
            source = self._open(exported.handle) + exported.offset
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            _call("cuMemcpyAsync", ctypes.c_uint64(into.data_ptr()), ctypes.c_uint64(source),
                  ctypes.c_size_t(exported.nbytes), stream)

    def close(self) -> None:
        """Wait for the copies, and close the memory."""
        if not self._bases:
            return
        with torch.cuda.device(self._device):
            torch.cuda.current_stream().synchronize()
            while self._bases:
                _, base = self._bases.popitem()
                _call("cuIpcCloseMemHandle", ctypes.c_uint64(base))

    def _open(self, handle: bytes) -> int:
        if handle not in self._bases:
            base, given = ctypes.c_uint64(), _Handle.from_buffer_copy(handle)
            _call("cuIpcOpenMemHandle_v2", ctypes.byref(base), given, ctypes.c_uint(_LAZY_PEER_ACCESS))
            self._bases[handle] = base.value
        return self._bases[handle]


def _call(name: str, *arguments: Any) -> None:
    """Call a function of the CUDA driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DeviceMemoryError(f"the CUDA driver cannot be loaded: {error}") from error
    status = getattr(driver, name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        driver.cuGetErrorName(status, ctypes.byref(text))
        raise DeviceMemoryError(f"{name}: {text.value.decode() if text.value else status}")
