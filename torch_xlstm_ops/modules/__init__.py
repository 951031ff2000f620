"""Modules of torch.nn's shape on the operators."""

from torch_xlstm_ops.modules.recurrent import xLSTM
from torch_xlstm_ops.modules.stacks import xLSTMStack

__all__ = ["xLSTM", "xLSTMStack"]
