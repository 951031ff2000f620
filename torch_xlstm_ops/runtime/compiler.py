"""Compile pure functions by Inductor to raw callables, once for each family of shapes; the only caller of Inductor.

A raw callable has no guards: it does not check sizes, strides, dtypes and device. Therefore arguments must be
contiguous, the cache key has everything that a kernel is specialised on, and symbolic sizes are checked once each
against the conditions that the compiler recorded.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops.runtime import compile_cache, devices, forks, interrupts, kernel_store, torch_internals
from torch_xlstm_ops.runtime.bounded_cache import BoundedCache
from torch_xlstm_ops.runtime.state import on_reset, warn_once
from torch_xlstm_ops.runtime.uncompiled import SPAWN, Uncompiled, advice_for, cause, uncompiled
from torch_xlstm_ops.runtime.uncompiled import PureFunction as PureFunction

RawCallable = torch_internals.Raw
_Admits = torch_internals.Admits  # whether a callable is valid for these sizes of the free axes

CAPACITY = 1024  # entries of a cache
# Axes that stay symbolic, with the size to trace them at: large enough that Inductor parallelises over them.
FREE_AXES = {"G": 11, "NC": 13, "NG": 7, "S": 331}
RELEASE_GIL: dict[str, Any] = {"cpp_wrapper": True}
# Keep the loop order of an update, so that Inductor fuses it with the sum that follows.
_AS_WRITTEN = {"pick_loop_orders": False}
DEVICE_OPTIONS: dict[str, dict[str, Any]] = {
    # Recompute a row however much arithmetic it takes: the gradient then passes over the scores once, not twice.
    "cuda": {**_AS_WRITTEN, "realize_opcount_threshold": 400},
    "mps": {
        **_AS_WRITTEN,
        "max_fusion_unique_io_buffers": 25,  # Metal allows 31 buffers a kernel, sizes too; Inductor does not check that
        "max_complex_pointwise_cat_inputs": 4,  # each is in a branch of one kernel, with buffers of its own
        "realize_reads_threshold": 2,  # store the gates' factors: no other kernel then reads m
        "assert_indirect_indexing": False,  # an error is read from the device
    },
}
# For unrolled functions on CUDA: at small sizes Inductor gives a thread two elements, and more need too many registers.
UNROLLED_AXES = {**FREE_AXES, "G": 3, "NC": 5, "NG": 2}
UNROLLED: dict[str, Any] = {"triton.autotune_pointwise": False}
# Decompositions of operators that a compiled function may call: filled by registrations/.
INLINED: dict[Any, PureFunction] = {}


def get(
    fn: PureFunction, axes: Sequence[str], args: Sequence[Tensor], *, release_gil: bool = False,
    threads: int | None = None, join_in_place: bool = False, unrolled: bool = False, only_ready: bool = False,
    **static: Any,
) -> RawCallable:
    """Return a compiled ``fn(*args, **static)``, to be called with one list of contiguous tensors.

    fn: pure, returns a tuple of fresh tensors, and may end by ``copy_`` into arguments.
    axes: the axes of each argument, e.g. ``"G NC L DHQK"``; names in FREE_AXES stay symbolic, all others are fixed.
    release_gil: generate a C++ wrapper, which takes longer to compile and runs without the GIL (CPU).
    threads: the exact number that a CPU kernel uses; default what the calling thread may use now.
    join_in_place: read what `torch.cat` joins where it is, in the kernel that uses it, and do not copy it first.
    unrolled: `fn` writes out many small steps one after another, as `torch_internals.steps_as_one_kernel` allows.
    only_ready: raise NotReady instead of compiling what is neither in memory nor in the kernel store.
    """
    how = _How(release_gil, threads or torch.get_num_threads(), join_in_place, unrolled)
    key = (fn, how, args[0].device, *static.values(), *[t.shape for t in args], *[t.dtype for t in args])
    call = _callables.get(key)
    if call is None:
        forks.note_kernels()
        family = _family(fn, axes, args, how, static)
        with family.lock:  # one of the threads that race for a first call compiles, the others wait
            call = _callables.get(key) or family.find(args, only_ready)
        _callables.keep(key, call)
    return call


class NotReady(Exception):
    """A function would have to be compiled."""


@on_reset
def clear() -> None:
    """Drop every callable; the next call compiles again, or loads from Inductor's cache on disk."""
    global _obtained
    _obtained = 0
    _callables.clear()
    _families.clear()
    for forget in filter(None, [reference() for reference in _holders]):
        forget()


def obtained() -> int:
    """Return how many callables were compiled or loaded so far: it differs after a call that had to wait for one."""
    return _obtained


def forget_with(forget: Callable[[], None]) -> None:
    """Have `clear` call a bound method of an object that holds callables, while the object lives."""
    _holders.append(weakref.WeakMethod(forget, _holders.remove))


class _How(NamedTuple):
    """Compile settings, part of the cache key."""

    release_gil: bool
    threads: int  # a CPU kernel has one accumulator for each
    join_in_place: bool = False
    unrolled: bool = False

    def options(self, device: torch.device) -> dict[str, Any]:
        cpu = {"cpp.threads": self.threads} if device.type == "cpu" else {}
        return {"size_asserts": False, **cpu, **(RELEASE_GIL if self.release_gil else {}),
                **({"force_pointwise_cat": True} if self.join_in_place else {}), **DEVICE_OPTIONS.get(device.type, {}),
                **(UNROLLED if self.unrolled and device.type == "cuda" else {})}

    def traced_at(self, free: frozenset[str], device: torch.device) -> dict[str, int]:
        """Return the sizes to trace free axes at."""
        sizes = UNROLLED_AXES if self.unrolled and device.type == "cuda" else FREE_AXES
        return {axis: size for axis, size in sizes.items() if axis in free}


