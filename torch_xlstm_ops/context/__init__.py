"""Extended context: prompts of any length, and a model's past kept, found again and branched.

An xLSTM's past is a few megabytes whatever its length: `prefill` reads it in constant memory, and a `Snapshot` is all
of it.
"""

from torch_xlstm_ops.context.batch import Batch
from torch_xlstm_ops.context.chat import ChatSession
from torch_xlstm_ops.context.codec import Storage
from torch_xlstm_ops.context.pool.pool import StatePool, Stats
from torch_xlstm_ops.context.prefill import Progress, StreamError, prefill
from torch_xlstm_ops.context.states import Snapshot, identity, restore
from torch_xlstm_ops.context.tokens import text_tokens

__all__ = [
    "Batch",
    "ChatSession",
    "Progress",
    "Snapshot",
    "StatePool",
    "Stats",
    "Storage",
    "StreamError",
    "identity",
    "prefill",
    "restore",
    "text_tokens",
]
