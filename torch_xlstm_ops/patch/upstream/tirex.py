"""Drop-in for tirex-ts: the sLSTM cell, on either of its backends.

The peer computes in bfloat16 and rounds its states to it at every token; ours takes the same bfloat16 inputs and keeps
the states in float32. It also clamps the forget gate at 15, which changes log f by less than 4e-7. With ``compat`` the
package is left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_xlstm_ops.patch.kernels import slstm
from torch_xlstm_ops.patch.replacements import Change
from torch_xlstm_ops.patch.upstream.xlstm import cuda_weights


def changes(compat: bool) -> Sequence[Change]:
    """Return what to replace."""
    from tirex.models.slstm.cell import sLSTMCell

    if compat:
        return []
    effect = "an sLSTM sequence is one op call"
    parameters = ("self", "input", "state")
    return [Change(sLSTMCell, name, lambda theirs: _run, effect, parameters) for name in ("_impl_torch", "_impl_cuda")]


def _run(self: Any, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Stand in for `sLSTMCell._impl_torch`: input (S, B, 4, NH, DH), state (4, B, H); return (S, B, H) and a state."""
    NH = self.config.num_heads
    x = input.transpose(0, 1).to(torch.bfloat16)
    b = torch.unflatten(self._bias_, 0, (NH, 4, -1)).transpose(0, 1)
    h, after = slstm(x, cuda_weights(self._recurrent_kernel_), b, torch.unflatten(state, -1, (NH, -1)).unbind(0))
    return h.transpose(0, 1).flatten(2), torch.stack(after).flatten(2)
