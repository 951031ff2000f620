"""What makes a model read a stretch of a prompt as if it had read all before: its recurrent operators get that state.

A model calls an operator once a layer, in the same order in every worker. So the calls are counted, and no layer needs
to know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_xlstm_ops.maths import mlstm
from torch_xlstm_ops.parallel.keeper import Carry
from torch_xlstm_ops.registrations import mlstm as operators
from torch_xlstm_ops.runtime.torch_internals import OperatorMode, operator_name

MLSTM, SLSTM = "xlstm::mlstm_chunkwise", "xlstm::slstm_sequence"
_STREAMS = {MLSTM: 5, SLSTM: 3}  # arguments before the state


class Passing(OperatorMode):
    """A ``with`` block in which a model reads one stretch.

    carry: takes and gives states. first, last: whether no stretch is before it, or behind.
    ahead: sum up an mLSTM's tokens before waiting for the state before them, and hand on the state after them before
        computing anything else. An sLSTM cannot be summed up: it always waits.
    """

    def __init__(self, carry: Carry, *, first: bool, last: bool, ahead: bool) -> None:
        super().__init__(self._see)
        self._carry, self._first, self._last, self._ahead = carry, first, last, ahead
        self.calls: list[str] = []  # the operator of each layer

    def _see(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        name = operator_name(func)
        if name is None or not name.startswith("xlstm::"):
            return func(*args, **kwargs)
        if name not in _STREAMS:
            raise NotImplementedError(f"a stretch must be read by sequence operators, got {name} in layer "
                                      f"{len(self.calls)}")
        return self._run(name, func, args, kwargs)

    def _run(self, name: str, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        layer, count = len(self.calls), _STREAMS[name]
        self.calls.append(name)
        streams, reset = args[:count], args[count + (3 if name == MLSTM else 4):]
        if self._first:
            found = func(*args, **kwargs)
        elif self._ahead and name == MLSTM and not self._last and not any(r is not None for r in reset):
            return self._run_ahead(layer, func, streams, kwargs)
        else:
            found = func(*streams, *self._before(layer, streams[0]), *reset, **kwargs)
        if not self._last:
            self._carry.keep(layer, found[1:])
        return found

    def _run_ahead(
        self, layer: int, func: Callable[..., Any], streams: Sequence[Tensor], kwargs: dict[str, Any]
    ) -> Any:
        summary = operators.summarize(*streams)
        before = self._before(layer, streams[0])
        self._carry.keep(layer, mlstm.absorb(*summary, *before))
        return func(*streams, *before, **kwargs)

    def _before(self, layer: int, like: Tensor) -> list[Tensor]:
        return [t.to(like.device) for t in self._carry.find(layer)]


def check_splits(model: torch.nn.Module) -> None:
    """Raise NotImplementedError for layers that look at the tokens before by other means than a recurrent state."""
    mixing = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv1d)]
    if mixing:
        raise NotImplementedError("a model to be read by several workers must mix tokens by mLSTM and sLSTM alone, got "
                                  f"convolutions in {', '.join(mixing[:3])}")
