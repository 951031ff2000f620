"""Watches every compiled function: what each call submits, and whether it equals the float64 function in every order.

It stands in for `compiler.get`, so a function that an op starts to compile tomorrow is watched without a word here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from torch_xlstm_ops.runtime import compiler

from ..oracle import error
from . import emulator

RawCallable = Callable[[list[Tensor]], Sequence[Tensor]]


@dataclass
class Call:
    """One call of a compiled function.

    errors: for each order checked, the error of each result. eager_errors: those of the function run eagerly on the
    CPU in the same dtypes, the measure of what the dtypes allow.
    """

    function: str
    sizes: dict[str, int]
    start: int
    stop: int = 0
    errors: dict[int, list[float]] = field(default_factory=dict)
    eager_errors: list[float] = field(default_factory=list)


class Instrument:
    """Every call of a compiled function, and which submissions were the instrument's own.

    checks: how many calls of a function with equal sizes to compare with the float64 function.
    """

    def __init__(self, *, checks: int) -> None:
        self.checks = checks
        self._original = compiler.get
        self.calls: list[Call] = []
        self.own: list[range] = []

    def install(self) -> None:
        """Wrap every callable that `compiler.get` returns from now on."""
        self._original, compiler.get = compiler.get, self._get

    def _get(
        self, fn: Callable[..., Any], axes: Sequence[str], args: Sequence[Tensor], **options: Any
    ) -> RawCallable:
        with self._aside():
            raw = self._original(fn, axes, args, **options)
        how = inspect.signature(self._original).parameters  # everything else is for `fn`
        static = {name: value for name, value in options.items() if name not in how}
        return functools.partial(self._call, fn, axes, static, raw)

    def _call(
        self, fn: Callable[..., Any], axes: Sequence[str], static: dict[str, Any], raw: RawCallable, args: list[Tensor]
    ) -> Sequence[Tensor]:
        sizes = _sizes(axes, args)
        call = Call(_name(fn), sizes, emulator.sequence())
        seen = sum((c.function, c.sizes) == (call.function, sizes) for c in self.calls)
        if seen < self.checks:
            with self._aside():
                call.errors, call.eager_errors = _errors(functools.partial(fn, **static), raw, args)
        call.start = emulator.sequence()
        results = raw(list(args))
        call.stop = emulator.sequence()
        self.calls.append(call)
        return results

    @contextmanager
    def _aside(self) -> Iterator[None]:
        start = emulator.sequence()
        yield
        self.own.append(range(start, emulator.sequence()))

    def is_own(self, sequence: int) -> bool:
        """Whether a submission came from the instrument and not from what it watches."""
        return any(sequence in span for span in self.own)


def _sizes(axes: Sequence[str], args: Sequence[Tensor]) -> dict[str, int]:
    """Return the size of each axis; the first argument that has it decides (a mask reaches one token further)."""
    sizes: dict[str, int] = {}
    for names, t in zip(axes, args, strict=True):
        for axis, size in zip(names.split(), t.shape, strict=True):
            sizes.setdefault(axis, size)
    return sizes


def _name(fn: Callable[..., Any]) -> str:
    name = getattr(fn, "__qualname__", type(fn).__qualname__)  # a traced module is an instance
    return f"{fn.__module__.split('.')[2]}.{name}"  # the maths package, and not its file


def _errors(
    fn: Callable[..., Any], raw: RawCallable, args: Sequence[Tensor]
) -> tuple[dict[int, list[float]], list[float]]:
    exact = [t.detach().cpu().double() if t.is_floating_point() else t.detach().cpu() for t in args]
    expected = _results(fn, exact)
    eager = _results(fn, [t.detach().cpu().clone() for t in args])
    errors = {}
    for order in emulator.ORDERS:
        emulator.set_order(order)
        copies = [t.detach().clone() for t in args]
        got = _results(lambda *given: raw(list(given)), copies)
        errors[order] = relative_errors(got, expected)
    emulator.set_order(0)
    return errors, relative_errors(eager, expected)


def _results(fn: Callable[..., Any], args: list[Tensor]) -> list[Tensor]:
    """Return what `fn` returns and, as it may end by writing into them, its arguments."""
    results = fn(*args) or ()
    return [*results, *args]


def relative_errors(got: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Return the errors of results on any device; one that nearly cancels, relative to a thousandth of the largest."""
    scale = 1e-3 * max((float(t[t.isfinite()].double().norm()) for t in expected), default=0.0)
    return [error(g.detach().cpu(), e, scale) for g, e in zip(got, expected, strict=True)]
