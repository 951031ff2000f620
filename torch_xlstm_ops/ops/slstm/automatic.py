"""Which calls of the schedule `auto` run parallel in time."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from torch_xlstm_ops.runtime import compiler
from torch_xlstm_ops.runtime.bounded_cache import BoundedCache
from torch_xlstm_ops.schedules.slstm.rounds import Report

SHORTEST = 512  # tokens from which the rounds take less time than the steps, on CUDA
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LONGEST = 4096  # calls that run sequentially after windows did not converge
_Results = TypeVar("_Results")


class _Seen(NamedTuple):
    """What is known of calls of a kind."""

    unready: int = -1  # functions obtained when one was missing; only another one can change that
    pause: int = 0  # calls that are sequential because windows did not converge
    next_pause: int = 1


class Automatic:
    """Chooses the schedule of calls by what was seen of their kind."""

    def __init__(self, capacity: int = 256) -> None:
        self._seen: BoundedCache[Hashable, _Seen] = BoundedCache(capacity)
        compiler.forget_with(self.clear)

    def clear(self) -> None:
        """Forget what was seen."""
        self._seen.clear()

    def run(
        self, what: str, x: Tensor, masked: bool, floor: float, parallel: Callable[[], _Results],
        report: Callable[[], Report],
    ) -> _Results | None:
        """Return ``parallel()``, or None where the call is to run sequentially.

        It is parallel on CUDA for SHORTEST tokens and more, if all functions for that are in memory or in the kernel
        store: `parallel` raises `compiler.NotReady` otherwise. Where windows did not converge, the next calls are
        sequential: one, then twice as many each time. report: how the parallel call went.
        """
        if x.device.type != "cuda" or x.shape[1] < SHORTEST or x.dtype not in DTYPES:
            return None
        kind = what, x.device, x.dtype, x.shape[3:], masked, floor
        seen = self._seen.keep(kind, _Seen())
        if seen.unready == compiler.obtained():
            return None
        if seen.pause:
            self._seen[kind] = seen._replace(pause=seen.pause - 1)
            return None
        try:
            results = parallel()
        except compiler.NotReady:
            self._seen[kind] = seen._replace(unready=compiler.obtained())
            return None
        if report().fell_back:
            self._seen[kind] = _Seen(pause=seen.next_pause, next_pause=min(2 * seen.next_pause, _LONGEST))
        elif seen.next_pause > 1:
            self._seen[kind] = _Seen()
        return results
