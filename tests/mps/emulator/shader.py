"""Stands in for ``torch._C._mps_compileShader``: Metal source in, callable kernels on host memory out."""

from __future__ import annotations

import ctypes
import hashlib
import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import build, device
from .log import Launch, Operand
from .translate import KernelSource, NotUnderstood, kernels_of, to_cpp

MAX_BUFFERS = 31
MAX_THREADS = 1024
ERROR_BUFFER_BYTES = 1 << 16
STATISTICS = (
    "groups", "threads", "barriers", "simd_operations", "partial_simd_operations", "divergent_barriers",
    "divergent_simd", "threadgroup_bytes", "out_of_bounds", "absent_lane_reads",
    "racing_accesses",
)


class Library:
    """The kernels of one Metal source, as attributes."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.path = _save(source)
        try:
            sources = kernels_of(source)
            self._dll = None if device.is_dry() else self._build(sources)
        except (NotUnderstood, build.BuildFailed) as error:
            raise NotUnderstood(f"the MPS emulator cannot run {self.path}: {error}") from error
        self._kernels = {kernel.name: Kernel(kernel, self) for kernel in sources}

    def __getattr__(self, name: str) -> Kernel:
        kernels: dict[str, Kernel] = self.__dict__.get("_kernels", {})
        if name not in kernels:
            raise AttributeError(name)
        return kernels[name]

    def __dir__(self) -> list[str]:
        return list(self._kernels)

    def function(self, name: str) -> Any:
        """Return the C function that launches kernel `name`."""
        if self._dll is None:
            raise RuntimeError("this library was only recorded: it was made while the emulator ran dry")
        return getattr(self._dll, f"launch_{name}")

    def _build(self, kernels: list[KernelSource]) -> ctypes.CDLL:
        return ctypes.CDLL(str(build.kernel_library(to_cpp(self.source, kernels))))


class Kernel:
    """One kernel, called as Inductor's wrapper calls it."""

    def __init__(self, source: KernelSource, library: Library) -> None:
        if len(source.buffers) > MAX_BUFFERS:
            raise NotUnderstood(
                f"{source.name} in {library.path} has {len(source.buffers)} buffers, Metal allows {MAX_BUFFERS}"
            )
        self.source, self.library = source, library

    def __call__(
        self, *args: Any, threads: Any = None, group_size: Any = None, arg_casts: Any = None,
        error_buf_idx: int | None = None,
    ) -> None:
        if arg_casts is not None:
            raise NotImplementedError(f"{self.source.name}: arg_casts")
        arguments = list(args)
        if error_buf_idx is not None:
            arguments.insert(error_buf_idx, (ctypes.c_char * ERROR_BUFFER_BYTES)())
        if len(arguments) != len(self.source.buffers):
            expected = len(self.source.buffers)
            raise TypeError(f"{self.source.name} has {expected} buffers, got {len(arguments)} arguments")
        grid = _sizes(threads) if threads is not None else (args[0].numel(),)
        group = _sizes(group_size) if group_size is not None else None
        self._check_group(group)
        bound = [_bind(self.source.name, a) for a in arguments]
        statistics, sequence, overlapped = self._run(bound, grid, group)
        operands = tuple(
            _operand(p.name, a, p.is_written) for p, a in zip(self.source.buffers, arguments, strict=True)
        )
        device.add_launch(Launch(
            sequence=sequence, kernel=self.source.name, source=str(self.library.path), threads=grid, group=group,
            buffers=operands, statistics=statistics, thread=threading.get_ident(), overlapped=overlapped,
        ))
        if error_buf_idx is not None and arguments[error_buf_idx][0] != b"\0":
            raise RuntimeError(f"{self.source.name} reported an error on the device")

    def _run(
        self, bound: list[_Bound], grid: tuple[int, ...], group: tuple[int, ...] | None
    ) -> tuple[dict[str, int], int, bool]:
        native = device.native()
        sequence = native.mps_emulator_enter()
        statistics = (ctypes.c_uint64 * len(STATISTICS))()
        error = ctypes.create_string_buffer(256)
        failed = 0
        try:
            if not device.is_dry():
                pairs = [word for b in bound for word in (b.address, b.nbytes)]
                failed = self.library.function(self.source.name)(
                    (ctypes.c_void_p * max(1, len(pairs)))(*pairs), _uint3(grid), _uint3(group or (1,)),
                    device.order(), self._works_in_place(bound), statistics, error,
                )
        finally:
            overlapped = bool(native.mps_emulator_leave())
        if failed:
            raise RuntimeError(f"{self.source.name} in {self.library.path}: {error.value.decode()}")
        return dict(zip(STATISTICS, statistics, strict=True)), sequence, overlapped

    def _works_in_place(self, bound: list[_Bound]) -> bool:
        """Whether the kernel writes memory that it also reads under another name."""
        named = list(zip(self.source.buffers, bound, strict=True))
        return any(w.overlaps(r) for out, w in named if out.is_written for into, r in named if not into.is_written)

    def _check_group(self, group: tuple[int, ...] | None) -> None:
        limit = self.source.max_threads or MAX_THREADS
        if group is not None and math.prod(group) > limit:
            raise RuntimeError(f"{self.source.name}: a threadgroup of {math.prod(group)} threads, at most {limit}")
        if group is None and self.source.is_cooperative:
            raise RuntimeError(f"{self.source.name}: its threads meet, so it needs a group_size")


