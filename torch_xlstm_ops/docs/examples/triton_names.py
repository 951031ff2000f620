"""A Triton function of mlstm_kernels, imported by name before the patch, on a machine without CUDA."""
import torch
from mlstm_kernels.torch.chunkwise.native import mlstm_chunkwise__native_autograd
from mlstm_kernels.torch.chunkwise.triton_xl_chunk import mlstm_chunkwise__xl_chunk

from torch_xlstm_ops.patch import patch

q, k, v = (torch.randn(1, 2, 64, 16, requires_grad=True) for _ in range(3))  # (B, NH, S, DH)
igate, fgate = torch.randn(1, 2, 64), 3 + torch.randn(1, 2, 64)
with patch("mlstm_kernels"):
    h = mlstm_chunkwise__xl_chunk(q, k, v, igate, fgate, chunk_size=32)
    gradients = torch.autograd.grad(h.sum(), [q, k, v])
wanted = mlstm_chunkwise__native_autograd(q, k, v, igate, fgate, chunk_size=32)
print("largest difference:", float((h - wanted).detach().abs().max()))
print("gradients", *(tuple(g.shape) for g in gradients))
