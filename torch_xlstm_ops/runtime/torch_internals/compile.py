"""Compile a pure function by Inductor to a callable without guards, with symbolic sizes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx

from torch_xlstm_ops.runtime.torch_internals.conditions import Axes, Conditions, shape_env, symbols_of
from torch_xlstm_ops.runtime.torch_internals.inductor_choices import (
    reduction_choices,
    supported_options,
)
from torch_xlstm_ops.runtime.torch_internals.inductor_steps import steps_as_one_kernel
from torch_xlstm_ops.runtime.torch_internals.need import MOVED, need

Raw = Callable[[list[Tensor]], Sequence[Tensor]]
Admits = Callable[[dict[str, int]], bool]  # whether a callable is valid for these sizes of the free axes


def _guarded(
    fn: Callable[..., Any], axes: Axes, args: Sequence[Tensor], free: Mapping[str, int], options: Mapping[str, Any],
    table: Mapping[Any, Any], unrolled: bool = False,
) -> tuple[Raw, Admits]:
    call = torch.compile(fn, fullgraph=True, dynamic=bool(free), options=supported_options(options))
    return lambda given: call(*given), lambda sizes: True


@need(_guarded, where=(
        "torch._inductor.compile_fx.compile_fx_inner", "torch._inductor.decomposition.select_decomp_table",
        "torch._inductor.virtualized.V.set_choices_handler", "torch._guards.TracingContext", "torch._guards.tracing",
        "torch._subclasses.fake_tensor.FakeTensorMode", "torch.fx.experimental.proxy_tensor.make_fx",
        "torch._dispatch.python.enable_python_dispatcher",
        "torch.fx.experimental.symbolic_shapes.ShapeEnv.create_symbol", "torch._dynamo.source.ConstantSource",
    ),
      without="kernels are called through torch.compile, about 40 microseconds slower a call")
def compile_raw(
    fn: Callable[..., Any], axes: Axes, args: Sequence[Tensor], free: Mapping[str, int], options: Mapping[str, Any],
    table: Mapping[Any, Any], unrolled: bool = False,
) -> tuple[Raw, Admits]:
    """Compile a pure function to a callable without guards; return it, and a test for sizes of its free axes.

    axes: the names of each argument's axes. free: the axes that stay symbolic, with the size to trace them at.
    options: of Inductor. table: decompositions in addition to Inductor's. unrolled: see `steps_as_one_kernel`.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    env = shape_env()
    symbols, sizes = symbols_of(env, free, axes)
    env.axes = symbols, sizes

    def example(names: Sequence[str], t: Tensor) -> Tensor:
        shape = [sizes.get(axis, size) for axis, size in zip(names, t.shape, strict=True)]
        return torch.empty(shape, dtype=t.dtype, device=t.device)

    mode = FakeTensorMode(shape_env=env)
    with mode:
        examples = [example(names, t) for names, t in zip(axes, args, strict=True)]
        trace = make_fx(fn, decomposition_table={**select_decomp_table(), **table}, tracing_mode="real")
        with enable_python_dispatcher():  # torch 2.11's own `matmul` in C++ refuses symbolic sizes
            graph = trace(*examples)
        _read_sizes(graph, axes, symbols)
    try:
        with (
            config.patch(supported_options(options)), V.set_choices_handler(reduction_choices()),
            tracing(TracingContext(mode)), steps_as_one_kernel() if unrolled else nullcontext(),
        ):
            code = compile_fx_inner(graph, examples, cpp_wrapper="cpp_wrapper" in options)
    except Exception as error:
        if not unrolled or not _has_moved(error):
            raise
        steps_as_one_kernel.give_up(error)
        return compile_raw(fn, axes, args, free, options, table)
    call: Raw = code.current_callable  # type: ignore[attr-defined]
    return call, Conditions(symbols, {guard.expr for guard in env.guards})


def _has_moved(error: Exception) -> bool:
    """Return whether Inductor failed at what a function of ours gave it, rather than at a compiler or a disk."""
    within = getattr(error, "inner_exception", error)
    return isinstance(within, (*MOVED, AssertionError)) or type(within).__name__ == "LoweringException"


def _read_sizes(graph: fx.GraphModule, axes: Axes, symbols: Mapping[str, Any]) -> None:
    """Read each symbol from an argument's size at the start of the graph.

    torch 2.14 defines a symbol in the generated wrapper only if the graph reads it, or if `size_asserts`, which take
    time at each call, check it.
    """
    inputs = graph.graph.find_nodes(op="placeholder")
    places = {
        axis: (node, dim) for node, names in zip(reversed(inputs), reversed(axes), strict=True)
        for dim, axis in reversed([*enumerate(names)]) if axis in symbols
    }
    with graph.graph.inserting_after(inputs[-1]):
        for axis, (node, dim) in places.items():
            # Their names tell these graphs, in Inductor's cache, from those of versions that lost conditions there.
            read = graph.graph.create_node("call_function", torch.ops.aten.sym_size.int, (node, dim),
                                           name=f"size_of_{axis}")
            read.meta["val"] = node.meta["val"].shape[dim]
    graph.recompile()


def _unknown_compiler() -> str | None:
    return None


@need(_unknown_compiler, where=("torch._inductor.cpp_builder.get_cpp_compiler",),
      without="`xlstm-ops info` does not say whether there is a C++ compiler")
def compiler_missing() -> str | None:
    """Return why Inductor cannot compile for the CPU here, or None if it can."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except (RuntimeError, OSError) as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return None


def _keep_threads() -> None:
    pass


@need(_keep_threads, where=("torch._inductor.async_compile.AsyncCompile.pool",),
      without="a forked child that compiles may wait for threads of its parent, for ever")
def forget_compile_threads() -> None:
    """In a forked child, have Inductor start threads of its own: those of the parent are not there."""
    loaded = sys.modules.get("torch._inductor.async_compile")
    if loaded is not None:
        loaded.AsyncCompile.pool.cache_clear()
