"""Decompositions into ATen calls, for exporters that know ATen alone, such as `torch.onnx.export`.

Nothing else uses them: `torch.export`, Inductor and fake tensors keep each operator as one call. The mLSTM's have no
loop over tokens, so a symbolic S stays symbolic. The sLSTM's sequence has one, so its S must be known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_xlstm_ops.maths import aten
from torch_xlstm_ops.runtime import torch_internals

from .dispatch import FAKES, overload


def _slstm_sequence(x: Tensor, *args: Any, **how: Any) -> aten.Results:
    if not isinstance(x.shape[1], int):
        raise NotImplementedError(f"x must have a known S to decompose slstm_sequence, a loop over its tokens, "
                                  f"got S = {x.shape[1]}")
    return aten.slstm_sequence(x, *args, **how)


TABLE: dict[Any, Callable[..., Any]] = {
    overload("mlstm_step"): aten.mlstm_step,
    overload("mlstm_chunkwise"): aten.mlstm_chunkwise,
    overload("slstm_step"): aten.slstm_step,
    overload("slstm_sequence"): _slstm_sequence,
}


def table() -> dict[Any, Callable[..., Any]]:
    """Return torch's default decompositions and ours, for `ExportedProgram.run_decompositions`."""
    found = torch.export.default_decompositions()
    for op, function in TABLE.items():
        found[op] = function
    return found


def register() -> None:
    """Register our decompositions for every exporter that reads torch's table, as `torch.onnx.export` does."""
    for op, function in TABLE.items():
        torch_internals.register_decomposition(op, function, FAKES[op.name().partition("::")[2]])


register()
