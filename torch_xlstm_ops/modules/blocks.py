"""Layers of an xLSTM: the mLSTM block of xLSTM 7B, and an sLSTM with a linear input.

Parameters of the block have the names that transformers and xlstm_large give them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torch_xlstm_ops.api import mlstm_chunkwise, slstm_sequence
from torch_xlstm_ops.maths.shapes import state_dtype


class Scaled(nn.Module):
    """The weight, and the bias, of what a norm has normalised."""

    def __init__(self, features: int, eps: float, *, bias: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features)) if bias else None

    def scale(self, y: Tensor) -> Tensor:
        """Return y (..., features) times the weight, plus the bias."""
        y = y * self.weight
        return y if self.bias is None else y + self.bias


class RMSNorm(Scaled):
    """Divide by the root mean square, computed in float32 (float64 for float64)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., features)."""
        wide = x.to(state_dtype(x.dtype))
        return self.scale((wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype))


class HeadNorm(Scaled):
    """Normalise each head to mean 0 and variance 1, computed in float32 (float64 for float64)."""

    def forward(self, h: Tensor) -> Tensor:
        """Normalise h (B, S, NH, DHHV); return (B, S, NH DHHV)."""
        y = nn.functional.layer_norm(h.to(state_dtype(h.dtype)), h.shape[-1:], eps=self.eps)
        return self.scale(y.to(h.dtype).flatten(2))


class MLSTMLayer(nn.Module):
    """Project to q, k, v and gates, run the mLSTM, normalise its heads, gate and project."""

    def __init__(self, H: int, NH: int, qk_dim: int, v_dim: int, *, bias: bool, norm_eps: float, soft_cap: float,
                 eps: float) -> None:
        super().__init__()
        self.heads, self.soft_cap, self.eps = NH, soft_cap, eps
        self.q, self.k = nn.Linear(H, qk_dim, bias), nn.Linear(H, qk_dim, bias)
        self.v, self.ogate_preact = nn.Linear(H, v_dim, bias), nn.Linear(H, v_dim, bias)
        self.igate_preact, self.fgate_preact = nn.Linear(H, NH), nn.Linear(H, NH)
        self.multihead_norm = HeadNorm(v_dim, norm_eps, bias=bias)
        self.out_proj = nn.Linear(v_dim, H, bias)

    def forward(self, x: Tensor, state: Sequence[Tensor], ends: Tensor | None) -> tuple[Tensor, Sequence[Tensor]]:
        """Run x (B, S, H) from a state; return y (B, S, H) and the state after it."""
        q, k, v = (torch.unflatten(p(x), -1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        igate, fgate = (self.soft_cap * torch.tanh(p(x).transpose(1, 2) / self.soft_cap)
                        for p in (self.igate_preact, self.fgate_preact))
        h, after = mlstm_chunkwise(q, k, v, igate, fgate, *state, cu_seqlens=ends, eps=self.eps)
        return self.out_proj(torch.sigmoid(self.ogate_preact(x)) * self.multihead_norm(h.transpose(1, 2))), after


class FeedForward(nn.Module):
    """A gated feed-forward."""

    def __init__(self, H: int, width: int, *, bias: bool) -> None:
        super().__init__()
        self.proj_up_gate, self.proj_up = nn.Linear(H, width, bias), nn.Linear(H, width, bias)
        self.proj_down = nn.Linear(width, H, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., H)."""
        y: Tensor = self.proj_down(nn.functional.silu(self.proj_up_gate(x)) * self.proj_up(x))
        return y


class MLSTMBlock(nn.Module):
    """An mLSTM layer and a feed-forward, each normalised before and added."""

    def __init__(self, H: int, NH: int, qk_dim: int, v_dim: int, ffn_dim: int, *, bias: bool, norm_eps: float,
                 soft_cap: float, eps: float) -> None:
        super().__init__()
        self.norm_mlstm = RMSNorm(H, norm_eps, bias=bias)
        self.mlstm_layer = MLSTMLayer(H, NH, qk_dim, v_dim, bias=bias, norm_eps=norm_eps, soft_cap=soft_cap, eps=eps)
        self.norm_ffn = RMSNorm(H, norm_eps, bias=bias)
        self.ffn = FeedForward(H, ffn_dim, bias=bias)

    def forward(self, x: Tensor, state: Sequence[Tensor], ends: Tensor | None) -> tuple[Tensor, Sequence[Tensor]]:
        """Run x (B, S, H) from a state c, n, m; return y and the state after it."""
        h, after = self.mlstm_layer(self.norm_mlstm(x), state, ends)
        x = x + h
        return x + self.ffn(self.norm_ffn(x)), after

    def reset_parameters(self, layers: int) -> None:
        """Draw the weights as xLSTM 7B's: closed input gates, forget gates that remember."""
        H = self.mlstm_layer.q.in_features
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=math.sqrt(2 / (5 * H)))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for output in (self.mlstm_layer.out_proj, self.ffn.proj_down):
            nn.init.normal_(output.weight, std=2 / layers / math.sqrt(H))
        igate, fgate = self.mlstm_layer.igate_preact, self.mlstm_layer.fgate_preact
        with torch.no_grad():
            igate.weight.zero_()
            fgate.weight.zero_()
            igate.bias.fill_(-10.0)
            fgate.bias.copy_(torch.linspace(3.0, 6.0, len(fgate.bias)))


class SLSTMLayer(nn.Module):
    """An sLSTM whose gates get a linear function of the input: the xLSTM that is nearest to an LSTM."""

    def __init__(self, H: int, NH: int, *, bias: bool) -> None:
        super().__init__()
        self.heads = NH
        self.proj = nn.Linear(H, 4 * H, bias=False)  # gates in the order i f z o
        self.r = nn.Parameter(torch.zeros(4, NH, H // NH, H // NH))  # [gate, head, out, in]
        self.b = nn.Parameter(torch.zeros(4, NH, H // NH), requires_grad=bias)

    def forward(self, x: Tensor, state: Sequence[Tensor], ends: Tensor | None) -> tuple[Tensor, Sequence[Tensor]]:
        """Run x (B, S, H) from a state y, c, n, m; return y (B, S, H) and the state after it."""
        gates = torch.unflatten(self.proj(x), -1, (4, self.heads, -1))
        h, after = slstm_sequence(gates, self.r, self.b, *state, cu_seqlens=ends)
        return h.flatten(2), after

    def reset_parameters(self, layers: int) -> None:
        """Draw the weights: forget gates that remember, no recurrence yet."""
        H = self.proj.in_features
        nn.init.normal_(self.proj.weight, std=math.sqrt(2 / (5 * H)))
        with torch.no_grad():
            self.r.zero_()
            self.b.zero_()
            self.b[1] = torch.linspace(3.0, 6.0, H // self.heads)
