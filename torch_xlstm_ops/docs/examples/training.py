"""Train an sLSTM to say whether a row of bits has an even number of ones."""
import torch
from torch import nn

from torch_xlstm_ops import slstm_sequence

NH, DH, S = 2, 16, 12
embed, head = nn.Embedding(2, 4 * NH * DH), nn.Linear(NH * DH, 2)
r = nn.Parameter(0.2 * torch.randn(4, NH, DH, DH))
b = nn.Parameter(torch.zeros(4, NH, DH))
optimizer = torch.optim.AdamW([*embed.parameters(), *head.parameters(), r, b], lr=1e-2)
torch.manual_seed(0)
for step in range(60):
    bits = torch.randint(0, 2, (64, S))
    h, _ = slstm_sequence(embed(bits).unflatten(-1, (4, NH, DH)), r, b)
    loss = nn.functional.cross_entropy(head(h.flatten(2)).flatten(0, 1), bits.cumsum(1).remainder(2).flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        print(f"step {step}: loss {loss.item():.3f}")
print(f"step {step}: loss {loss.item():.3f}")
