"""Take Inductor's Triton kernels apart: their machine code, and Python that launches it as Inductor does.

Inductor launches a kernel by functions of torch that need neither Inductor nor Triton (its "static launcher"): one
loads machine code from a file, the other passes arguments to it. The grid is Python that Inductor generates.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
from collections.abc import Mapping, Sequence
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops.runtime.torch_internals.compile import Raw
from torch_xlstm_ops.runtime.torch_internals.need import need

_HEURISTICS, _UTILS = "torch._inductor.runtime.triton_heuristics", "torch._inductor.utils"
ALIGNMENT = 16  # bytes: kernels assume it of the addresses of arguments
# What the Python of a function on a GPU may use of torch, as far as this torch has it.
NAMES = {
    "get_raw_stream": "torch._C._cuda_getCurrentRawStream",
    "empty_strided_cuda": "torch._C._dynamo.guards._empty_strided_cuda",
}
# What the Python that this module writes uses.
_LAUNCH, _LAUNCHER, _ALIGNED = "_launch_kernel", "_bound_launcher", "_aligned"
_GRID = "grid_0, grid_1, grid_2"
# Attributes of Inductor's kernels that are understood; others must be empty, as they may change how a kernel runs.
_ATTRIBUTES = {
    "C_impl", "arg_names", "arg_tys", "cubin_path", "cubin_raw", "declared_constexprs", "full_constexprs", "function",
    "global_scratch_align", "has_global_scratch", "has_profile_scratch", "hash", "module", "n_regs", "n_spills", "name",
    "num_warps", "shared",
}


class Launch(NamedTuple):
    """A Triton kernel: machine code in a file, and Python that defines a function of its arguments and a stream."""

    path: str
    function: str  # in the file
    device: int
    shared: int  # bytes of memory that a block shares
    source: str


class Checked(NamedTuple):
    """A compiled function, and the positions of the arguments that must be aligned, and that it writes."""

    call: Raw
    aligned: Sequence[int]
    written: Sequence[int]


def checked(call: Raw) -> Checked | None:
    """Return what Inductor checks before it calls a function on a GPU; None for a wrapper that is not understood."""
    if getattr(call, "__qualname__", "") != "align_inputs_from_check_idxs.<locals>.run":
        return Checked(call, (), ())
    found = inspect.getclosurevars(call)
    if call.__module__ != _UTILS or set(found.nonlocals) != {"model", "inputs_to_check", "mutated_input_idxs"}:
        return None
    if call.__globals__["ALIGNMENT"] != ALIGNMENT:
        return None
    model, aligned, written = (found.nonlocals[name] for name in ("model", "inputs_to_check", "mutated_input_idxs"))
    return Checked(model, [int(at) for at in aligned], [int(at) for at in written])


def realigned(check: Checked) -> str:
    """Return Python that makes `call` check as Inductor does."""
    return f"call = {_ALIGNED}(call, {tuple(check.aligned)!r}, {tuple(check.written)!r})" if check.aligned else ""


def _aligned(call: Raw, aligned: Sequence[int], written: Sequence[int]) -> Raw:
    """Return `call` with copies of the arguments in `aligned` whose address is not, copied back where it writes them.

    It takes the arguments out of their list, as compiled functions do.
    """
    def run(args: list[Tensor]) -> Sequence[Tensor]:
        moved = [at for at in aligned if args[at].data_ptr() % ALIGNMENT]
        if not moved:
            return call(args)
        given = {at: args[at] for at in moved}
        copies = {at: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)
                  for at, t in given.items()}
        for at, copy in copies.items():
            args[at] = copy
        results = call(args)
        for at in set(moved).intersection(written):
            given[at].copy_(copies[at])
        return results

    return run


def is_triton(value: object) -> bool:
    """Return whether a value is a Triton kernel of Inductor."""
    return type(value).__module__ == _HEURISTICS


def _never(value: Any, name: str) -> Launch | None:
    return None


@need(_never, where=(f"{_HEURISTICS}.GridExpr.from_meta", f"{_HEURISTICS}.CompileResult._get_arg_lists",
                     f"{_HEURISTICS}.triton_cache_dir", f"{_HEURISTICS}.triton_hash_to_path_key"),
      without="kernels on CUDA are not kept for other processes")
def triton_kernel(value: Any, name: str) -> Launch | None:
    """Return the parts of a Triton kernel of Inductor, or None if its choice is open, or it is not understood.

    name: of the function that the Python defines.
    """
    heuristics: Any = importlib.import_module(_HEURISTICS)
    if type(value).__name__ != "CachingAutotuner" or getattr(value, "_plugins", None) or len(value.launchers) != 1:
        return None
    (launcher,) = value.launchers
    kernel: Any = getattr(launcher.__globals__.get("runner"), "__self__", None)
    result = next((one for one in value.compile_results if one.kernel is kernel), None)
    if result is None or not _understood(launcher, kernel, result):
        return None
    grid = heuristics.GridExpr.from_meta(result.inductor_meta, result.config)
    _, given, absent = result._get_arg_lists(kernel.arg_names, kernel.declared_constexprs)
    passed = [arg for at, arg in enumerate(kernel.arg_names) if at not in kernel.full_constexprs and arg not in absent]
    body = [*grid.prefix, f"grid_0 = {grid.x_grid}", f"grid_1 = {grid.y_grid}", f"grid_2 = {grid.z_grid}"]
    run = f"runner({', '.join([_GRID, 'stream', *passed])})"
    if not _same_code(_function("launcher", given, [*body, run]), launcher.__code__):
        return None
    if len(passed) != len(kernel.arg_tys):
        return None
    device = result.compile_meta.get("device") or 0
    path = os.path.join(heuristics.triton_cache_dir(device), heuristics.triton_hash_to_path_key(kernel.hash),
                        f"{kernel.name}.cubin")
    if not os.path.isfile(path):
        return None
    return Launch(path, kernel.name, device, kernel.shared, _source(name, kernel, given, passed, body, _bound(value)))


def _understood(launcher: Any, kernel: Any, result: Any) -> bool:
    """Return whether a kernel is launched by torch's own launcher, in the only way that this module knows."""
    numbers = kernel.num_warps, kernel.shared
    return (
        getattr(launcher, "_is_static", False) is True
        and type(kernel).__name__ == "StaticallyLaunchedCudaKernel"
        and not any(value for name, value in vars(kernel).items() if name not in _ATTRIBUTES)
        and all(type(number) is int for number in numbers) and type(kernel.arg_tys) is str
        and result.compile_meta.get("device_type", "cuda") == "cuda"
    )


