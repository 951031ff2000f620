"""xLSTM operators for PyTorch, compiled by Inductor."""

from os import environ

from torch_xlstm_ops import checkout as checkout
from torch_xlstm_ops import registrations as registrations
from torch_xlstm_ops.api import (
    mlstm_chunkwise,
    mlstm_sigmoid_chunkwise,
    mlstm_sigmoid_step,
    mlstm_step,
    mlstm_step_,
    slstm_sequence,
    slstm_step,
)
from torch_xlstm_ops.explain import explain
from torch_xlstm_ops.maths.shapes import MLSTMState, SLSTMState
from torch_xlstm_ops.maths.sigmoid_gate import SigmoidState

__version__ = "0.1.0"

__all__ = [
    "MLSTMState",
    "SLSTMState",
    "SigmoidState",
    "__version__",
    "explain",
    "mlstm_chunkwise",
    "mlstm_sigmoid_chunkwise",
    "mlstm_sigmoid_step",
    "mlstm_step",
    "mlstm_step_",
    "slstm_sequence",
    "slstm_step",
]

if environ.get("XLSTM_OPS_PATCH"):
    from torch_xlstm_ops.patch import on_import

    on_import.patch_from_environment()
    del on_import
del environ
