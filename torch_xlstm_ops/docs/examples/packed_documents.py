"""Documents of several lengths in one row: `reset` starts each afresh, gradients included."""
import torch

from torch_xlstm_ops import mlstm_chunkwise

B, NH, D, lengths = 1, 2, 16, [20, 7, 33]
S = sum(lengths)
q, k, v = torch.randn(3, B, NH, S, D, dtype=torch.float64)
igate, fgate = torch.randn(2, B, NH, S, dtype=torch.float64)
starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
reset = torch.zeros(B, S, dtype=torch.bool).index_fill_(1, starts, True)
packed, _ = mlstm_chunkwise(q, k, v, igate, fgate, reset=reset)
parts = zip(*[t.split(lengths, 2) for t in (q, k, v, igate, fgate)], strict=True)
alone = [mlstm_chunkwise(*part)[0] for part in parts]
print("largest difference:", float((packed - torch.cat(alone, 2)).abs().max()))
