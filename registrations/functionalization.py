"""Export of operators that write to their arguments: the functional operator, and copies of its results.

`torch.compile` keeps torch's own way, by which Inductor writes in place. An exporter that knows ATen alone cannot
express that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from torch_xlstm_ops.ops.operator import Operator, copy_to_state
from torch_xlstm_ops.runtime import torch_internals

from .schemas import LIBRARY


def register(operator: Operator) -> None:
    """Give an operator that writes its rule for functional tensors."""
    in_place = operator.in_place
    if in_place is None:
        return
    mode_type = torch_internals.functional_mode()
    if mode_type is None:
        return

    def rule(mode: Any, op: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if not torch.compiler.is_exporting():
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode:
            return copy_to_state(in_place.functional, args, kwargs or {}, in_place.written)

    torch.library.register_torch_dispatch(f"xlstm::{operator.name}", mode_type, rule, lib=LIBRARY)
