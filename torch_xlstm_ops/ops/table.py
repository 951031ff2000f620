"""All operators by name."""

from torch_xlstm_ops.ops import mlstm, slstm
from torch_xlstm_ops.ops.operator import Operator

OPERATORS: dict[str, Operator] = {operator.name: operator for operator in (*mlstm.OPERATORS, *slstm.OPERATORS)}
