"""Drop-in for tirex-ts: the sLSTM cell, on either of its backends.

The package computes in bfloat16 and rounds its states to bfloat16 at every token; ours takes the same inputs and keeps
the states in float32. The package also clamps the forget gate at 15, which changes log f by less than 4e-7. With
``compat`` nothing is replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_xlstm_ops.patch.adapters import slstm
from torch_xlstm_ops.patch.replacements import Replacement
from torch_xlstm_ops.patch.upstream.xlstm import cuda_weights


def replacements(compat: bool) -> Sequence[Replacement]:
    """Return the replacements."""
    from tirex.models.slstm.cell import sLSTMCell

    if compat:
        return []
    effect = "an sLSTM sequence is one op call"
    parameters = ("self", "input", "state")
    return [Replacement(sLSTMCell, name, lambda original: _run, effect, parameters)
            for name in ("_impl_torch", "_impl_cuda")]


def _run(self: Any, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Replace `sLSTMCell._impl_torch`: input (S, B, 4, NH, DH), state (4, B, H); return (S, B, H) and a state."""
    NH = self.config.num_heads
    x = input.transpose(0, 1).to(torch.bfloat16)
    b = torch.unflatten(self._bias_, 0, (NH, 4, -1)).transpose(0, 1)
    h, after = slstm(x, cuda_weights(self._recurrent_kernel_), b, torch.unflatten(state, -1, (NH, -1)).unbind(0))
    return h.transpose(0, 1).flatten(2), torch.stack(after).flatten(2)
