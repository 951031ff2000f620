"""A module of nn.LSTM's shape: sequences of several lengths, read in two pieces."""
import torch
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

from torch_xlstm_ops.modules import xLSTM

module = xLSTM(input_size=10, hidden_size=64, num_layers=2, kind="slstm").eval()
sequences = [torch.randn(length, 10) for length in (9, 4, 6)]
whole, _ = module(pack_sequence(sequences, enforce_sorted=False))
_, state = module(pack_sequence([one[:3] for one in sequences], enforce_sorted=False))
rest, state = module(pack_sequence([one[3:] for one in sequences], enforce_sorted=False), state)
found, _ = pad_packed_sequence(rest, batch_first=True)
wanted, _ = pad_packed_sequence(whole, batch_first=True)
print("largest difference:", float((found[0] - wanted[0, 3:]).detach().abs().max()))
