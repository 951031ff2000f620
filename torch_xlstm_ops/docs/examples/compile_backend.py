"""Compile a model that nobody patched, and see what the backend replaced."""
import torch
from transformers import AutoModelForCausalLM

from torch_xlstm_ops import explain
from torch_xlstm_ops.models import DEMO_MODEL

model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype="float32").eval()
ids = torch.randint(0, 256, (1, 48))
with torch.no_grad():
    print(explain(model, ids, use_cache=False))
    fast = torch.compile(model, backend="xlstm")
    difference = fast(ids, use_cache=False).logits - model(ids, use_cache=False).logits
print("largest difference of the logits:", float(difference.abs().max()))
