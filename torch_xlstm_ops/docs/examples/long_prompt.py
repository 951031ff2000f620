"""Read a long text in constant memory, keep its state, and continue from it."""
import tempfile

from transformers import AutoModelForCausalLM, AutoTokenizer

from torch_xlstm_ops.context import StatePool, prefill
from torch_xlstm_ops.models import DEMO_MODEL
from torch_xlstm_ops.patch import patch

LENGTH = 20_000  # tokens; a million takes the same memory
with patch("transformers"), tempfile.TemporaryDirectory() as folder:
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokens = tokenizer("import os\n" * (LENGTH // 10)).input_ids
    pool = StatePool(model, folder, host_bytes=1 << 28, disk_bytes=1 << 30)
    state = prefill(model, tokens, pool=pool)
    print(f"{state.position} tokens are {state.nbytes / 1e3:.0f} kB of state")
    prefill(model, [*tokens, 10, 100], pool=pool)  # reads the two new tokens and at most one piece before them
    print(f"found in the pool: {pool.stats().hits} times")
