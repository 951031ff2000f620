"""A compiled function on a GPU: its first call chooses among kernels by their time, and only then can it be kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from torch_xlstm_ops.runtime import torch_internals


class AfterCall:
    """Calls a compiled function, and another one after the first call that succeeded.

    The work that follows must not use the device: the call may be part of a CUDA graph that is recorded.
    """

    __slots__ = ("_call", "_then")

    def __init__(self, call: torch_internals.Raw, then: Callable[[], object]) -> None:
        self._call = call
        self._then: Callable[[], object] | None = then

    def __call__(self, args: list[Tensor]) -> Sequence[Tensor]:
        results = self._call(args)
        then = self._then
        if then is not None:  # two threads may both get here: to keep a function twice does no harm
            self._then = None
            then()
        return results
