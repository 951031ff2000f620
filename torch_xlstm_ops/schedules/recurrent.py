"""The `recurrent` schedule: the compiled step in a loop over tokens."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from torch_xlstm_ops import trace
from torch_xlstm_ops.kernels.mlstm import Kernels, State
from torch_xlstm_ops.schedules.plan import Plan, Segment
from torch_xlstm_ops.schedules.sequential import backward as backward
from torch_xlstm_ops.schedules.slicing import OP, Rows
from torch_xlstm_ops.schedules.token_by_token import step_through


def forward(plan: Plan, kernels: Kernels, streams: Sequence[Tensor], state: State | None) -> tuple[Tensor, State]:
    """Return h (R, S, DHHV) and the final state; arguments as of `sequential.forward`."""
    rows = Rows(plan, streams)
    whole, everything = slice(0, plan.rows), Segment(0, plan.tokens, 0)
    state = rows.zero_state(whole) if state is None else state
    if trace.active():
        with trace.span(OP, schedule=str(plan.schedule), band=0, segment=0, device=streams[2].device):
            return rows.h, step_through(kernels, rows, whole, everything, state)
    return rows.h, step_through(kernels, rows, whole, everything, state)
