"""An mLSTM layer on the operators: a prompt, then tokens, equal to the whole sequence."""
import torch
from torch import nn

from torch_xlstm_ops import mlstm_chunkwise, mlstm_step


class MLSTM(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.gates = nn.Linear(width, 3 * width), nn.Linear(width, 2 * heads)
        self.out = nn.Linear(width, width)

    def forward(self, x, state=None):  # x: (B, S, width)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        igate, fgate = self.gates(x).unflatten(-1, (2, self.heads)).permute(2, 0, 3, 1)
        if state is not None and x.shape[1] == 1:
            h, state = mlstm_step(q[:, :, 0], k[:, :, 0], v[:, :, 0], igate, fgate, *state)
            h = h[:, :, None]
        else:
            h, state = mlstm_chunkwise(q, k, v, igate, fgate, *(state or ()))
        return self.out(h.transpose(1, 2).flatten(2)), state


layer, x = MLSTM(64, 4), torch.randn(2, 50, 64)
with torch.no_grad():
    whole, _ = layer(x)
    parts, state = [], None
    for piece in x.split([30, 19, 1], 1):
        y, state = layer(piece, state)
        parts.append(y)
print("largest difference:", float((torch.cat(parts, 1) - whole).abs().max()))
