"""The arguments of the mLSTM's sequence operators, taken apart and checked."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from torch_xlstm_ops.maths.shapes import MLSTMState, check_mlstm_sequence, check_not_negative, check_shape


class Streams(NamedTuple):
    """The inputs of a sequence."""

    q: Tensor  # (B, NH, S, DHQK)
    k: Tensor  # (B, NH, S, DHQK)
    v: Tensor  # (B, NH, S, DHHV)
    igate: Tensor  # (B, NH, S)
    fgate: Tensor  # (B, NH, S)


class Arguments(NamedTuple):
    """The tensors of a call."""

    streams: Streams
    state: tuple[Tensor | None, Tensor | None, Tensor | None]  # c, n, m
    reset: Tensor | None  # (B, S)

    def check(self, eps: float) -> None:
        """Raise ValueError or TypeError for arguments that do not go together."""
        check_mlstm_sequence(*self.streams, *self.state, self.reset)
        check_not_negative("eps", eps)

    @property
    def initial(self) -> MLSTMState | None:
        """Return the state before the first token; None for zeros."""
        c, n, m = self.state
        return None if c is None or n is None or m is None else MLSTMState(c, n, m)


def split(tensors: tuple[Tensor | None, ...]) -> Arguments:
    """Take q k v igate fgate c? n? m? reset? apart, as the dispatcher gives them: it leaves out trailing defaults."""
    c, n, m, reset = (*tensors[5:], None, None, None, None)[:4]
    return Arguments(Streams(*tensors[:5]), (c, n, m), reset)  # type: ignore[arg-type]


class Gradients(NamedTuple):
    """The gradients of a call's results."""

    dh: Tensor  # (B, NH, S, DHHV)
    dc: Tensor  # (B, NH, DHQK, DHHV)
    dn: Tensor  # (B, NH, DHQK)
    dm: Tensor  # (B, NH, 1)

    def check(self, streams: Streams) -> None:
        """Raise ValueError unless each has the shape of its result."""
        B, NH, S, DHQK = streams.q.shape
        sizes = {"B": B, "NH": NH, "S": S, "DHQK": DHQK, "DHHV": streams.v.shape[-1]}
        check_shape("dh", self.dh, "B NH S DHHV", sizes)
        check_shape("dc", self.dc, "B NH DHQK DHHV", sizes)
        check_shape("dn", self.dn, "B NH DHQK", sizes)
        check_shape("dm", self.dm, "B NH 1", sizes)