class _Family:
    """One compile with symbolic free axes, and its conditions; sizes that these exclude compile on their own."""

    def __init__(self, fn: PureFunction, axes: Sequence[str], how: _How) -> None:
        self.fn, self.axes, self.how = fn, [_split(names) for names in axes], how
        self.lock = forks.new_lock()
        self.general: tuple[RawCallable, _Admits] | None = None

    def find(self, args: Sequence[Tensor], only_ready: bool) -> RawCallable:
        if self.general is None:
            self.general = _obtain(self.fn, self.axes, args, frozenset(FREE_AXES), self.how, only_ready)
        call, admits = self.general
        sizes = {a: s for names, t in zip(self.axes, args, strict=True) for a, s in zip(names, t.shape, strict=True)}
        if admits(sizes):
            return call
        return _obtain(self.fn, self.axes, args, frozenset(), self.how, only_ready)[0]


_Key = tuple[Any, ...]
_callables: BoundedCache[_Key, RawCallable] = BoundedCache(CAPACITY)  # by every size
_families: BoundedCache[_Key, _Family] = BoundedCache(CAPACITY)  # by the fixed sizes
_obtained = 0  # callables compiled or loaded since `clear`
_holders: list[weakref.WeakMethod[Callable[[], None]]] = []  # methods that `clear` calls
_compiling = forks.new_rlock()  # Inductor's options are global in some versions of torch
_compiling_thread: int | None = None
_has_compiled = False  # the first compilation imports Inductor; an import that is interrupted leaves modules unusable
_forked_from_compiling = False  # whether another thread of the parent compiled when this process was forked


def _family(
    fn: PureFunction, axes: Sequence[str], args: Sequence[Tensor], how: _How, static: dict[str, Any]
) -> _Family:
    fixed = [s for names, t in zip(axes, args, strict=True)
             for a, s in zip(_split(names), t.shape, strict=True) if a not in FREE_AXES]
    key = (fn, how, args[0].device, *static.items(), *[t.dtype for t in args], *fixed)
    family = _families.get(key)
    if family is None:
        family = _families.keep(key, _Family(functools.partial(fn, **static), axes, how))
    return family


@functools.cache
def _split(axes: str) -> tuple[str, ...]:
    return tuple(axes.split())


def _obtain(
    fn: PureFunction, axes: Sequence[Sequence[str]], args: Sequence[Tensor], free: frozenset[str], how: _How,
    only_ready: bool,
) -> tuple[RawCallable, _Admits]:
    """Return what an earlier process compiled and kept; else compile, and keep it for later ones."""
    global _obtained
    store, device = kernel_store.chosen(), args[0].device
    options = {**how.options(device), "unrolled": how.unrolled}
    traced_at = how.traced_at(free, device)
    wanted = None if store is None else kernel_store.request(fn, axes, args, traced_at, options, INLINED)
    found: tuple[RawCallable, _Admits] | None = None if store is None or wanted is None else store.find(wanted)
    if found is None and only_ready:
        raise NotReady
    _obtained += 1
    if found is not None:
        return found
    if store is None or wanted is None:
        return _compile(fn, axes, args, free, how)
    call, admits = _compile(fn, axes, args, free, how)
    return call if isinstance(call, Uncompiled) else store.keep(wanted, call, admits), admits


def _compile(
    fn: PureFunction, axes: Sequence[Sequence[str]], args: Sequence[Tensor], free: frozenset[str], how: _How
) -> tuple[RawCallable, _Admits]:
    """Compile `fn` for tensors like `args` with the axes in `free` symbolic, independent of the caller's modes."""
    device = args[0].device
    _refuse_fast_math(device)
    sizes = how.traced_at(free, device)

    def compile_here() -> tuple[RawCallable, _Admits]:
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            return torch_internals.compile_raw(fn, axes, args, sizes, how.options(device), INLINED, how.unrolled)

    def attempt(unwritable: OSError | None) -> tuple[RawCallable, _Admits] | BaseException:
        global _has_compiled
        first = nullcontext() if _has_compiled else interrupts.deferred()
        with _compiling, _noted(), first, compile_cache.writable_folder(unwritable):
            try:
                found: tuple[RawCallable, _Admits] = torch_internals.outside_modes()(compile_here)
                _has_compiled = True
                return found
            except (RuntimeError, OSError) as error:
                return cause(error)

    if _forked_from_compiling:
        forked = RuntimeError("this process was forked while another thread compiled")
        return uncompiled(fn, forked, SPAWN), lambda sizes: True
    found = attempt(compile_cache.unwritable())
    if isinstance(found, OSError):  # such as a full disk
        found = attempt(found)
    return (uncompiled(fn, found, advice_for(found)), lambda sizes: True) if isinstance(found, BaseException) else found


@contextmanager
def _noted() -> Iterator[None]:
    """Note which thread compiles, which holds `_compiling`."""
    global _compiling_thread
    before, _compiling_thread = _compiling_thread, threading.get_ident()
    try:
        yield
    finally:
        _compiling_thread = before


def _in_child() -> None:
    """In a forked child: a compilation of another thread left locks of Python's imports and of torch held for ever."""
    global _compiling_thread, _forked_from_compiling
    torch_internals.forget_compile_threads()
    if _compiling_thread not in (None, threading.get_ident()):
        _compiling_thread, _forked_from_compiling = None, True


forks.in_child(_in_child)


def _refuse_fast_math(device: torch.device) -> None:
    if device.type == "mps" and devices.mps_fast_math():
        warn_once("PYTORCH_MPS_FAST_MATH is set: Metal may then reorder sums, which makes results of the mLSTM wrong "
                  "by up to 1.5e-4 in float32, and assume that gates are never infinite; unset it")
