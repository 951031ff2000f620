"""Drop-in for pytorch-forecasting's xLSTMTime: its mLSTM layers.

Their cells keep a vector for each row, whose elements are mLSTMs with a sigmoid input gate and head sizes of 1:

    c' = sigmoid(f) c + sigmoid(i) v sum(k)          n' = sigmoid(f) n + sigmoid(i) k

Nothing in a cell depends on its last output: a whole sequence of a layer is one operator call, which computes both.
The original runs its cells token by token. Dropout draws the same masks in another order. The sLSTM cells normalise
their gates over the hidden units, which no operator computes, and are not replaced.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_xlstm_ops.patch.adapters import mlstm_sigmoid
from torch_xlstm_ops.patch.replacements import Replacement
from torch_xlstm_ops.runtime import torch_internals

EPS = 1e-8  # of the length of n
PARTS = "kvifo"  # of the cell; its query is not used


def replacements(compat: bool) -> Sequence[Replacement]:
    """Return the replacements."""
    from pytorch_forecasting.layers._recurrent._mlstm.layer import mLSTMLayer

    return [Replacement(mLSTMLayer, "forward", _layer_forward, "a layer's sequence is one op call",
                        ("self", "x", "h", "c", "n"), uses=(("init_hidden", ("self", "batch_size", "device")),))]


def _layer_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `mLSTMLayer.forward` on our operators, layer by layer; cells with hooks go to `original`."""

    @functools.wraps(original)
    def forward(
        self: Any, x: Tensor, h: Tensor | None = None, c: Tensor | None = None, n: Tensor | None = None
    ) -> Any:
        if x.dim() != 3 or len(x) == 0 or not all(map(_plain, self.cells)):
            return original(self, x, h, c, n)
        if h is None or c is None or n is None:
            h, c, n = self.init_hidden(x.shape[1])
        x, after = x.transpose(0, 1), []
        for index, cell in enumerate(self.cells):
            y, c_after, n_after = _cell(cell, x, c[index], n[index])
            x = y + x if self.residual_conn and index > 0 else y
            after.append((x[:, -1], c_after, n_after))
        h, c, n = (torch.stack(states) for states in zip(*after, strict=True))
        return x.transpose(0, 1), (h, c, n)

    return forward


def _plain(cell: Any) -> bool:
    """Return whether a cell is the package's own, without hooks."""
    known = type(cell).__module__.startswith("pytorch_forecasting.") and "forward" not in vars(cell)
    return known and not any(torch_internals.hooks(cell))


def _cell(cell: Any, x: Tensor, c: Tensor, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run a cell on x (B, S, F) from a state c, n (B, H); return its outputs (B, S, H), and c and n after it."""
    x = cell.dropout(x)
    k, v, i, f, o = (getattr(cell, f"W{part}")(x) for part in PARTS)
    k = k / math.sqrt(cell.hidden_size)
    if cell.layer_norm:
        k, v, i, f, o = (getattr(cell, f"ln_{part}")(t) for part, t in zip(PARTS, (k, v, i, f, o), strict=True))
    values = torch.stack([v * k.sum(-1, keepdim=True), k], -1).transpose(1, 2)  # (B, H, S, 2)
    i, f = (gate.to(values.dtype).transpose(1, 2) for gate in (i, f))
    ones = torch.ones_like(values[..., :1])
    state = torch.stack([c, n], -1)[:, :, None]  # (B, H, 1, 2)
    found, (after, _) = mlstm_sigmoid(ones, ones, values, i, f, state, None, None, normalize=False, eps=0.0)
    memory, sums = found.transpose(1, 2).unbind(-1)
    direction = sums / (torch.norm(sums, dim=-1, keepdim=True) + EPS)
    c, n = (t.to(torch.promote_types(c.dtype, values.dtype)) for t in after[:, :, 0].unbind(-1))
    return torch.sigmoid(o) * torch.tanh(memory * direction), c, n
