"""Hold a conversation in which no turn is read twice."""
from transformers import AutoModelForCausalLM, AutoTokenizer

from torch_xlstm_ops.context import ChatSession, StatePool
from torch_xlstm_ops.models import DEMO_MODEL
from torch_xlstm_ops.patch import patch

with patch("transformers"):
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    chat = ChatSession(StatePool(model, host_bytes=1 << 28), tokenizer)
    for turn in ("import os\n", "def main():\n"):
        print(turn + chat.say(turn, max_new_tokens=24))
