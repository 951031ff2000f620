"""The functions that are compiled, with the axes of their arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from torch_xlstm_ops.maths.slstm.parallel.backward import emit_back, enter, leave, record, settle_back
from torch_xlstm_ops.maths.slstm.parallel.backward_scan import across_back, group_back, summarize_back
from torch_xlstm_ops.maths.slstm.parallel.certificate import judge
from torch_xlstm_ops.maths.slstm.parallel.forward import across, across_apart, emit, group, settle, summarize

_WINDOW, _TOKENS, _CHUNKS, _CELLS = ("NC L G 4 NH DH", "4 NH DH", "G NH 4 DH"), "NC L G NH DH", "NC G NH DH", "G NH DH"
_GROUPS = "NC K G NH DH"
AXES = {
    summarize: _WINDOW, emit: (*_WINDOW, *[_CHUNKS] * 3), settle: (*_WINDOW, *[_CHUNKS] * 3, _TOKENS),
    judge: (_CHUNKS,) * 3, record: (*_WINDOW, *[_CHUNKS] * 3), summarize_back: (*[_TOKENS] * 6, *[_CHUNKS] * 2),
    emit_back: (*[_TOKENS] * 8, *[_CHUNKS] * 5), settle_back: (*[_TOKENS] * 8, *[_CHUNKS] * 5, "NC L G NH 4 DH"),
    enter: (_CELLS,) * 5, leave: (_CELLS,) * 5,
}
_OPTIONAL = {6: "NH NC L G 4 DH", 5: "NH NC L G DH", 3: "NC L G"}  # what may follow, by its number of axes
# By the number of states after any number of summaries.
_SCANS = {group: 0, across: 3, across_apart: 3, group_back: 0, across_back: 3}


def axes(fn: Callable[..., tuple[Tensor, ...]], args: Sequence[Tensor]) -> tuple[str, ...]:
    """Return the axes of the arguments of a function that is compiled."""
    if fn in _SCANS:
        states = _SCANS[fn]
        return (*[_GROUPS] * (len(args) - states), *[_CHUNKS] * states)
    named = AXES[fn]
    return (*named, *(_OPTIONAL[t.dim()] for t in args[len(named):]))
