"""Modules of torch.nn's shape on the operators."""

from torch_xlstm_ops.modules.recurrent import xLSTM

__all__ = ["xLSTM"]
