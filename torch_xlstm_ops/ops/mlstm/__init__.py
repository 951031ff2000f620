"""The mLSTM's operators."""

from torch_xlstm_ops.maths import aten
from torch_xlstm_ops.ops import flops
from torch_xlstm_ops.ops.mlstm import sequence, step
from torch_xlstm_ops.ops.operator import MASK, ROWS, Backward, InPlace, Operator, overload

CASTS = slice(0, 3)  # q, k, v: states and gates keep their precision
REFUSAL = ("mlstm_step_ is in place and not differentiable, but an input requires grad: use mlstm_step, "
           "mlstm_chunkwise, or torch.no_grad()")

OPERATORS = (
    Operator(
        "mlstm_step", step.run, step.fake, aten.mlstm_step, flops.mlstm_step,
        arguments=(ROWS,) * 8, results=(ROWS,) * 4, backward=Backward(sequence.save, step.gradients), casts=CASTS,
        decomposition=aten.mlstm_step,
    ),
    Operator(
        "mlstm_step_", step.run_, step.fake_, aten.mlstm_step_, flops.mlstm_step,
        arguments=(ROWS,) * 8, results=(ROWS,), casts=CASTS, in_place=InPlace("mlstm_step", step.STATE, REFUSAL),
    ),
    Operator(
        "mlstm_chunkwise", sequence.run, sequence.fake, aten.mlstm_chunkwise, flops.mlstm_chunkwise,
        arguments=(*[ROWS] * 8, MASK), results=(ROWS,) * 4,
        backward=Backward(sequence.save, lambda *tensors, **how: overload("mlstm_chunkwise_backward")(*tensors, **how)),
        casts=CASTS, decomposition=aten.mlstm_chunkwise,
    ),
    Operator(
        "mlstm_chunkwise_backward", sequence.run_backward, sequence.fake_backward, aten.mlstm_chunkwise_backward,
        flops.mlstm_chunkwise_backward, arguments=(*[ROWS] * 12, MASK), results=(ROWS,) * 8,
    ),
)
