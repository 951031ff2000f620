"""Decompositions into ATen calls, for exporters that know ATen alone, such as `torch.onnx.export`.

Nothing else uses them: `torch.export`, Inductor and fake tensors keep each operator as one call. The mLSTM's have no
loop over tokens, so a symbolic S stays symbolic. The sLSTM's sequence has one, so its S must be known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from torch_xlstm_ops.ops.operator import Operator
from torch_xlstm_ops.ops.table import OPERATORS
from torch_xlstm_ops.runtime import torch_internals

from .devices import kept_whole


def register(operator: Operator) -> None:
    """Register an operator's decomposition for every exporter that reads torch's table, as `torch.onnx.export` does."""
    if operator.decomposition is not None:
        torch_internals.register_decomposition(operator.overload, operator.decomposition, kept_whole(operator))


def table() -> dict[Any, Callable[..., Any]]:
    """Return torch's default decompositions and ours, for `ExportedProgram.run_decompositions`."""
    found = torch.export.default_decompositions()
    for operator in OPERATORS.values():
        if operator.decomposition is not None:
            found[operator.overload] = operator.decomposition
    return found
