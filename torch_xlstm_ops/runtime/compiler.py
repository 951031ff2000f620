"""The only caller of Inductor: pure functions to raw callables, one compile for each family of shapes.

A raw callable has no guards: it trusts sizes, strides, dtypes and device. So arguments are contiguous, everything that
a kernel is specialised on is in the cache key, and the sizes left free are checked, once each, against the conditions
that the compiler recorded while it generalised.
"""

from __future__ import annotations

import functools
import os
import tempfile
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from torch_xlstm_ops.runtime import torch_internals

PureFunction = Callable[..., tuple[Tensor, ...]]
RawCallable = torch_internals.Raw
_Admits = torch_internals.Admits  # whether a callable is valid for these sizes of the free axes

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
        holders = [holder for reference in _holders if (holder := reference()) is not None]
    for forget in holders:
        forget()


def forget_with(forget: Callable[[], None]) -> None:
    """Have `clear` call a bound method of an object that holds callables, for as long as the object lives."""
    _holders.append(weakref.WeakMethod(forget, _holders.remove))


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
_holders: list[weakref.WeakMethod[Callable[[], None]]] = []  # what else is forgotten
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


def _compile(
    fn: PureFunction, axes: Sequence[Sequence[str]], args: Sequence[Tensor], free: frozenset[str], how: _How
) -> tuple[RawCallable, _Admits]:
    """Compile `fn` for tensors like `args` with the axes in `free` symbolic, whatever modes the caller is in."""
    device = args[0].device
    sizes = {axis: size for axis, size in FREE_AXES.items() if axis in free}

    def compile_here() -> tuple[RawCallable, _Admits]:
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            return torch_internals.compile_raw(fn, axes, args, sizes, how.options(device), INLINED)

    with _compiling, _cache_folder(_unwritable()):
        try:
            return _outside(compile_here)
        except (RuntimeError, OSError) as error:
            failed = _cause(error)
    if isinstance(failed, OSError):  # a full disk, say
        with _compiling, _cache_folder(failed):
            try:
                return _outside(compile_here)
            except (RuntimeError, OSError) as error:
                failed = _cause(error)
    return _uncompiled(fn, failed), lambda sizes: True


def _outside(compile_here: Callable[[], tuple[RawCallable, _Admits]]) -> tuple[RawCallable, _Admits]:
    found: tuple[RawCallable, _Admits] = torch_internals.outside_modes()(compile_here)
    return found


class Uncompiled:
    """A pure function that is called as it is, where it could not be compiled."""

    def __init__(self, fn: PureFunction, reason: str) -> None:
        self._fn, self.reason = fn, reason

    def __call__(self, args: list[Tensor]) -> Sequence[Tensor]:
        with torch.no_grad():
            return self._fn(*args)


_told: set[str] = set()  # what has been warned of, once each


def _tell(warning: str) -> None:
    if warning not in _told:
        _told.add(warning)
        warnings.warn(warning, RuntimeWarning, stacklevel=2)


def _cause(error: BaseException) -> BaseException:
    """Return what is behind an error of Inductor, which wraps it."""
    inner = getattr(error, "inner_exception", None)
    return _cause(inner) if isinstance(inner, BaseException) else error


def _uncompiled(fn: PureFunction, error: BaseException) -> Uncompiled:
    reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    _tell(f"kernels cannot be compiled here ({reason}): operators run uncompiled and slower; on the CPU install g++ or "
          "clang, or name a C++ compiler in the environment variable CXX")
    return Uncompiled(fn, reason)


_CACHE = "TORCHINDUCTOR_CACHE_DIR"
_folders: list[tempfile.TemporaryDirectory[str]] = []  # at most one, kept as long as the process


def _unwritable() -> OSError | None:
    """Return why the folder that TORCHINDUCTOR_CACHE_DIR names cannot be written, or None.

    Asked before Inductor is imported, which makes the folder and cannot be imported again after an error.
    """
    folder = os.environ.get(_CACHE)
    if folder:
        try:
            os.makedirs(folder, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            return error
    return None


@contextmanager
def _cache_folder(error: OSError | None) -> Iterator[None]:
    """Have Inductor write to a folder of this process, if its own cache cannot be written for this error."""
    if error is None:
        yield
        return
    if not _folders:
        _folders.append(tempfile.TemporaryDirectory(prefix="xlstm-ops-inductor-", ignore_cleanup_errors=True))
    _tell(f"Inductor's cache cannot be written ({error}): kernels are compiled in a temporary folder and not kept; "
          f"name a folder that can be written in {_CACHE}")
    before = os.environ.get(_CACHE)
    os.environ[_CACHE] = _folders[0].name
    try:
        yield
    finally:
        if before is None:
            del os.environ[_CACHE]
        else:
            os.environ[_CACHE] = before
