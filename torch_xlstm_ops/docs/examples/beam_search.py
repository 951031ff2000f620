"""Beam search with a cache, which transformers' xLSTM refuses without the patch, and several results of one prompt."""
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from torch_xlstm_ops.models import DEMO_MODEL
from torch_xlstm_ops.patch import patch

tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype="float32").eval()
prompt = tokenizer("def f(x):", return_tensors="pt")
options = {"max_new_tokens": 12, "num_beams": 4, "num_return_sequences": 2, "do_sample": False}
with patch("transformers"):
    found = model.generate(**prompt, **options)
    anew = model.generate(**prompt, **options, use_cache=False)  # reads the whole text for every token
print(*tokenizer.batch_decode(found, skip_special_tokens=True), sep="\n---\n")
print("the same without a cache:", torch.equal(found, anew))
assert torch.equal(found, anew)