def _function(name: str, args: Sequence[str], body: Sequence[str]) -> str:
    return "\n    ".join([f"def {name}({', '.join([*args, 'stream'])}):", *body])


def _same_code(source: str, code: CodeType) -> bool:
    """Return whether Python that defines one function is what a function was compiled from."""
    (ours,) = (one for one in compile(source, "<launcher>", "exec").co_consts if isinstance(one, CodeType))
    parts = ("co_code", "co_consts", "co_names", "co_varnames", "co_argcount", "co_kwonlyargcount")
    return all(getattr(ours, part) == getattr(code, part) for part in parts)


def _bound(autotuner: Any) -> bool:
    """Return whether Inductor calls an object that holds all but the grid, the stream and the arguments."""
    cached = getattr(autotuner, "_cached_launcher", None)
    return type(getattr(cached, "__globals__", {}).get("runner")).__name__ == "_FastCudaLauncher"


def loaded(name: str) -> str:
    """Return the name by which the Python of a kernel uses what `load` returned."""
    return f"_{name}"


def _source(name: str, kernel: Any, given: Sequence[str], passed: Sequence[str], body: Sequence[str], bound: bool
            ) -> str:
    """Return Python that launches a kernel as Inductor does, without its way through several functions."""
    scratch = int(kernel.has_global_scratch) + int(kernel.has_profile_scratch)  # unused addresses that it must be given
    held, types = loaded(name), kernel.arg_tys
    if bound:
        made = f"{held} = {_LAUNCHER}({held}, {kernel.num_warps}, {kernel.shared}, {types!r}, {scratch})\n"
        return made + _function(name, given, [*body, f"{held}({', '.join([_GRID, 'stream', *passed])})"])
    args = "".join(f"{arg}, " for arg in [*passed, *["None"] * scratch])
    fixed = f"{kernel.num_warps}, {kernel.shared}, {types + 'O' * scratch!r}"
    return _function(name, given, [*body, f"{_LAUNCH}({held}, {_GRID}, {fixed}, ({args}), stream)"])


class Direct(ast.NodeTransformer):
    """Calls kernels as functions: ``kernel.run(x, stream=s)`` becomes ``kernel(x, s)``; other uses are not `plain`."""

    def __init__(self, kernels: Mapping[str, Launch]) -> None:
        self._kernels, self.plain = kernels, True

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Visit a call."""
        match node:
            case ast.Call(ast.Attribute(ast.Name(name), "run"), args, [ast.keyword("stream", stream)]):
                if name in self._kernels and not any(isinstance(arg, ast.Starred) for arg in args):
                    args = [self.visit(arg) for arg in args]
                    return ast.Call(ast.Name(name, ast.Load()), [*args, self.visit(stream)], [])
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        """Visit a name."""
        self.plain = self.plain and node.id not in self._kernels
        return node


def _attribute(path: str) -> Any:
    found: Any = torch
    for part in path.split(".")[1:]:
        found = getattr(found, part, None)
    return found


def names() -> dict[str, Any]:
    """Return what the Python of a function on a GPU may use, by name, as far as this torch has it."""
    found = {name: _attribute(path) for name, path in NAMES.items()}
    launcher = getattr(torch._C, "_StaticCudaLauncher", None)
    own = {_LAUNCH: getattr(launcher, "_launch_kernel", None), _ALIGNED: _aligned,
           _LAUNCHER: getattr(torch._C, "_FastCudaLauncher", None)}
    return {name: value for name, value in {**found, **own}.items() if value is not None}


def load(path: str, function: str, device: int, shared: int) -> int | None:
    """Load machine code into a GPU's context and return its handle; None if this torch cannot.

    It stays loaded: a CUDA graph may have recorded it. Raises RuntimeError if it cannot be loaded.
    """
    launcher = getattr(torch._C, "_StaticCudaLauncher", None)
    if launcher is None:
        return None
    with torch.cuda.device(device):
        found = launcher._load_kernel(path, function, shared, device)
    if len(found) not in (3, 4):  # newer versions of torch return the module first
        raise TypeError(f"_load_kernel returned {len(found)} values")
    return int(found[-3])  # before the numbers of registers and of spills
