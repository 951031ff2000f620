"""Blocks of xlstm's stack: an mLSTM or an sLSTM behind a causal convolution. Parameters have xlstm's names."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torch_xlstm_ops.api import mlstm_chunkwise, slstm_sequence
from torch_xlstm_ops.modules.blocks import HeadNorm

NORM_EPS = 1e-5
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": nn.functional.gelu, "relu": nn.functional.relu, "relu^2": lambda x: nn.functional.relu(x).square(),
    "sigmoid": torch.sigmoid, "swish": nn.functional.silu, "selu": nn.functional.selu,
}


class ConvMLSTMState(NamedTuple):
    """The state of an mLSTM behind a convolution of size K."""

    conv: Tensor  # (B, K - 1, inner size), the last inputs
    c: Tensor  # (B, NH, DH, DH)
    n: Tensor  # (B, NH, DH)
    m: Tensor  # (B, NH, 1)


class ConvSLSTMState(NamedTuple):
    """The state of an sLSTM behind a convolution of size K."""

    conv: Tensor  # (B, K - 1, H), the last inputs; (B, 0, H) without a convolution
    y: Tensor  # (B, NH, DH)
    c: Tensor  # (B, NH, DH)
    n: Tensor  # (B, NH, DH)
    m: Tensor  # (B, NH, DH)


class HeadwiseLinear(nn.Module):
    """A linear layer within each head."""

    def __init__(self, features: int, heads: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, features // heads, features // heads))  # [head, out, in]
        self.bias = nn.Parameter(torch.zeros(features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., features)."""
        y = torch.einsum("...hd,hod->...ho", torch.unflatten(x, -1, (len(self.weight), -1)), self.weight).flatten(-2)
        return y if self.bias is None else y + self.bias


