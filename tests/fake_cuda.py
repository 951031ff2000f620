"""A GPU for tests: torch's functions that load and launch machine code, which note what they are given.

The two kernels that it knows add one to a tensor, and copy a matrix; all tensors are on the CPU.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MACHINE_CODE = b"\x7fELF"  # how a file begins that the driver accepts
STREAM = 7


def add_one(source: Tensor, target: Tensor, *sizes: object) -> None:
    target.copy_(source + 1)


def copy_matrix(source: Tensor, target: Tensor, *sizes: object) -> None:
    target.copy_(source)


KERNELS: dict[str, Callable[..., None]] = {"triton_poi_fused_0": add_one, "triton_red_fused_1": copy_matrix}


class Launcher:
    """Torch's launcher. modules: whether `_load_kernel` returns the module too, as torch 2.13 does."""

    def __init__(self, *, modules: bool) -> None:
        self._modules = modules
        self.loaded: list[tuple[str, int, int]] = []
        self.launched: list[tuple[object, ...]] = []

    def _load_kernel(self, path: str, function: str, shared: int, device: int) -> tuple[int, ...]:
        if not Path(path).read_bytes().startswith(MACHINE_CODE):
            raise RuntimeError("CUDA driver error: device kernel image is invalid")
        self.loaded.append((function, shared, device))
        handle = 99 + len(self.loaded)
        return (1, handle, 32, 0) if self._modules else (handle, 32, 0)

    def _launch_kernel(
        self, function: int, x: int, y: int, z: int, warps: int, shared: int, types: str, args: tuple[Any, ...],
        stream: int,
    ) -> None:
        assert len(types) == len(args)
        name = self.loaded[function - 100][0]
        shapes = [list(arg.shape) if isinstance(arg, Tensor) else arg for arg in args]
        self.launched.append((name, x, y, z, warps, shared, types, shapes, stream))
        KERNELS[name](*args)


class BoundLauncher:
    """Torch's launcher that holds what does not change, as torch 2.13 has one; made by `bind`."""

    def __init__(self, launcher: Launcher, function: int, warps: int, shared: int, types: str, scratch: int) -> None:
        self._launch, self._fixed = launcher._launch_kernel, (warps, shared, types + "O" * scratch)
        self._function, self._scratch = function, scratch

    def __call__(self, x: int, y: int, z: int, stream: int, *args: object) -> None:
        self._launch(self._function, x, y, z, *self._fixed, (*args, *[None] * self._scratch), stream)


BoundLauncher.__name__ = "_FastCudaLauncher"
Set = Callable[[object, str, object], None]


def install(put: Set, *, modules: bool = False) -> Launcher:
    """Give torch the fake GPU by ``put(owner, name, value)``."""
    launcher = Launcher(modules=modules)
    put(torch._C, "_StaticCudaLauncher", launcher)
    put(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM)
    guards = importlib.import_module("torch._C._dynamo.guards")
    put(guards, "_empty_strided_cuda", guards._empty_strided_cpu)
    for name in ("device", "_DeviceGuard"):
        put(torch.cuda, name, lambda index: contextlib.nullcontext())
    put(torch.cuda, "set_device", lambda index: None)
    return launcher


def run_kept(folder: str, key: str, sizes: Sequence[int]) -> str:
    """Call a kept function in a process of its own, and return what it loaded, launched and computed, as text."""
    from torch_xlstm_ops.runtime.kernel_store import Request, Store

    launcher = install(setattr)
    store = Store(Path(folder))
    found = store.find(Request(store.read(key).properties))
    assert found is not None
    x = torch.arange(float(sizes[0] * sizes[1])).view(*sizes)
    results = [t.tolist() for t in found.call([x, torch.eye(sizes[1])])]
    return repr((launcher.loaded, launcher.launched, results))
