"""Export a patched model with a prompt of any length."""
import torch
from transformers import AutoModelForCausalLM

from torch_xlstm_ops.models import DEMO_MODEL
from torch_xlstm_ops.patch import patch


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


model = Logits(AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype="float32").eval())
ids = torch.randint(0, 256, (1, 40))
with patch("transformers"), torch.no_grad():
    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(model, (ids,), dynamic_shapes=({1: length},))
    print({str(node.target) for node in program.graph.nodes if "xlstm" in str(node.target)})
    longer = torch.randint(0, 256, (1, 75))
    print("largest difference:", float((program.module()(longer) - model(longer)).abs().max()))
