"""Extended context: read prompts of any length, and keep, find and branch the states of a model.

An xLSTM's state has the same few megabytes after any number of tokens: `prefill` reads them in constant memory, and a
`Snapshot` is the whole state.
"""

from torch_xlstm_ops.context.batch import Batch
from torch_xlstm_ops.context.chat import ChatSession
from torch_xlstm_ops.context.codec import Storage
from torch_xlstm_ops.context.pool.pool import StatePool, Stats
from torch_xlstm_ops.context.prefill import Progress, StreamError, prefill
from torch_xlstm_ops.context.states import Snapshot, restore
from torch_xlstm_ops.context.tokens import text_tokens
from torch_xlstm_ops.models.identity import identity

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
