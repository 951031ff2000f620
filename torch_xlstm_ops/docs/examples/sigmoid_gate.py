"""An mLSTM with a sigmoid input gate: a sequence at once, then token by token from its state."""
import torch

from torch_xlstm_ops import mlstm_sigmoid_chunkwise, mlstm_sigmoid_step

q, k, v = (torch.randn(2, 4, 20, 16) for _ in range(3))  # (B, NH, S, DH)
igate, fgate = torch.randn(2, 4, 20), 3 + torch.randn(2, 4, 20)  # before their sigmoids
whole, _ = mlstm_sigmoid_chunkwise(q, k, v, igate, fgate, normalize=False)
_, state = mlstm_sigmoid_chunkwise(*(t[:, :, :15] for t in (q, k, v, igate, fgate)), normalize=False)
steps = []
for t in range(15, 20):
    token = (x[:, :, t] for x in (q, k, v))
    h, state = mlstm_sigmoid_step(*token, igate[:, :, t : t + 1], fgate[:, :, t : t + 1], *state, normalize=False)
    steps.append(h)
print("largest difference:", float((torch.stack(steps, 2) - whole[:, :, 15:]).abs().max()))
