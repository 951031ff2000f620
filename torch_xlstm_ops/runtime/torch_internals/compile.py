"""Compile a pure function by Inductor to a callable without guards, with symbolic sizes."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from torch_xlstm_ops.runtime.torch_internals.inductor_choices import (
    MOST_JOINED,
    joined_in_place,
    reduction_choices,
    supported_options,
)
from torch_xlstm_ops.runtime.torch_internals.need import need

Raw = Callable[[list[Tensor]], Sequence[Tensor]]
Admits = Callable[[dict[str, int]], bool]  # whether a callable is valid for these sizes of the free axes
Axes = Sequence[Sequence[str]]


def _guarded(
    fn: Callable[..., Any], axes: Axes, args: Sequence[Tensor], free: Mapping[str, int], options: Mapping[str, Any],
    table: Mapping[Any, Any],
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
    table: Mapping[Any, Any],
) -> tuple[Raw, Admits]:
    """Compile a pure function to a callable without guards; return it, and a test for sizes of its free axes.

    axes: the names of each argument's axes. free: the axes that stay symbolic, with the size to trace them at.
    options: of Inductor. table: decompositions in addition to Inductor's.
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
    symbols, sizes = _symbols(env, free, axes)
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
    with (
        config.patch(supported_options(options)), V.set_choices_handler(reduction_choices()),
        tracing(TracingContext(mode)), joined_in_place(options.get(MOST_JOINED)),
    ):
        code = compile_fx_inner(graph, examples, cpp_wrapper="cpp_wrapper" in options)
        call: Raw = code.current_callable  # type: ignore[attr-defined]
    return call, Conditions(symbols, {guard.expr for guard in env.guards})


class Conditions:
    """The sizes of free axes that a callable is valid for.

    The compiler records size != 1 where it excludes broadcasting or relies on strides. Arguments are contiguous and no
    free axis is broadcast against a literal 1, so that index arithmetic for 1 is the same as for 2.
    """

    def __init__(self, symbols: Mapping[str, Any], expressions: Collection[Any]) -> None:
        self._symbols, self._expressions = symbols, expressions
        self.axes = tuple(symbols)

    def __call__(self, sizes: Mapping[str, int]) -> bool:
        values = {symbol: max(2, sizes[axis]) for axis, symbol in self._symbols.items()}
        return all(bool(expression.subs(values)) for expression in self._expressions)

    def written(self) -> str:
        """Return the conditions as a Python expression of the axes' names, for sizes of at least 2."""
        from torch.utils._sympy.printers import PythonPrinter

        named = {symbol: type(symbol)(axis, integer=True, positive=True) for axis, symbol in self._symbols.items()}
        texts = sorted(f"({PythonPrinter().doprint(one.subs(named))})" for one in self._expressions)
        return " and ".join(texts) or "True"


def _symbols(env: Any, free: Mapping[str, int], axes: Axes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a symbol and a symbolic size for each free axis that an argument has."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    symbols, sizes = {}, {}
    for axis in sorted({axis for names in axes for axis in names if axis in free}):
        hint, source = free[axis], ConstantSource(axis)
        symbols[axis] = env.create_symbol(hint, source, DimDynamic.DYNAMIC, do_not_specialize_zero_one=True)
        sizes[axis] = env.create_symintnode(symbols[axis], hint=hint, source=source)
    return symbols, sizes


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


def _plain_env() -> Any:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return ShapeEnv()


@need(_plain_env, where=(
        "torch.fx.experimental.symbolic_shapes.SYMPY_INTERP",
        "torch.fx.experimental.symbolic_shapes.ShapeEnv.produce_guards_expression",
        "torch.fx.experimental.symbolic_shapes.ShapeEnv.evaluate_guards_expression",
    ),
      without="a CUDA kernel from Inductor's cache may accept sizes that its 32-bit indices cannot address")
def shape_env() -> Any:
    """Return an environment of symbols whose conditions Inductor's cache keeps, and applies when it finds a function.

    Inductor adds conditions while it generates code, such as that 32-bit indices suffice. Its cache keeps those on
    symbols that are arguments. Ours are sizes of arguments: it would drop the conditions.

    The attribute `axes` has the symbols and the symbolic sizes, by axis.
    """
    return _env_class()()


@functools.cache
def _env_class() -> Any:
    from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP, ShapeEnv

    class Env(ShapeEnv):
        axes: tuple[Mapping[str, Any], Mapping[str, Any]] = ({}, {})

        def produce_guards_expression(self, placeholders: Any, **how: Any) -> str:
            return Conditions(self.axes[0], {guard.expr for guard in self.guards}).written()

        def evaluate_guards_expression(self, code: str, args: Any) -> bool:
            hints = {axis: size.node.hint for axis, size in self.axes[1].items()}
            # The second evaluation adds the conditions to this environment, if they hold.
            return all(bool(eval(code, SYMPY_INTERP, dict(values))) for values in (hints, self.axes[1]))

    return Env


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
