"""xLSTM operators for PyTorch, compiled by Inductor."""

__version__ = "0.1.0"

from torch_xlstm_ops import checkout

checkout.load_registrations()

from torch_xlstm_ops import registrations as registrations  # noqa: E402
from torch_xlstm_ops.explain import explain  # noqa: E402
from torch_xlstm_ops.functional import (  # noqa: E402
    mlstm_chunkwise,
    mlstm_step,
    mlstm_step_,
    slstm_sequence,
    slstm_step,
)
from torch_xlstm_ops.patch.on_import import patch_from_environment  # noqa: E402
from torch_xlstm_ops.shapes import MLSTMState, SLSTMState  # noqa: E402

__all__ = [
    "MLSTMState",
    "SLSTMState",
    "__version__",
    "explain",
    "mlstm_chunkwise",
    "mlstm_step",
    "mlstm_step_",
    "slstm_sequence",
    "slstm_step",
]

patch_from_environment()
del patch_from_environment
