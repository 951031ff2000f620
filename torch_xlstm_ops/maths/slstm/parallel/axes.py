"""The functions that are compiled, with the axes of their arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from torch_xlstm_ops.maths.slstm.parallel.backward import emit_back, enter, leave, record
from torch_xlstm_ops.maths.slstm.parallel.backward_scan import across_back, group_back, summarize_back
from torch_xlstm_ops.maths.slstm.parallel.certificate import judge, movement
from torch_xlstm_ops.maths.slstm.parallel.forward import emit, emit_across, settle, settle_across, summarize
from torch_xlstm_ops.maths.slstm.parallel.scan import across, group

_WINDOW, _TOKENS, _CELLS = ("G NC L 4 NH DH", "4 NH DH", "G NH 4 DH"), "G NC L NH DH", "G NH DH"
_CHUNKS, _PARTS = "G NC NH DH", "PARTS G NC NH DH"
_FACTORS, _SUMMARIES = "PARTS G NC L NH DH", "PARTS G NC K NH DH"
AXES = {
    summarize: _WINDOW, emit: (*_WINDOW, _PARTS), settle: (*_WINDOW, _PARTS), judge: ("G NC NH",) * 3,
    group: (_SUMMARIES,), across: (_SUMMARIES, _PARTS), record: (*_WINDOW, _PARTS),
    summarize_back: (_TOKENS, _FACTORS, _PARTS), emit_back: (_TOKENS, _FACTORS, _PARTS, _PARTS),
    group_back: (_SUMMARIES,), across_back: (_SUMMARIES, _PARTS), enter: (*[_CELLS] * 3, "PARTS G NH DH"),
    leave: ("PARTS G NH DH", _CELLS, _CELLS),
}
_OPTIONAL = {6: "NH G NC L 4 DH", 5: "NH G NC L DH", 3: "G NC L"}  # what may follow, by its number of axes


def axes(fn: Callable[..., tuple[Tensor, ...]], args: Sequence[Tensor]) -> tuple[str, ...]:
    """Return the axes of the arguments of a function that is compiled."""
    if fn in (emit_across, settle_across):
        return _across_axes(args)
    if fn is movement:
        by_number = {3: "G NC L", 4: _CHUNKS, 5: _TOKENS, 6: "G NC L NH 4 DH"}
        return tuple(by_number[t.dim()] for t in args)
    named = AXES[fn]
    return (*named, *(_OPTIONAL[t.dim()] for t in args[len(named):]))


def _across_axes(args: Sequence[Tensor]) -> tuple[str, ...]:
    """Return the axes of the arguments of `emit_across` and `settle_across`: NG groups where a scan goes over them."""
    scanned = any(t.dim() == 5 for t in args[5:])
    n, first = ("NG", "ONE") if scanned else ("GIVEN", "GIVEN")  # without a scan of groups each number has its kernel
    by_number = {4: f"G {n} K L", 5: f"PARTS G {n} NH DH", 7: f"NH G {n} K L 4 DH"}
    rest = (by_number[t.dim()] for t in args[5:])
    return f"G {n} K L 4 NH DH", *_WINDOW[1:], f"PARTS G {first} NH DH", f"PARTS G {n} K NH DH", *rest
