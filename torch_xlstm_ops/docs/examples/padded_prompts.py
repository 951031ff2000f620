"""Prompts of several lengths in one batch, and going on from the cache."""
from transformers import AutoModelForCausalLM, AutoTokenizer

from torch_xlstm_ops.models import DEMO_MODEL
from torch_xlstm_ops.patch import patch

tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype="float32").eval()
with patch("transformers"):
    batch = tokenizer(["import os", "def f(x):"], padding=True, return_tensors="pt")
    first = model.generate(**batch, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    whole = model.generate(first.sequences, cache=first.cache, max_new_tokens=8, do_sample=False)
print(*tokenizer.batch_decode(whole, skip_special_tokens=True), sep="\n---\n")