class _Bound:
    """The memory behind one argument, alive as long as this is."""

    def __init__(self, address: int | None, nbytes: int, owner: Any) -> None:
        self.address, self.nbytes, self.owner = address or 0, nbytes, owner

    def overlaps(self, other: _Bound) -> bool:
        """Whether the two share a byte."""
        return self.address < other.address + other.nbytes and other.address < self.address + self.nbytes


def _bind(kernel: str, argument: Any) -> _Bound:
    if isinstance(argument, torch.Tensor):
        if argument.device.type == "mps":
            return _Bound(argument.data_ptr(), _extent(argument), argument)
        if argument.dim() != 0:
            raise TypeError(f"{kernel}: a tensor of shape {tuple(argument.shape)} on {argument.device}")
        # A scalar on the host travels by value, in float32 at most.
        value = argument.detach().to(torch.float32 if argument.dtype == torch.float64 else argument.dtype)
        return _Bound(value.data_ptr(), value.element_size(), value)
    if isinstance(argument, bool):
        return _by_value(ctypes.c_bool(argument))
    if isinstance(argument, int):
        return _by_value(ctypes.c_int64(argument))
    if isinstance(argument, float):
        return _by_value(ctypes.c_float(argument))
    if isinstance(argument, ctypes.Array):
        return _by_value(argument)
    raise TypeError(f"{kernel}: an argument of type {type(argument).__name__}")


def _by_value(value: Any) -> _Bound:
    return _Bound(ctypes.addressof(value), ctypes.sizeof(value), value)


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from the first to the last element."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _operand(name: str, argument: Any, written: bool) -> Operand:
    if isinstance(argument, torch.Tensor):
        dtype = str(argument.dtype).removeprefix("torch.")
        return Operand(tuple(argument.shape), dtype, _extent(argument), written, argument.device.type, name)
    return Operand((), type(argument).__name__, 8, written, "cpu", name)


def _sizes(sizes: int | Sequence[int]) -> tuple[int, ...]:
    return (sizes,) if isinstance(sizes, int) else tuple(sizes)


def _uint3(sizes: tuple[int, ...]) -> Any:
    return (ctypes.c_uint * 3)(*sizes, *(1,) * (3 - len(sizes)))


def _save(source: str) -> Path:
    """Keep the Metal source in the cache, for error messages and for the cost model."""
    folder = build.cache_folder() / "source"
    folder.mkdir(exist_ok=True)
    path = folder / f"{hashlib.sha256(source.encode()).hexdigest()[:20]}.metal"
    if not path.exists():
        path.write_text(source)
    return path
