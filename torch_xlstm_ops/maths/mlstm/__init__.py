"""mLSTM mathematics: the step, the two-level segment and its gradient, and the recurrent oracle.

A task holds G rows (any heads of any batch entries) and NC chunks of L tokens. Gates are pre-activations; a state
(c, n, m) stands for ``c * exp(m)``, ``n * exp(m)``. Source: Beck et al. 2024, "xLSTM" (mLSTM, stabilised form);
Beck et al. 2025, "Tiled Flash Linear Attention" (chunkwise form). Both levels, tokens of a chunk and chunks of a
segment, are masked products.
"""

from torch_xlstm_ops.maths.mlstm.chunks import absorb, combine
from torch_xlstm_ops.maths.mlstm.gradient import finish_gradient_, gradient, gradient_
from torch_xlstm_ops.maths.mlstm.layout import PADDING, chunked, in_chunks
from torch_xlstm_ops.maths.mlstm.recurrence import advance, recurrent, step, step_, write_state_
from torch_xlstm_ops.maths.mlstm.segment import (
    factors_from_summary,
    final_state,
    final_state_,
    inter_chunk_states,
    prefers_zero_state,
    scores,
    segment,
    segment_factors,
    segment_factors_single_chunk,
    segment_factors_zero_state,
    summarize,
    write_output_,
)
from torch_xlstm_ops.maths.mlstm.step_gradient import step_gradient

__all__ = [
    "AXES",
    "PADDING",
    "absorb",
    "advance",
    "chunked",
    "combine",
    "factors_from_summary",
    "final_state",
    "final_state_",
    "finish_gradient_",
    "gradient",
    "gradient_",
    "in_chunks",
    "inter_chunk_states",
    "prefers_zero_state",
    "recurrent",
    "scores",
    "segment",
    "segment_factors",
    "segment_factors_single_chunk",
    "segment_factors_zero_state",
    "step",
    "step_",
    "step_gradient",
    "summarize",
    "write_output_",
    "write_state_",
]

_STREAMS = ("G NC L DHQK", "G NC L DHQK", "G NC L DHHV", "G NC L", "G NC L")
_STATE = ("G DHQK DHHV", "G DHQK", "G 1")
_SUMMARY = ("G 1", "G 1", "G DHQK DHHV", "G DHQK")
_STEP = ("B NH DHQK", "B NH DHQK", "B NH DHHV", "B NH 1", "B NH 1", "B NH DHQK DHHV", "B NH DHQK", "B NH 1")
# The functions that are compiled, with the axes of their arguments.
AXES = {
    advance: _STEP,
    step_: _STEP,
    segment_factors: (*_STREAMS, "G NC L L", *_STATE),
    segment_factors_zero_state: (*_STREAMS, "G NC L L"),
    final_state_: (*["G NC DHQK DHHV"] * 2, *["G 1"] * 2, _STATE[0]),
    segment_factors_single_chunk: tuple(axes.replace("NC", "1") for axes in (*_STREAMS, "G NC L L")),
    factors_from_summary: ("G NC L DHQK", "G NC L", "G NC L", "G NC L L", "G NC", "G NC DHQK", *_STATE[1:]),
    summarize: _STREAMS[1:],
    absorb: (*_SUMMARY, *_STATE),
    final_state: (*_STREAMS[1:], *_STATE),
    gradient_: (*_STREAMS, "G NC L L", *_STATE, "G NC L DHHV", *_STATE, *_STREAMS[:2]),
}
