"""xLSTM operators for PyTorch, compiled by Inductor."""

import os

from torch_xlstm_ops import registrations as registrations
from torch_xlstm_ops.explain import explain
from torch_xlstm_ops.functional import mlstm_chunkwise, mlstm_step, mlstm_step_, slstm_sequence, slstm_step
from torch_xlstm_ops.shapes import MLSTMState, SLSTMState

__all__ = [
    "MLSTMState",
    "SLSTMState",
    "explain",
    "mlstm_chunkwise",
    "mlstm_step",
    "mlstm_step_",
    "slstm_sequence",
    "slstm_step",
]

if os.environ.get("XLSTM_OPS_PATCH"):
    from torch_xlstm_ops.patch.on_import import patch_from_environment

    patch_from_environment()
