"""The functions that a schedule calls for a task of the mLSTM, each compiled for the shapes that it meets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

OP = "mlstm_chunkwise"  # its name in traces
Run = Callable[[list[Tensor]], Sequence[Tensor]]
State = list[Tensor]  # c (G, DHQK, DHHV), n (G, DHQK), m (G, 1)


class Output(Protocol):
    """Where a task writes its h."""

    def begin(self) -> Tensor:
        """Return memory for h (G*NC, L, DHHV)."""

    def end(self) -> None:
        """Take what was written there."""


class Kernels(NamedTuple):
    """Functions of contiguous tensors; shapes as in `maths.mlstm`, streams q k v igate fgate (G, NC, L, ...).

    The forward passes empty the list of streams before they ask for the memory of h, which can then take theirs. On the
    CPU `forward` returns None, and writes nothing, if the state after the segment is not finite: a matrix product
    carries NaN and infinity to tokens that the recurrence keeps them from.
    """

    # streams, the state before or None for zeros, h -> the state after
    forward: Callable[[list[Tensor], State | None, Output], State | None]
    # streams, their summary, the state before, h
    forward_from_summary: Callable[[list[Tensor], Sequence[Tensor], State, Output], None]
    summarize: Run  # k v igate fgate -> F M dC dn, and M dC dn of the chunks
    absorb: Run  # F M dC dn c n m -> c n m
    final_state: Run  # k v igate fgate c n m -> c n m
    backward: Run  # q k v igate fgate c n m dh dc dn dm -> their gradients
    step: Run  # q k v igate fgate c n m -> h c n m, of one token
    step_gradient: Run  # of one token: q k v igate fgate c n m dh dc dn dm -> their gradients
