"""xlstm's block stack as a module of nn.LSTM's shape: mLSTMs and sLSTMs behind causal convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from torch_xlstm_ops.modules import sequences
from torch_xlstm_ops.modules.conv_blocks import (
    NORM_EPS,
    ConvBlock,
    ConvMLSTMLayer,
    ConvMLSTMState,
    ConvSLSTMLayer,
    ConvSLSTMState,
    FeedForward,
)

State = ConvMLSTMState | ConvSLSTMState
CELL = "slstm_cell."


class xLSTMStack(nn.Module):
    """Blocks of mLSTMs and sLSTMs behind convolutions, called as nn.LSTM is; `xLSTM.from_model` makes it."""

    def __init__(self, hidden_size: int, blocks: Sequence[ConvBlock], *, norm: bool, batch_first: bool) -> None:
        super().__init__()
        self.hidden_size, self.batch_first = hidden_size, batch_first
        self.blocks = nn.ModuleList(blocks)
        self.post_blocks_norm = nn.LayerNorm(hidden_size, NORM_EPS, bias=False) if norm else nn.Identity()

    def forward(
        self, input: Tensor | PackedSequence, state: Sequence[Sequence[Tensor]] | None = None
    ) -> tuple[Tensor | PackedSequence, tuple[State, ...]]:
        """Run sequences from a state, zeros if none is given.

        input: (S, B, H), with batch_first (B, S, H); one sequence (S, H); or packed.
        state: as returned, one for each block, B first, but for one sequence.

        Returns the outputs in the layout of the input, and the state of each block after each sequence: conv, c, n, m
        of an mLSTM; conv, y, c, n, m of an sLSTM. Raises ValueError for shapes that do not fit.
        """
        given = sequences.enter(input, batch_first=self.batch_first, features=self.hidden_size)
        single = isinstance(input, Tensor) and input.dim() == 2
        before = self._each(state, given.rows, single)
        x, after = given.x, []
        for block, one in zip(self.blocks, before, strict=True):
            x, found = block(x, one, given.ends)
            after.append(type(found)(*(part[0] for part in found)) if single else found)
        return sequences.leave(self.post_blocks_norm(x), given, input, batch_first=self.batch_first), tuple(after)

    def _each(self, state: Sequence[Sequence[Tensor]] | None, rows: int, single: bool) -> Sequence[Any]:
        """Return the state of each block, or None."""
        if state is None:
            return [None] * len(self.blocks)
        found = [[part[None] if single else part for part in one] for one in state]
        if len(found) != len(self.blocks) or any(len(part) != rows for one in found for part in one):
            raise ValueError(f"state must hold a state of {rows} rows for each of {len(self.blocks)} blocks, got "
                             f"{[[tuple(part.shape) for part in one] for one in state]}")
        return found

    def extra_repr(self) -> str:
        """Return the sizes."""
        return f"{self.hidden_size}, batch_first={self.batch_first}"


def is_stack(model: nn.Module) -> bool:
    """Return whether a model is a block stack of xlstm, or has one."""
    blocks = getattr(_stack(model), "blocks", None)
    return isinstance(blocks, nn.ModuleList) and len(blocks) > 0 and hasattr(blocks[0], "xlstm")


def from_stack(model: nn.Module, *, batch_first: bool) -> xLSTMStack:
    """Return a module with a copy of the blocks and the norm of xlstm's block stack or language model.

    Raises ValueError for cells that are no sLSTM.
    """
    stack: Any = _stack(model)
    H, blocks = stack.config.embedding_dim, [_block(block) for block in stack.blocks]
    norm = not isinstance(stack.post_blocks_norm, nn.Identity)
    found = _weights(stack)
    like = next(iter(found.values()))
    module = xLSTMStack(H, blocks, norm=norm, batch_first=batch_first).to(like.device, like.dtype)
    module.load_state_dict(found)
    return module.train(model.training)


def _stack(model: nn.Module) -> nn.Module:
    return getattr(model, "xlstm_block_stack", model)


def _block(block: Any) -> ConvBlock:
    """Return a block of the sizes of xlstm's."""
    ffn, config, layer = None, block.xlstm.config, block.xlstm
    H = config.embedding_dim
    if block.ffn is not None:
        options = block.ffn.config
        ffn = FeedForward(H, options._proj_up_dim, options.act_fn, bias=options.bias, dropout=options.dropout)
    if hasattr(layer, "mlstm_cell"):
        mlstm = ConvMLSTMLayer(
            H, config._inner_embedding_dim, config.num_heads, len(layer.q_proj.weight), config.conv1d_kernel_size,
            bias=config.bias, dropout=config.dropout)
        return ConvBlock(H, mlstm, ffn)
    if config.function != "slstm":
        raise ValueError(f"the cells of a stack must be mLSTMs and sLSTMs, got {config.function}")
    return ConvBlock(H, ConvSLSTMLayer(H, config.num_heads, config.conv1d_kernel_size, dropout=config.dropout), ffn)


def _weights(stack: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a stack by our names: norms without their added 1, cells in the operator's layout."""
    found = {name.replace("mlstm_cell.", ""): value.detach() for name, value in stack.named_parameters()
             if CELL not in name}
    for path, module in stack.named_modules():
        if hasattr(module, "weight_proxy"):
            weight = module.weight_proxy
            found[f"{path}.weight".replace("mlstm_cell.", "")] = (
                torch.ones(module.ndim) if weight is None else weight.detach())
        if hasattr(module, "_recurrent_kernel_"):
            layer = path.removesuffix(CELL.rstrip("."))
            found[f"{layer}r"], found[f"{layer}b"] = _cell(module._recurrent_kernel_, module._bias_)
    return found


def _cell(r: Any, b: Any) -> tuple[Tensor, Tensor]:
    """Return r (4, NH, DH, DH) [gate, head, out, in] and b (4, NH, DH) of a cell of either backend."""
    r, b, NH = r.detach(), b.detach(), len(r)
    if r.shape[1] > r.shape[2]:  # vanilla: (NH, 4 DH_out, DH_in), (4 NH DH)
        return torch.unflatten(r, 1, (4, -1)).transpose(0, 1), b.view(4, NH, -1)
    return torch.unflatten(r, -1, (4, -1)).permute(2, 0, 3, 1), b.view(NH, 4, -1).transpose(0, 1)
