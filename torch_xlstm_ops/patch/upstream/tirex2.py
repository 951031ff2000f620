"""Drop-in for tirex-2: its sLSTM layers, and its mLSTM layers through mlstm_kernels.

The layers call flashrnn and use only y, so the replacement returns only y, and flashrnn is not patched. In forks where
the layer has no method for the call, flashrnn is patched instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_xlstm_ops.patch.adapters import slstm
from torch_xlstm_ops.patch.replacements import Replacement
from torch_xlstm_ops.patch.upstream import flashrnn, mlstm_kernels


def replacements(compat: bool) -> Sequence[Replacement]:
    """Return the replacements."""
    from tirex2.model.component.flashrnn_slstm import _FlashRNNLayer

    if not hasattr(_FlashRNNLayer, "recurrence"):
        return [*flashrnn.replacements(compat), *mlstm_kernels.replacements(compat)]
    effect = "an sLSTM sequence is one op call"
    layer = Replacement(_FlashRNNLayer, "recurrence", lambda original: _recurrence, effect, ("self", "Wx", "states"))
    return [*([] if compat else [layer]), *mlstm_kernels.replacements(compat)]


def _recurrence(self: Any, Wx: Tensor, states: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Replace `recurrence`: Wx (B, T, 4, NH, DH), states (4, B, 1, NH, DH); return y (1, B, T, NH, DH), a state.
    """
    x = flashrnn.stream(self.config, Wx)
    r = self.get_R().permute(2, 0, 3, 1)  # from (NH, DH_in, 4, DH_out)
    before = None if states is None else states[:, :, 0].unbind(0)
    h, after = slstm(x, r, self.get_bias().transpose(0, 1), before, floor=flashrnn.FLOOR)
    return h[None], torch.stack(after)[:, :, None]
