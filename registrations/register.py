"""Give each operator to the dispatcher, and to the parts of torch that ask for more than it knows."""

from __future__ import annotations

import functools
from pathlib import Path

from torch_xlstm_ops import config
from torch_xlstm_ops.config import user_cache
from torch_xlstm_ops.maths import mlstm
from torch_xlstm_ops.maths.shapes import EPS
from torch_xlstm_ops.ops.operator import overload
from torch_xlstm_ops.ops.table import OPERATORS
from torch_xlstm_ops.runtime import compiler, kernel_store
from torch_xlstm_ops.runtime.import_hook import when_imported

from . import autocast, decompositions, derivatives, devices, flop_counter, functionalization, sharding, vmap


def chosen_store() -> tuple[Path, bool] | None:
    """Return the folder of kept kernels that the configuration names, and whether the user named it."""
    setting = config.current().kernels
    folder = user_cache.kernels(setting)
    return None if folder is None else (folder, setting != "on")


for operator in OPERATORS.values():
    devices.register(operator)
    derivatives.register(operator)
    autocast.register(operator)
    vmap.register(operator)
    decompositions.register(operator)
    functionalization.register(operator)
compiler.INLINED[overload("mlstm_step")] = functools.partial(mlstm.step, eps=EPS)
kernel_store.follow(chosen_store)
# Each takes longer to import than all of this package.
when_imported("torch.utils.flop_counter", lambda: flop_counter.register(OPERATORS.values()))
when_imported("torch.distributed.tensor", lambda: sharding.register(OPERATORS.values()))