class CausalConv(nn.Module):
    """A convolution of each feature over the last K tokens."""

    def __init__(self, features: int, size: int) -> None:
        super().__init__()
        self.past = size - 1
        self.conv = nn.Conv1d(features, features, size, groups=features)

    def forward(self, x: Tensor, state: Tensor | None, ends: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return y (B, S, F) for x (B, S, F), or for one row of sequences that end at `ends`, and the last inputs."""
        cuts = [0, x.shape[1]] if ends is None else ends.tolist()
        rows = len(x) if ends is None else len(cuts) - 1
        before = x.new_zeros((rows, self.past, x.shape[-1])) if state is None else state.to(x.dtype)
        if ends is None:
            pieces = [torch.cat([before, x], 1)]
        else:
            pieces = [torch.cat([before[i : i + 1], x[:, a:b]], 1) for i, (a, b) in enumerate(itertools.pairwise(cuts))]
        read = torch.cat(pieces, 1)
        y = nn.functional.conv1d(read.transpose(1, 2), self.conv.weight, self.conv.bias, groups=x.shape[-1])
        at = torch.cat([torch.arange(a, b) + i * self.past for i, (a, b) in enumerate(itertools.pairwise(cuts))])
        y = y.transpose(1, 2)[:, at.to(x.device)]
        return y, torch.cat([piece[:, piece.shape[1] - self.past :] for piece in pieces])


class ConvMLSTMLayer(nn.Module):
    """Project up, convolve, run the mLSTM beside a gate, project down."""

    def __init__(self, H: int, inner: int, heads: int, projections: int, size: int, *, bias: bool, dropout: float
                 ) -> None:
        super().__init__()
        self.heads = heads
        self.proj_up = nn.Linear(H, 2 * inner, bias)
        self.q_proj, self.k_proj, self.v_proj = (HeadwiseLinear(inner, projections, bias=bias) for _ in range(3))
        self.conv1d = CausalConv(inner, size)
        self.igate, self.fgate = nn.Linear(3 * inner, heads), nn.Linear(3 * inner, heads)
        self.outnorm = HeadNorm(inner, NORM_EPS)
        self.learnable_skip = nn.Parameter(torch.ones(inner))
        self.proj_down = nn.Linear(inner, H, bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, state: Sequence[Tensor] | None, ends: Tensor | None) -> tuple[Tensor, ConvMLSTMState]:
        """Run x (B, S, H) from a state; return y (B, S, H) and the state after it."""
        inner, z = self.proj_up(x).chunk(2, -1)
        conv, *cell = (None,) if state is None else state
        mixed, last = self.conv1d(inner, conv, ends)
        mixed = nn.functional.silu(mixed)
        flat = self.q_proj(mixed), self.k_proj(mixed), self.v_proj(inner)
        seen = torch.cat(flat, -1)
        q, k, v = (torch.unflatten(t, -1, (self.heads, -1)).transpose(1, 2) for t in flat)
        gates = self.igate(seen).transpose(1, 2), self.fgate(seen).transpose(1, 2)
        h, after = mlstm_chunkwise(q, k, v, *gates, *cell, cu_seqlens=ends)
        y = (self.outnorm(h.transpose(1, 2)) + self.learnable_skip * mixed) * nn.functional.silu(z)
        return self.dropout(self.proj_down(y)), ConvMLSTMState(last, *after)


class ConvSLSTMLayer(nn.Module):
    """Convolve what the input and forget gates see, run the sLSTM, normalise its heads."""

    def __init__(self, H: int, heads: int, size: int, *, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.conv1d = CausalConv(H, size) if size else None
        self.fgate, self.igate, self.zgate, self.ogate = (HeadwiseLinear(H, heads) for _ in range(4))
        self.r = nn.Parameter(torch.zeros(4, heads, H // heads, H // heads))  # [gate, head, out, in]
        self.b = nn.Parameter(torch.zeros(4, heads, H // heads))
        self.group_norm = HeadNorm(H, NORM_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, state: Sequence[Tensor] | None, ends: Tensor | None) -> tuple[Tensor, ConvSLSTMState]:
        """Run x (B, S, H) from a state; return y (B, S, H) and the state after it."""
        conv, *cell = (None,) if state is None else state
        mixed, last = x, x.new_zeros((len(x) if ends is None else len(ends) - 1, 0, x.shape[-1]))
        if self.conv1d is not None:
            mixed, last = self.conv1d(x, conv, ends)
            mixed = nn.functional.silu(mixed)
        # In xlstm's order, where the weight named fgate is that of the input gate and the other way round.
        streams = self.fgate(mixed), self.igate(mixed), self.zgate(x), self.ogate(x)
        gates = torch.stack([torch.unflatten(t, -1, (self.heads, -1)) for t in streams], 2)
        h, after = slstm_sequence(gates, self.r, self.b, *cell, cu_seqlens=ends)
        return self.group_norm(self.dropout(h)), ConvSLSTMState(last, *after)


class FeedForward(nn.Module):
    """A gated feed-forward."""

    def __init__(self, H: int, width: int, activation: str, *, bias: bool, dropout: float) -> None:
        super().__init__()
        self.proj_up, self.proj_down = nn.Linear(H, 2 * width, bias), nn.Linear(width, H, bias)
        self.activation = activation
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., H)."""
        gate, up = self.proj_up(x).chunk(2, -1)
        y: Tensor = self.dropout(self.proj_down(ACTIVATIONS[self.activation](gate) * up))
        return y


class ConvBlock(nn.Module):
    """A layer, and a feed-forward if there is one, each normalised before and added."""

    def __init__(self, H: int, layer: ConvMLSTMLayer | ConvSLSTMLayer, ffn: FeedForward | None) -> None:
        super().__init__()
        self.xlstm_norm, self.xlstm = nn.LayerNorm(H, NORM_EPS, bias=False), layer
        self.ffn_norm = None if ffn is None else nn.LayerNorm(H, NORM_EPS, bias=False)
        self.ffn = ffn

    def forward(
        self, x: Tensor, state: Sequence[Tensor] | None, ends: Tensor | None
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Run x (B, S, H) from a state; return y and the state after it."""
        y, after = self.xlstm(self.xlstm_norm(x), state, ends)
        x = x + y
        if self.ffn is not None and self.ffn_norm is not None:
            x = x + self.ffn(self.ffn_norm(x))
        return x, after
