"""Take the code that Inductor generated for the CPU or CUDA apart, and put it together without importing Inductor.

Inductor generates Python that allocates buffers and calls kernels, and one extension module for each kernel, or one for
the whole function (``cpp_wrapper``); for CUDA, machine code by Triton. They need nothing of Inductor when they run;
only its generated imports do.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
import math
import os
from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from torch_xlstm_ops.runtime.torch_internals import generated_cuda
from torch_xlstm_ops.runtime.torch_internals.compile import Raw
from torch_xlstm_ops.runtime.torch_internals.need import need

_ENTRY = "call"
# Kernels read a tensor's address by this function of torch, which the process names in its environment.
_ADDRESS_VARIABLE = "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"
_EXTERN = "extern_kernels"  # operators of torch that write into a buffer
# Functions of torch, by their names there.
_EXTERN_NAMES = {"addmm": "addmm", "baddbmm": "baddbmm", "bmm": "bmm", "bmm_dtype": "bmm", "mm": "mm", "mm_dtype": "mm"}
# What the Python may use of torch.
_NAMES = {
    "torch": "torch",
    "aten": "torch.ops.aten",
    "device": "torch.device",
    "empty_strided": "torch.empty_strided",
    "empty_strided_cpu": "torch._C._dynamo.guards._empty_strided_cpu",
    "reinterpret_tensor": "torch._C._dynamo.guards._reinterpret_tensor",
    "assert_size_stride": "torch._C._dynamo.guards.assert_size_stride",
    "assert_alignment": "torch._C._dynamo.guards.assert_alignment",
    "alloc_from_pool": "torch.ops.inductor._alloc_from_pool",
}


class Kernel(NamedTuple):
    """A function of an extension module, or of machine code for a GPU."""

    path: str  # of the file
    module: str  # the name that an extension module's initialisation has
    function: str
    device: int | None = None  # the index of the GPU; None: it is of an extension module
    shared: int = 0  # bytes of memory that a block of a GPU shares


class Generated(NamedTuple):
    """A compiled function: Python that defines `call`, and the kernels by the names that it uses."""

    source: str
    kernels: Mapping[str, Kernel]


def _never(call: Raw) -> Generated | None:
    return None


@need(_never, where=("torch._C._dynamo.guards._empty_strided_cpu", "torch._C._dynamo.guards._reinterpret_tensor"),
      without="kernels are not kept for other processes")
def taken_apart(call: Raw) -> Generated | None:
    """Return the parts of what `compile_raw` returned for the CPU or CUDA, or None if they need more than torch.

    For CUDA also None before its first call has chosen among kernels.
    """
    check = generated_cuda.checked(call)
    if check is None:
        return None
    space = getattr(getattr(check.call, "__func__", check.call), "__globals__", {})
    if space.get(_ENTRY) != check.call or not str(space.get("__file__")).endswith(".py"):
        return None
    tree = ast.parse(Path(space["__file__"]).read_text(encoding="utf-8"))
    parts = _parts(space, tree)
    if parts is None or not (parts.kernels or parts.launches):
        return None
    direct = generated_cuda.Direct(parts.launches)
    module = direct.visit(ast.Module([node for node in tree.body if node in parts.kept], []))
    sources = [*(launch.source for launch in parts.launches.values()), ast.unparse(ast.fix_missing_locations(module)),
               generated_cuda.realigned(check)]
    if not direct.plain or not _is_plain(module):
        return None
    launched = {generated_cuda.loaded(name): Kernel(one.path, "", one.function, one.device, one.shared)
                for name, one in parts.launches.items()}
    return Generated("\n\n".join(filter(None, sources)), {**parts.kernels, **launched})


class _Parts(NamedTuple):
    """What `call` uses of a generated module."""

    kept: list[ast.stmt]
    kernels: dict[str, Kernel]
    launches: dict[str, generated_cuda.Launch]


def _parts(space: Mapping[str, Any], tree: ast.Module) -> _Parts | None:
    defined = {name: node for node in tree.body for name in _defines(node)}
    kept, kernels, launches, wanted, seen = [], {}, {}, [_ENTRY], set[str]()
    while wanted:
        name = wanted.pop()
        if name in seen or (name not in defined and name not in space):  # a local variable, or a builtin
            continue
        seen.add(name)
        if name not in space or name not in defined:  # such as a constant, which Inductor adds to the module
            return None
        kernel = _kernel(space[name])
        if kernel is not None:
            kernels[name] = kernel
        elif generated_cuda.is_triton(space[name]):
            launch = generated_cuda.triton_kernel(space[name], name)
            if launch is None:
                return None
            launches[name] = launch
        elif name not in _NAMES and name not in generated_cuda.NAMES and name not in (_EXTERN, "inf", "nan", "math"):
            node = defined[name]
            if isinstance(node, (ast.Import, ast.ImportFrom)) or _is_filled(node, space[name]):
                return None
            kept.append(node)
            wanted += _reads(node)
        elif not _same(name, space[name], tree):
            return None
    return _Parts(kept, kernels, launches)


def _is_filled(node: ast.stmt, value: object) -> bool:
    """Return whether a name has another value than the constant, such as None, that the Python gives it."""
    return (isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            and type(node.value.value) is not type(value))


def _defines(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name for alias in node.names]
    return []


def _reads(node: ast.stmt) -> list[str]:
    return [found.id for found in ast.walk(node) if isinstance(found, ast.Name) and isinstance(found.ctx, ast.Load)]


def _kernel(value: object) -> Kernel | None:
    """Return where a function comes from that an extension module of Inductor's cache has, or None for another."""
    module: Any = getattr(value, "__self__", None)
    path = getattr(module, "__file__", None)
    if type(value) is not type(len) or path is None or Path(path).is_relative_to(Path(torch.__file__).parent):
        return None
    return Kernel(path, module.__name__.rpartition(".")[2], str(getattr(value, "__name__", "")))


