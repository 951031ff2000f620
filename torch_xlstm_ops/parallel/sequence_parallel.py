"""A mode in which a model reads one shard of a prompt: each recurrent operator starts from the previous shard's state.

A model calls one operator per layer, in the same order in every worker, so the count of calls identifies the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_xlstm_ops.maths import mlstm
from torch_xlstm_ops.ops.mlstm import sequence
from torch_xlstm_ops.parallel.state_link import StateLink
from torch_xlstm_ops.runtime.torch_internals import OperatorMode, operator_name

MLSTM, SLSTM = "xlstm::mlstm_chunkwise", "xlstm::slstm_sequence"
_STREAMS = {MLSTM: 5, SLSTM: 3}  # arguments before the state


class SequenceParallelMode(OperatorMode):
    """A ``with`` block in which a model reads one shard.

    link: stores and finds states. first, last: whether the shard is the first or last of the prompt.
    summarize_first: summarise an mLSTM's tokens before waiting for the state before them, and store the state after
        them before computing h. An sLSTM has no summary and always waits.
    """

    def __init__(self, link: StateLink, *, first: bool, last: bool, summarize_first: bool) -> None:
        super().__init__(self._dispatch, within_compiled=True)
        self._link, self._first, self._last, self._summarize_first = link, first, last, summarize_first
        self.calls: list[str] = []  # the operator of each layer

    def _dispatch(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        name = operator_name(func)
        if name is None or not name.startswith("xlstm::"):
            return func(*args, **kwargs)
        if name not in _STREAMS:
            raise NotImplementedError(f"a model read in shards must call sequence operators only, got {name} in layer "
                                      f"{len(self.calls)}")
        return self._call(name, func, args, kwargs)

    def _call(self, name: str, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        layer, count = len(self.calls), _STREAMS[name]
        self.calls.append(name)
        streams, reset = args[:count], args[count + (3 if name == MLSTM else 4):]
        if self._first:
            found = func(*args, **kwargs)
        elif self._summarize_first and name == MLSTM and not self._last and not any(r is not None for r in reset):
            return self._summarize_first_call(layer, func, streams, kwargs)
        else:
            found = func(*streams, *self._before(layer, streams[0]), *reset, **kwargs)
        if not self._last:
            self._link.store(layer, found[1:])
        return found

    def _summarize_first_call(
        self, layer: int, func: Callable[..., Any], streams: Sequence[Tensor], kwargs: dict[str, Any]
    ) -> Any:
        summary = sequence.summarize(*streams)
        before = self._before(layer, streams[0])
        self._link.store(layer, mlstm.absorb(*summary, *before))
        return func(*streams, *before, **kwargs)

    def _before(self, layer: int, like: Tensor) -> list[Tensor]:
        return [t.to(like.device) for t in self._link.find(layer)]


def check_splits(model: torch.nn.Module) -> None:
    """Raise NotImplementedError for layers that see earlier tokens other than through a recurrent state."""
    mixing = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv1d)]
    if mixing:
        raise NotImplementedError("a model to be read by several workers must mix tokens by mLSTM and sLSTM alone, got "
                                  f"convolutions in {', '.join(mixing[:3])}")
