"""xLSTM operators for PyTorch, compiled by Inductor."""

from torch_xlstm_ops.functional import mlstm_chunkwise, mlstm_step, mlstm_step_
from torch_xlstm_ops.shapes import MLSTMState, SLSTMState

from torch_xlstm_ops import registrations as registrations  # noqa: I001 - last: it uses everything above

__all__ = ["MLSTMState", "SLSTMState", "mlstm_chunkwise", "mlstm_step", "mlstm_step_"]