def _same(name: str, value: object, tree: ast.Module) -> bool:
    """Return whether a name means here what it means in the generated module."""
    if name != _EXTERN:
        return _names().get(name) is value
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name) and node.value.id == _EXTERN}
    return all(name in _EXTERN_NAMES and getattr(value, name) is getattr(torch, _EXTERN_NAMES[name]) for name in used)


def _is_plain(module: ast.Module) -> bool:
    """Return whether code imports nothing, and reads no part of torch that only Inductor loads."""
    return not any(
        isinstance(node, (ast.Import, ast.ImportFrom))
        or (isinstance(node, ast.Attribute) and node.attr in ("_inductor", "_dynamo", "inductor"))
        for node in ast.walk(module)
    )


def _names() -> dict[str, Any]:
    """Return what the Python may use, by name."""
    found: dict[str, Any] = {name: reduce(getattr, path.split(".")[1:], torch) for name, path in _NAMES.items()}
    extern = SimpleNamespace(**{name: getattr(torch, real) for name, real in _EXTERN_NAMES.items()})
    return {**found, **generated_cuda.names(), _EXTERN: extern, "inf": math.inf, "nan": math.nan, "math": math}


def _cannot(generated: Generated, name: str) -> Raw | None:
    return None


@need(_cannot, where=("torch._C._dynamo.guards._torchinductor_pyobject_tensor_data_ptr",),
      without="kernels that an earlier process kept are not used")
def put_together(generated: Generated, name: str) -> Raw | None:
    """Return the callable that `taken_apart` was given; None if this torch cannot.

    name: a valid name of a module, different for different kernels.

    Raises ImportError, or RuntimeError for a GPU, if a kernel cannot be loaded.
    """
    address = torch._C._dynamo.guards._torchinductor_pyobject_tensor_data_ptr  # type: ignore[attr-defined]
    space: dict[str, Any] = {"__builtins__": builtins, "__name__": name, **_names()}
    os.environ[_ADDRESS_VARIABLE] = str(address)  # as Inductor, which another thread may run, does and leaves it
    for at, (used, kernel) in enumerate(generated.kernels.items()):
        space[used] = _load(kernel, f"{name}_{at}") if kernel.device is None else generated_cuda.load(
            kernel.path, kernel.function, kernel.device, kernel.shared)
        if space[used] is None:
            return None
    exec(compile(generated.source, f"<{name}>", "exec"), space)
    call: Raw = space[_ENTRY]
    return call


def _load(kernel: Kernel, package: str) -> Callable[..., Any]:
    spec = importlib.util.spec_from_file_location(f"{package}.{kernel.module}", kernel.path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{kernel.path} is not an extension module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function: Callable[..., Any] = getattr(module, kernel.function)
    return function
