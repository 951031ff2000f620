"""One implementation for every device, and the fake that checks arguments and allocates results."""

from __future__ import annotations

import functools
from typing import Any

import torch

from torch_xlstm_ops.ops.mlstm.step import run_by_copy
from torch_xlstm_ops.ops.operator import Operator
from torch_xlstm_ops.runtime import torch_internals

from .schemas import LIBRARY

DEVICES = ("CPU", "CUDA", "MPS")


def register(operator: Operator) -> None:
    """Give an operator its kernels."""
    for device in DEVICES:
        LIBRARY.impl(operator.name, operator.run, device)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"xlstm::{operator.name}", kept_whole(operator), lib=LIBRARY)
    if operator.in_place is not None:
        LIBRARY.impl(operator.name, run_by_copy, "Negative")  # type: ignore[no-untyped-call]


@functools.cache
def kept_whole(operator: Operator) -> Any:
    """Return an operator's fake, which also has Inductor keep the operator as one call: fakes run before it lowers."""
    @functools.wraps(operator.fake)
    def fake(*args: Any, **kwargs: Any) -> Any:
        torch_internals.keep_as_call(operator.overload)
        return operator.fake(*args, **kwargs)

    return fake
