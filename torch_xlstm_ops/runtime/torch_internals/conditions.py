"""The sizes that a compiled function is valid for: conditions on symbols, which Inductor's cache keeps."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch_xlstm_ops.runtime.torch_internals.need import need

Axes = Sequence[Sequence[str]]


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


def symbols_of(env: Any, free: Mapping[str, int], axes: Axes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a symbol and a symbolic size for each free axis that an argument has."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    symbols, sizes = {}, {}
    for axis in sorted({axis for names in axes for axis in names if axis in free}):
        hint, source = free[axis], ConstantSource(axis)
        symbols[axis] = env.create_symbol(hint, source, DimDynamic.DYNAMIC, do_not_specialize_zero_one=True)
        sizes[axis] = env.create_symintnode(symbols[axis], hint=hint, source=source)
    return symbols, sizes


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
