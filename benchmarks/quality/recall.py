"""Multi-query associative recall: the task, and small models that solve it with our operators.

A row is P pairs of a key and a value, then every key once more, in any order; the answer to a key is its value:

    k3 v7  k1 v2  k9 v7   |   k9 k3 k1   ->   v7 v7 v2

What has to be remembered is random, so a model can answer only from its state.
Source: Arora et al. 2023, "Zoology: Measuring and Improving Recall in Efficient Language Models".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_xlstm_ops import mlstm_chunkwise, slstm_sequence, slstm_step
from torch_xlstm_ops.maths.shapes import state_dtype

GATE_CAP = 15.0  # gates pass through cap * tanh(. / cap), as in xLSTM-7B
Mix = Callable[..., tuple[Tensor, tuple[Tensor, ...]]]  # q k v igate fgate c n m -> h, (c, n, m)


class Size(NamedTuple):
    """The sizes of a model and of its vocabulary: keys are tokens 0 to keys - 1, values follow."""

    keys: int = 2048
    values: int = 256
    hidden: int = 128
    NH: int = 2
    DHQK: int = 128
    DHHV: int = 128
    conv: int = 4  # taps of the causal convolutions before q and k; 0 is none
    slstm_heads: int = 0  # of an sLSTM instead of the convolutions; 0 is none


class Batch(NamedTuple):
    """Rows of the task; S = 3 P."""

    ids: Tensor  # (B, S) int64
    answers: Tensor  # (B, P) int64, the values wanted at the last P tokens, from 0 up
    distance: Tensor  # (B, P) int64, tokens from a pair's value to its query


def draw(size: Size, B: int, P: int, generator: torch.Generator) -> Batch:
    """Draw B rows of P pairs with different keys."""
    if size.keys < P:
        raise ValueError(f"pairs must be at most {size.keys}, the number of keys, got {P}")
    keys = torch.rand(B, size.keys, generator=generator).argsort(-1)[:, :P]
    values = torch.randint(size.values, (B, P), generator=generator)
    order = torch.rand(B, P, generator=generator).argsort(-1)  # which pair each query asks for
    pairs = torch.stack([keys, values + size.keys], -1).flatten(1)  # (B, 2 P)
    distance = 2 * P + torch.arange(P) - (2 * order + 1)
    return Batch(torch.cat([pairs, keys.gather(1, order)], 1), values.gather(1, order), distance)


class States(NamedTuple):
    """The states of a model."""

    mlstm: tuple[Tensor, ...]  # c (B, NH, DHQK, DHHV), n (B, NH, DHQK), m (B, NH, 1)
    before: tuple[Tensor, ...]  # the convolutions' last inputs (B, conv - 1, hidden), or the sLSTM's y, c, n, m


class MLSTMBlock(nn.Module):
    """x + W_o(sigmoid(o) * norm(mLSTM(q, k, v, i, f))), with q and k from a mix of the last few tokens."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        hidden, NH, DHQK, DHHV = size.hidden, size.NH, size.DHQK, size.DHHV
        self.norm, self.h_norm = nn.RMSNorm(hidden), nn.RMSNorm(DHHV)
        self.q, self.k = nn.Linear(hidden, NH * DHQK, bias=False), nn.Linear(hidden, NH * DHQK, bias=False)
        self.v, self.o = nn.Linear(hidden, NH * DHHV, bias=False), nn.Linear(hidden, NH * DHHV)
        self.gates, self.out = nn.Linear(hidden, 2 * NH), nn.Linear(NH * DHHV, hidden, bias=False)
        with torch.no_grad():
            self.gates.weight.zero_()
            self.gates.bias[:NH] = 0.0
            self.gates.bias[NH:] = 6.0  # forget gates open: a token costs 0.2% of the memory
        self.before: ShortConvolutions | SLSTM = SLSTM(size) if size.slstm_heads else ShortConvolutions(size)

    def forward(self, x: Tensor, states: States, mix: Mix) -> tuple[Tensor, States]:
        B, S, _ = x.shape
        NH = self.size.NH
        u = self.norm(x)
        (u_q, u_k), before = self.before(u, states.before)
        q, k, v = (
            linear(source).view(B, S, NH, -1).transpose(1, 2)
            for linear, source in ((self.q, u_q), (self.k, u_k), (self.v, u))
        )
        gates = GATE_CAP * torch.tanh(self.gates(u) / GATE_CAP)
        igate, fgate = gates.view(B, S, 2, NH).permute(2, 0, 3, 1)
        h, mlstm = mix(q, k, v, igate, fgate, *states.mlstm)
        h = self.h_norm(h).transpose(1, 2).flatten(2)  # (B, S, NH * DHHV)
        return x + self.out(torch.sigmoid(self.o(u)) * h), States(tuple(mlstm), before)

    def zero_states(self, x: Tensor) -> States:
        """Return the states before the first token of x."""
        NH, DHQK, DHHV = self.size.NH, self.size.DHQK, self.size.DHHV
        shapes = [(NH, DHQK, DHHV), (NH, DHQK), (NH, 1)]
        mlstm = tuple(x.new_zeros(len(x), *shape, dtype=state_dtype(x.dtype)) for shape in shapes)
        return States(mlstm, self.before.zero_state(x))


