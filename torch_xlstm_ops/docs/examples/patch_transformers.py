"""Run a transformers model on the operators, then undo it."""
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from torch_xlstm_ops.models import DEMO_MODEL
from torch_xlstm_ops.patch import patch

model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype="float32").eval()
tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
ids = tokenizer("import os\n\ndef main():", return_tensors="pt").input_ids
with torch.no_grad():
    unpatched = model(ids, use_cache=False).logits
    with patch() as handle:  # every supported package that is installed
        print(*handle.report(), sep="\n")
        patched = model(ids, use_cache=False).logits
        text = tokenizer.decode(model.generate(ids, max_new_tokens=32, do_sample=False)[0])
print(text)
print("largest difference of the logits:", float((patched - unpatched).abs().max()))
