"""`xLSTM`: a recurrent module of nn.LSTM's shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from torch_xlstm_ops.maths.shapes import MLSTMState, SLSTMState
from torch_xlstm_ops.modules import sequences, stacks, weights
from torch_xlstm_ops.modules.blocks import MLSTMBlock, RMSNorm, SLSTMLayer
from torch_xlstm_ops.modules.stacks import xLSTMStack

KINDS: dict[str, type[MLSTMState] | type[SLSTMState]] = {"mlstm": MLSTMState, "slstm": SLSTMState}


class xLSTM(nn.Module):
    """Layers of mLSTM blocks, or of sLSTMs, called as nn.LSTM is: ``output, state = module(input, state)``.

    input_size: features of the input. hidden_size: those of the output, a multiple of num_heads.
    num_layers: default 1. kind: mlstm, the blocks of xLSTM 7B, default; or slstm.
    num_heads: default 4. bias: of linear layers and norms; of the sLSTM's gates, whether it is trained; default false.
    batch_first: whether a batch is (B, S, features), default false: (S, B, features).
    dropout: on the output of each layer but the last, default 0.
    bidirectional: run each layer back to front too, and concatenate both outputs; default false.
    qk_dim, v_dim, ffn_dim: of an mLSTM block, default half the hidden size, the hidden size, 8/3 of it in steps of 64.
    norm_eps, eps, soft_cap: of an mLSTM block: 1e-6 of the norms and of the denominator; 15 of the gates.
    out_norm: normalise the output, as whole models do; default false.

    A layer whose input has another size than the hidden one projects it linearly.
    Raises ValueError for sizes that do not go together.
    """

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, *, kind: str = "mlstm", num_heads: int = 4,
        bias: bool = False, batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False,
        qk_dim: int | None = None, v_dim: int | None = None, ffn_dim: int | None = None, norm_eps: float = 1e-6,
        eps: float = 1e-6, soft_cap: float = 15.0, out_norm: bool = False,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        qk_dim, v_dim = qk_dim or hidden_size // 2, v_dim or hidden_size
        _check(kind, num_heads, {"hidden_size": hidden_size, "qk_dim": qk_dim, "v_dim": v_dim})
        self.input_size, self.hidden_size, self.num_layers, self.kind = input_size, hidden_size, num_layers, kind
        self.batch_first, self.dropout, self.bidirectional = batch_first, dropout, bidirectional
        directions = 1 + bidirectional
        sizes = [input_size, *[hidden_size * directions] * (num_layers - 1)]
        self.inputs = nn.ModuleList(nn.Identity() if size == hidden_size else nn.Linear(size, hidden_size, bias=False)
                                    for size in sizes)
        ffn_dim = ffn_dim or -(-hidden_size * 8 // 3 // 64) * 64
        options: dict[str, Any] = {"bias": bias, "norm_eps": norm_eps, "soft_cap": soft_cap, "eps": eps}
        self.blocks = nn.ModuleList(
            MLSTMBlock(hidden_size, num_heads, qk_dim, v_dim, ffn_dim, **options) if kind == "mlstm"
            else SLSTMLayer(hidden_size, num_heads, bias=bias) for _ in range(num_layers * directions)
        )
        self.out_norm = RMSNorm(hidden_size * directions, norm_eps) if out_norm else nn.Identity()
        self.reset_parameters()
        self.to(device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        for block in self.blocks:
            block.reset_parameters(self.num_layers)  # type: ignore[operator]

    def forward(
        self, input: Tensor | PackedSequence, state: Sequence[Tensor] | None = None
    ) -> tuple[Tensor | PackedSequence, MLSTMState | SLSTMState]:
        """Run sequences from a state, zeros if none is given.

        input: (S, B, input_size), with batch_first (B, S, input_size); one sequence (S, input_size); or packed.
        state: as returned, with layers times directions as first dimension, then B, but for one sequence; float32.

        Returns the outputs in the layout of the input, and the state after each sequence: c, n, m of mLSTMs; y, c, n, m
        of sLSTMs. Raises ValueError for shapes that do not fit.
        """
        given = sequences.enter(input, batch_first=self.batch_first, features=self.input_size)
        single = isinstance(input, Tensor) and input.dim() == 2
        before = self._layers_of(state, given.rows, single)
        x, after = given.x, []
        directions = 1 + self.bidirectional
        for layer, project in enumerate(self.inputs):
            x = project(x)
            outputs = []
            for direction in range(directions):
                index = layer * directions + direction
                read = given.reversed(x) if direction else x
                y, found = self.blocks[index](read, before[index], given.ends)
                outputs.append(given.reversed(y) if direction else y)
                after.append(found)
            x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
            if layer < self.num_layers - 1:
                x = nn.functional.dropout(x, self.dropout, self.training)
        parts = [torch.stack(part) for part in zip(*after, strict=True)]
        result = KINDS[self.kind](*(part[:, 0] if single else part for part in parts))
        return sequences.leave(self.out_norm(x), given, input, batch_first=self.batch_first), result

    def _layers_of(self, state: Sequence[Tensor] | None, count: int, single: bool) -> list[Sequence[Tensor]]:
        """Return the state of each block."""
        if state is None:
            return [()] * len(self.blocks)
        names = KINDS[self.kind]._fields
        parts = [part[:, None] if single else part for part in state]
        if len(parts) != len(names) or any(part.shape[:2] != (len(self.blocks), count) for part in parts):
            raise ValueError(f"state must be {', '.join(names)}, each ({len(self.blocks)}, {count}, ...), "
                             f"got {', '.join(str(tuple(part.shape)) for part in parts)}")
        return list(zip(*parts, strict=True))

    @classmethod
    def from_model(cls, model: nn.Module, *, batch_first: bool = True) -> xLSTM | xLSTMStack:
        """Return a module with a copy of the blocks and the norm of a model of transformers or xlstm.

        model: xLSTMModel, xLSTMForCausalLM, xLSTMLarge or its block stack; of xlstm's xLSTMBlockStack and xLSTMLMModel,
        whose layers have convolutions and may differ in kind, an `xLSTMStack`. The module maps embeddings to the last
        hidden states. Raises ValueError for another model.
        """
        if stacks.is_stack(model):
            return stacks.from_stack(model, batch_first=batch_first)
        options, state_dict = weights.of(model)
        like = next(iter(state_dict.values()))
        module = cls(**options, batch_first=batch_first, device=like.device, dtype=like.dtype)
        module.load_state_dict(state_dict)
        return module

    def extra_repr(self) -> str:
        """Return the sizes."""
        return (f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, kind={self.kind!r}, "
                f"batch_first={self.batch_first}, bidirectional={self.bidirectional}")


def _check(kind: str, heads: int, sizes: dict[str, int]) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    for name, size in sizes.items():
        if size % heads:
            raise ValueError(f"{name} must be a multiple of num_heads = {heads}, got {size}")