class ShortConvolutions(nn.Module):
    """Two causal convolutions, each channel on its own: one for q, one for k."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.taps = nn.Parameter(torch.randn(2, size.hidden, size.conv) * size.conv**-0.5)

    def forward(self, u: Tensor, state: tuple[Tensor, ...]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]:
        W, S = self.taps.shape[-1], u.shape[1]
        u_with_past = torch.cat([*state, u], 1)  # (B, W - 1 + S, hidden)
        u_q, u_k = (
            sum((u_with_past[:, w : w + S] * taps[:, w] for w in range(1, W)), u_with_past[:, :S] * taps[:, 0])
            for taps in self.taps  # the last tap is for the token itself
        )
        return (u_q, u_k), (u_with_past[:, S:],)

    def zero_state(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the past inputs of the convolutions before the first token of x."""
        return (x.new_zeros(len(x), self.taps.shape[-1] - 1, x.shape[-1]),)


class SLSTM(nn.Module):
    """norm(sLSTM(W u)), for both q and k."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.NH, self.DH = size.slstm_heads, size.hidden // size.slstm_heads
        self.x, self.h_norm = nn.Linear(size.hidden, 4 * size.hidden, bias=False), nn.RMSNorm(self.DH)
        self.r = nn.Parameter(torch.zeros(4, self.NH, self.DH, self.DH))
        self.b = nn.Parameter(torch.zeros(4, self.NH, self.DH))

    def forward(self, u: Tensor, state: tuple[Tensor, ...]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]:
        B, S, _ = u.shape
        gates = self.x(u).view(B, S, 4, self.NH, self.DH)
        if S == 1:
            after = slstm_step(gates[:, 0], self.r, self.b, *state)
            h = after.y.to(u.dtype)[:, None]
        else:
            h, after = slstm_sequence(gates, self.r, self.b, *state)
        mixed = self.h_norm(h).flatten(2)
        return (mixed, mixed), tuple(after)

    def zero_state(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return y, c, n, m before the first token of x."""
        return tuple(x.new_zeros(4, len(x), self.NH, self.DH, dtype=state_dtype(x.dtype)))


class Recall(nn.Module):
    """Embedding, an mLSTM block, and a head over the values."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.embedding = nn.Embedding(size.keys + size.values, size.hidden)
        self.block = MLSTMBlock(size)
        self.norm, self.head = nn.RMSNorm(size.hidden), nn.Linear(size.hidden, size.values, bias=False)

    def forward(
        self, ids: Tensor, states: States | None = None, *, last: int | None = None, mix: Mix = mlstm_chunkwise
    ) -> tuple[Tensor, States]:
        """Return the logits (B, S, values), of the `last` tokens where that is given, and the states after them."""
        x = self.embedding(ids)
        x, states = self.block(x, self.block.zero_states(x) if states is None else states, mix)
        return self.head(self.norm(x if last is None else x[:, -last:])), states


def loss_and_accuracy(logits: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean loss of logits (B, P, values), and the share of answers (B, P) that are most likely."""
    loss = F.cross_entropy(logits.float().flatten(0, 1), answers.flatten())
    return loss, (logits.argmax(-1) == answers).float().mean()
