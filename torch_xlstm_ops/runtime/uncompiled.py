"""Pure functions that run uncompiled, because they cannot be compiled here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torch_xlstm_ops.runtime.state import warn_once

PureFunction = Callable[..., tuple[Tensor, ...]]
_OF_CPP = ("InvalidCxxCompiler", "CppCompileError")  # Inductor's errors where there is no C++ compiler that works
INSTALL = "on the CPU install g++ or clang, or name a C++ compiler in the environment variable CXX"
ROOM = "name a folder with room that can be written in the environment variable TORCHINDUCTOR_CACHE_DIR"
REPORT = "report it with what `xlstm-ops info` prints"
SPAWN = 'start processes by spawn (multiprocessing.get_context("spawn")), or after the first call'


class Uncompiled:
    """A pure function that runs uncompiled, because it could not be compiled."""

    def __init__(self, fn: PureFunction, reason: str, advice: str) -> None:
        self._fn, self.reason, self.advice = fn, reason, advice

    def __call__(self, args: list[Tensor]) -> Sequence[Tensor]:
        with torch.no_grad():
            return self._fn(*args)


def cause(error: BaseException) -> BaseException:
    """Return the error that Inductor wrapped in its own, at any depth."""
    inner = getattr(error, "inner_exception", None)
    return cause(inner) if isinstance(inner, BaseException) else error


def advice_for(error: BaseException) -> str:
    """Return what a user can do about an error of a compilation."""
    if isinstance(error, OSError):
        return ROOM
    return INSTALL if type(error).__name__ in _OF_CPP else REPORT


def uncompiled(fn: PureFunction, error: BaseException, advice: str) -> Uncompiled:
    """Return a function as it is, and warn once with the reason and what to do."""
    reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    warn_once(f"kernels cannot be compiled here ({reason}): operators run uncompiled and slower; {advice}")
    return Uncompiled(fn, reason, advice)
