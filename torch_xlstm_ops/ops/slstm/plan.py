"""The plan of an sLSTM parallel in time: what calls with the same shapes have in common."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops.kernels.slstm_parallel import Kernels
from torch_xlstm_ops.maths.slstm.parallel import window as codes
from torch_xlstm_ops.ops.slstm import layout
from torch_xlstm_ops.schedules.slstm import parallel as schedule
from torch_xlstm_ops.schedules.slstm import rounds


class Plan(NamedTuple):
    """What calls have in common whose arguments have the same shapes."""

    kernels: Kernels
    limits: rounds.Limits
    tolerance: float
    order: list[schedule.Window]
    masked: bool  # whether windows have masks: there are resets, or the last window is padded
    kind: Hashable  # windows of a kind need the same number of rounds

    def masks(self, x: Tensor, reset: Tensor | None, window: schedule.Window) -> tuple[Tensor, ...]:
        """Return the masks (B, NC, L) of a window's tokens and of those after each, or none."""
        if not self.masked:
            return ()
        mask = x.new_full((x.shape[0], window.chunks * layout.CHUNK + 1), codes.PAD, dtype=torch.uint8)
        mask[:, : window.length] = codes.TOKEN if reset is None else reset[:, window.at].to(torch.uint8)
        mask[:, -1] = codes.TOKEN
        return tuple(torch.unflatten(part, 1, (window.chunks, layout.CHUNK)) for part in (mask[:, :-1], mask[:, 1:]))
