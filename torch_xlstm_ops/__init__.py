"""xLSTM operators for PyTorch, compiled by Inductor."""

from torch_xlstm_ops import registrations as registrations
from torch_xlstm_ops.functional import mlstm_chunkwise, mlstm_step, mlstm_step_, slstm_sequence, slstm_step
from torch_xlstm_ops.shapes import MLSTMState, SLSTMState

__all__ = [
    "MLSTMState",
    "SLSTMState",
    "mlstm_chunkwise",
    "mlstm_step",
    "mlstm_step_",
    "slstm_sequence",
    "slstm_step",
]
