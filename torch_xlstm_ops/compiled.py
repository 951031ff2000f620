"""The only caller of Inductor: pure functions to raw callables, one compile for each family of shapes.

A raw callable has no guards: it trusts sizes, strides, dtypes and device. So arguments are contiguous, everything that
a kernel is specialised on is in the cache key, and the sizes left free are checked, once each, against the conditions
that the compiler recorded while it generalised.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

PureFunction = Callable[..., tuple[Tensor, ...]]
RawCallable = Callable[[list[Tensor]], Sequence[Tensor]]

CAPACITY = 1024  # entries a cache keeps; the oldest leaves first
# Axes that stay symbolic, with the size to trace them at: large enough for Inductor to parallelise over.
FREE_AXES = {"G": 11, "NC": 13}
RELEASE_GIL: dict[str, Any] = {"cpp_wrapper": True}
# Keep an update in the order of the sum that follows, so that they are one kernel.
_AS_WRITTEN = {"pick_loop_orders": False}
DEVICE_OPTIONS: dict[str, dict[str, Any]] = {
    # However much arithmetic a row takes, compute it again: else the gradient's passes over scores are two, not one.
    "cuda": {**_AS_WRITTEN, "realize_opcount_threshold": 400},
    "mps": {
        **_AS_WRITTEN,
        "max_fusion_unique_io_buffers": 28,  # Metal allows 31 buffers a kernel, and Inductor does not split on it
        "realize_reads_threshold": 2,  # write the gates' factors down once: no other kernel then reads m
    },
}
# Operators that are computed within a graph where one calls them: filled by registrations/.
INLINED: dict[Any, PureFunction] = {}


def get(
    fn: PureFunction, axes: Sequence[str], args: Sequence[Tensor], *, release_gil: bool = False,
    threads: int | None = None, **static: Any,
) -> RawCallable:
    """Return a compiled ``fn(*args, **static)``, to be called with one list of contiguous tensors.

    fn: pure, returns a tuple of fresh tensors, and may end by ``copy_`` into arguments.
    axes: the axes of each argument, e.g. ``"G NC L DHQK"``; names in FREE_AXES stay symbolic, all others are fixed.
    release_gil: generate a C++ wrapper, which costs compile time and lets other Python threads run meanwhile (CPU).
    threads: how many a CPU kernel uses, exactly; default those that the calling thread may use now.
    """
    how = _How(release_gil, threads or torch.get_num_threads())
    key = (
        fn, how, args[0].device, *static.values(), *[t.shape for t in args], *[t.dtype for t in args],
    )
    call = _callables.get(key)
    if call is None:
        family = _family(fn, axes, args, how, static)
        with family.lock:  # of threads that race for a first call, one compiles and the others wait
            call = _callables.get(key) or family.find(args)
        _remember(_callables, key, call)
    return call


def clear() -> None:
    """Forget every callable; the next call compiles again (or loads from Inductor's cache on disk)."""
    with _lock:
        _callables.clear()
        _families.clear()


class _How(NamedTuple):
    """What a callable is compiled for beside its arguments."""

    release_gil: bool
    threads: int  # a CPU kernel has an accumulator for each, and no more

    def options(self, device: torch.device) -> dict[str, Any]:
        cpu = {"cpp.threads": self.threads} if device.type == "cpu" else {}
        return {"size_asserts": False, **cpu, **(RELEASE_GIL if self.release_gil else {}),
                **DEVICE_OPTIONS.get(device.type, {})}


class _Family:
    """One compile that is valid for all sizes of the free axes but those its conditions exclude."""

    def __init__(self, fn: PureFunction, axes: Sequence[str], how: _How) -> None:
        self.fn, self.axes, self.how = fn, [_split(names) for names in axes], how
        self.lock = threading.Lock()
        self.general: tuple[RawCallable, _Admits] | None = None

    def find(self, args: Sequence[Tensor]) -> RawCallable:
        if self.general is None:
            self.general = _compile(self.fn, self.axes, args, frozenset(FREE_AXES), self.how)
        call, admits = self.general
        sizes = {a: s for names, t in zip(self.axes, args, strict=True) for a, s in zip(names, t.shape, strict=True)}
        if admits(sizes):
            return call
        return _compile(self.fn, self.axes, args, frozenset(), self.how)[0]


_Key = tuple[Any, ...]
_callables: OrderedDict[_Key, RawCallable] = OrderedDict()  # by every size
_families: OrderedDict[_Key, _Family] = OrderedDict()  # by the fixed sizes
_lock = threading.Lock()
_compiling = threading.RLock()  # Inductor's options are global in some versions of torch


def _family(
    fn: PureFunction, axes: Sequence[str], args: Sequence[Tensor], how: _How, static: dict[str, Any]
) -> _Family:
    fixed = [s for names, t in zip(axes, args, strict=True)
             for a, s in zip(_split(names), t.shape, strict=True) if a not in FREE_AXES]
    key = (fn, how, args[0].device, *static.items(), *[t.dtype for t in args], *fixed)
    family = _families.get(key)
    if family is None:
        family = _remember(_families, key, _Family(functools.partial(fn, **static), axes, how))
    return family


_T = TypeVar("_T")


def _remember(cache: OrderedDict[_Key, _T], key: _Key, value: _T) -> _T:
    """Keep `value` unless another thread was first; return the one that is kept."""
    with _lock:
        value = cache.setdefault(key, value)
        while len(cache) > CAPACITY:
            cache.popitem(last=False)
        return value


@functools.cache
def _split(axes: str) -> tuple[str, ...]:
    return tuple(axes.split())


_Admits = Callable[[dict[str, int]], bool]  # whether a callable is valid for these sizes of the free axes


def _compile(
    fn: PureFunction, axes: Sequence[Sequence[str]], args: Sequence[Tensor], free: frozenset[str], how: _How
) -> tuple[RawCallable, _Admits]:
    """Compile `fn` for tensors like `args` with the axes in `free` symbolic, whatever modes the caller is in."""
    from torch.utils._python_dispatch import _disable_current_modes

    device = args[0].device
    options = how.options(device)
    no_autocast = torch.autocast(device.type, enabled=False)
    with _compiling, torch.inference_mode(False), torch.no_grad(), no_autocast, _disable_current_modes():
        try:
            return _compile_raw(fn, axes, args, free, options)
        except ImportError:  # this torch keeps the private entry elsewhere
            guarded = torch.compile(fn, fullgraph=True, dynamic=bool(free), options=options)
            return lambda given: guarded(*given), lambda sizes: True


def _compile_raw(
    fn: PureFunction, axes: Sequence[Sequence[str]], args: Sequence[Tensor], free: frozenset[str],
    options: dict[str, Any],
) -> tuple[RawCallable, _Admits]:
    from torch._dynamo.source import ConstantSource
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

    env = ShapeEnv()
    symbols: dict[str, Any] = {}
    sizes: dict[str, Any] = {}
    for axis in sorted({axis for names in axes for axis in names if axis in free}):
        hint, source = FREE_AXES[axis], ConstantSource(axis)
        symbols[axis] = env.create_symbol(hint, source, DimDynamic.DYNAMIC, do_not_specialize_zero_one=True)
        sizes[axis] = env.create_symintnode(symbols[axis], hint=hint, source=source)

    def example(names: Sequence[str], t: Tensor) -> Tensor:
        shape = [sizes.get(axis, size) for axis, size in zip(names, t.shape, strict=True)]
        return torch.empty(shape, dtype=t.dtype, device=t.device)

    mode = FakeTensorMode(shape_env=env)
    with mode:
        examples = [example(names, t) for names, t in zip(axes, args, strict=True)]
        table = {**select_decomp_table(), **INLINED}
        graph = make_fx(fn, decomposition_table=table, tracing_mode="real")(*examples)
    with config.patch(options), V.set_choices_handler(_choices()), tracing(TracingContext(mode)):
        code = compile_fx_inner(graph, examples, cpp_wrapper="cpp_wrapper" in options)
        call = code.current_callable  # type: ignore[attr-defined]
    conditions = {guard.expr for guard in env.guards}

    def admits(sizes: dict[str, int]) -> bool:
        # The compiler records size != 1 where it decides not to broadcast or to trust strides. Arguments are contiguous
        # and a free axis never meets a literal 1, so index arithmetic is the same at 1: judge it as 2.
        values = {symbol: max(2, sizes[axis]) for axis, symbol in symbols.items()}
        return all(bool(condition.subs(values)) for condition in conditions)

    return call, admits


PERSISTENT = 256  # elements of a row that a CUDA kernel keeps in registers, tokens of a chunk for one


@functools.cache
def _choices() -> Any:
    """Return Inductor's heuristics, with one changed: a row of scores is read once.

    Rows that are computed from gates do not look contiguous to it, so it loops over them and reads them again for each
    of their sums: 0.76 ms in place of 0.51 of a forward pass of 4 (H100, chunks of 256).
    """
    from torch._inductor.choices import InductorChoices

    class Choices(InductorChoices):
        @staticmethod
        def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
            elements = features.reduction_numel
            if not cooperative_reduction and getattr(elements, "is_number", False) and elements <= PERSISTENT:
                return True
            return bool(InductorChoices.should_use_persistent_reduction(features, cooperative_reduction))

    return Choices()
