"""Packed documents with a state each, before and after."""
import torch

from torch_xlstm_ops import mlstm_chunkwise

NH, S, DHQK, DHHV = 4, 15, 64, 64
q, k, v = torch.randn(1, NH, S, DHQK), torch.randn(1, NH, S, DHQK), torch.randn(1, NH, S, DHHV)
igate, fgate = torch.randn(2, 1, NH, S)
ends = torch.tensor([0, 5, 6, 15])  # three documents, of 5, 1 and 9 tokens
h, state = mlstm_chunkwise(q, k, v, igate, fgate, cu_seqlens=ends)
h, state = mlstm_chunkwise(q, k, v, igate, fgate, *state, cu_seqlens=ends)  # and as many more tokens of each
print("states c:", tuple(state.c.shape))
