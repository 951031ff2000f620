"""Read a prompt by two workers (pip install -e ".[ray,models]")."""
import torch
from transformers import AutoModelForCausalLM

from torch_xlstm_ops.models import DEMO_MODEL
from torch_xlstm_ops.parallel import Workers
from torch_xlstm_ops.patch import patch

if __name__ == "__main__":
    ids = torch.randint(0, 256, (1, 3000))
    with patch("transformers"), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype="float32").eval()
        with Workers(model, 2) as workers:
            logits, cache, report = workers.prefill(ids)
        print(report)
        print("largest difference:", float((logits - model(ids).logits[:, -1]).abs().max()))
