"""Every write to a registry that this project does not own happens in this package, and nowhere else."""

if __name__ != "torch_xlstm_ops.registrations":
    raise ImportError("registrations is part of torch_xlstm_ops: import torch_xlstm_ops instead")

from . import register as register
