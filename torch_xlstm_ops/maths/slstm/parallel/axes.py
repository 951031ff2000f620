"""The functions that are compiled, with the axes of their arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from torch_xlstm_ops.maths.slstm.parallel.backward import emit_back, enter, join, leave, record
from torch_xlstm_ops.maths.slstm.parallel.backward_scan import across_back, group_back, summarize_back
from torch_xlstm_ops.maths.slstm.parallel.certificate import judge, movement
from torch_xlstm_ops.maths.slstm.parallel.forward import emit, emit_across, settle, settle_across, summarize
from torch_xlstm_ops.maths.slstm.parallel.scan import across, across_apart, group

_WINDOW, _TOKENS, _CHUNKS, _CELLS = ("G NC L 4 NH DH", "4 NH DH", "G NH 4 DH"), "G NC L NH DH", "G NC NH DH", "G NH DH"
_GROUPS, _SUMMARIES = "G NC K NH DH", "PARTS G NC K NH DH"
AXES = {
    summarize: _WINDOW, emit: (*_WINDOW, *[_CHUNKS] * 3), settle: (*_WINDOW, *[_CHUNKS] * 3),
    judge: (_CHUNKS,) * 3, record: (*_WINDOW, *[_CHUNKS] * 3), summarize_back: (*[_TOKENS] * 6, *[_CHUNKS] * 2),
    emit_back: (*[_TOKENS] * 8, *[_CHUNKS] * 5), join: (_TOKENS,) * 4,
    enter: (_CELLS,) * 5, leave: (_CELLS,) * 5, across: (_SUMMARIES, *[_CHUNKS] * 3),
    across_apart: (_SUMMARIES, *[_CHUNKS] * 3),
}
_OPTIONAL = {6: "NH G NC L 4 DH", 5: "NH G NC L DH", 3: "G NC L"}  # what may follow, by its number of axes
_BACK = {group_back: 0, across_back: 3}  # the number of states after any number of summaries


def axes(fn: Callable[..., tuple[Tensor, ...]], args: Sequence[Tensor]) -> tuple[str, ...]:
    """Return the axes of the arguments of a function that is compiled."""
    if fn in _BACK:
        states = _BACK[fn]
        return (*[_GROUPS] * (len(args) - states), *[_CHUNKS] * states)
    if fn is group:
        return _SUMMARIES, *[_CHUNKS] * (len(args) - 1)
    if fn in (emit_across, settle_across):
        return _across_axes(args)
    if fn is movement:
        by_number = {3: "G NC L", 4: _CHUNKS, 5: _TOKENS, 6: "G NC L NH 4 DH"}
        return tuple(by_number[t.dim()] for t in args)
    named = AXES[fn]
    return (*named, *(_OPTIONAL[t.dim()] for t in args[len(named):]))


def _across_axes(args: Sequence[Tensor]) -> tuple[str, ...]:
    """Return the axes of the arguments of `emit_across` and `settle_across`: NG groups where a scan goes over them."""
    scanned = any(t.dim() == 5 for t in args)
    n, first = ("NG", "ONE") if scanned else ("GIVEN", "GIVEN")  # without a scan of groups each number has its kernel
    cells, chunks = f"G {first} NH DH", f"PARTS G {n} K NH DH"
    by_number = {4: f"G {n} K L", 5: f"PARTS G {n} NH DH", 7: f"NH G {n} K L 4 DH"}
    rest = (by_number[t.dim()] for t in args[7:])
    return f"G {n} K L 4 NH DH", *_WINDOW[1:], cells, cells, cells, chunks, *rest
