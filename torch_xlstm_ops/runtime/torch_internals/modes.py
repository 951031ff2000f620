"""Modes and transforms that observe or change a computation."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad

from torch_xlstm_ops.runtime.torch_internals.need import need

Runner = Callable[[Callable[[], Any]], Any]
_GRAPH_TREES = "torch._inductor.cudagraph_trees"
_Mode = TypeVar("_Mode", bound="OperatorMode")


class _Active(threading.local):
    """The modes of this thread that compiled code may run in."""

    count = 0


_active = _Active()


def _assume_watched(*, operators: bool = True) -> bool:
    return True


@need(_assume_watched, where=(
        "torch._C._len_torch_dispatch_stack", "torch._C._len_torch_function_stack",
        "torch._C._are_functorch_transforms_active", "torch.autograd.forward_ad._current_level", "torch._C._is_tracing",
    ),
      without="a token runs a transformers block layer by layer, not as one compiled call")
def watched(*, operators: bool = True) -> bool:
    """Return whether a mode, a transform or a tracer observes the computation of this thread.

    operators: count an `OperatorMode` that compiled code may run in.
    """
    c, but_for = torch._C, 0 if operators else _active.count
    return bool(
        c._len_torch_dispatch_stack() > but_for or c._len_torch_function_stack()
        or c._are_functorch_transforms_active() or forward_ad._current_level >= 0 or c._is_tracing()
    )


def _assume_recorded(device: torch.device) -> bool:
    return _GRAPH_TREES in sys.modules


@need(_assume_recorded, where=(f"{_GRAPH_TREES}.get_manager", f"{_GRAPH_TREES}.CUDAGraphTreeManager"),
      without="where torch.compile has used CUDA graphs, our operators record none of their own and are slower")
def prepares_graph(device: torch.device) -> bool:
    """Return whether torch.compile runs this call on a CUDA device to record it in a CUDA graph afterwards.

    It then refuses memory that outlives the call. True if unknown.
    """
    trees = sys.modules.get(_GRAPH_TREES)
    if trees is None:
        return False
    try:
        manager = trees.get_manager(device.index, create_if_none_exists=False)
    except AssertionError:  # this thread has never run a compiled graph
        return False
    return manager is not None and bool(torch.cuda.current_stream(device) == manager.stream)


def _assume_transforms() -> bool:
    return True


@need(_assume_transforms, where=("torch._C._are_functorch_transforms_active",),
      without="calls that autograd records run the pure functions, which are slower")
def transforms() -> bool:
    """Return whether a transform of torch.func (grad, vmap, jvp and others) is active in this thread."""
    return bool(torch._C._are_functorch_transforms_active())


def _ask_tensors() -> bool:
    return True


@need(_ask_tensors, where=("torch.autograd.forward_ad._current_level", "torch._C._are_functorch_transforms_active"),
      without="each call asks its tensors for tangents, a few microseconds more")
def forward_mode() -> bool:
    """Return whether tensors may have tangents in this thread; True if unknown.

    Code that Dynamo traced enters forward mode inside a transform without setting `_current_level`.
    """
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _other_thread() -> Runner:
    return _in_another_thread


def _in_another_thread(call: Callable[[], Any]) -> Any:
    found: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            found.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="xlstm-ops-outside-modes")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return found[0]


@need(_other_thread, where=("torch.utils._python_dispatch._disable_current_modes",),
      without="kernels are compiled in a thread of their own, where no mode of the caller is active")
def outside_modes() -> Runner:
    """Return a function that runs a call outside the dispatch modes of the caller."""
    from torch.utils._python_dispatch import _disable_current_modes

    def run(call: Callable[[], Any]) -> Any:
        with _disable_current_modes():
            return call()

    return run


def _operator_mode() -> type:
    return torch.overrides.TorchFunctionMode


@need(_operator_mode, where=("torch.utils._python_dispatch.TorchDispatchMode",),
      without="operators are seen where Python calls them, not where the dispatcher does")
def _mode_base() -> type:
    """Return the base class of a mode that intercepts every operator call below autograd."""
    from torch.utils._python_dispatch import TorchDispatchMode

    return TorchDispatchMode


class OperatorMode:
    """A context manager in which a function intercepts every operator call of this thread.

    see: called with the operator, its arguments and its keywords; returns the results.
    within_compiled: compiled code may run in it: what it has to see are operators that such code calls too.
    """

    def __init__(
        self, see: Callable[[Any, Sequence[Any], dict[str, Any]], Any], *, within_compiled: bool = False
    ) -> None:
        base: Any = _mode_base()

        class Mode(base):  # type: ignore[misc]
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                return see(func, args, kwargs or {})

            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                return see(func, args, kwargs or {})

        if base is not torch.overrides.TorchFunctionMode:
            del Mode.__torch_function__
        self._mode: Any = Mode()
        self._counts = int(within_compiled and base is not torch.overrides.TorchFunctionMode)

    def __enter__(self: _Mode) -> _Mode:
        self._mode.__enter__()
        _active.count += self._counts
        return self

    def __exit__(self, *error: Any) -> None:
        _active.count -= self._counts
        self._mode.__exit__(*error)
