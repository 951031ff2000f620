"""How the tokens of a call become windows in chunks, and results tensors of their own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_xlstm_ops.ops.operator import without_view
from torch_xlstm_ops.schedules.slstm import parallel as schedule

CHUNK = 8  # tokens of a chunk


def chunks(t: Tensor, window: schedule.Window) -> Tensor:
    """Return a window (B, T, ...) in chunks (B, NC, L, ...), the last ones padded by zeros."""
    beyond = window.chunks * CHUNK - window.length
    padded = F.pad(t, (*(0, 0) * (t.dim() - 2), 0, beyond)) if beyond else t
    return torch.unflatten(padded, 1, (window.chunks, CHUNK))


def tokens(t: Tensor, window: schedule.Window) -> Tensor:
    """Return a window in chunks (B, NC, L, ...) as (B, T, ...), contiguous."""
    return t.flatten(1, 2)[:, : window.length].contiguous()


def at(t: Tensor, window: schedule.Window) -> Tensor:
    """Return a window's part of a tensor (B, S, ...)."""
    return t if window.length == t.shape[1] else t[:, window.at]


def gates_first(dgates: Tensor) -> Tensor:
    """Return dgates (B, T, NH, 4, DH) as (B, T, 4, NH, DH), contiguous; CUDA copies 8 bytes faster than 2."""
    unit = torch.int64 if dgates.shape[-1] * dgates.element_size() % 8 == 0 else dgates.dtype
    return dgates.view(unit).transpose(2, 3).contiguous().view(dgates.dtype)


def apart(t: Tensor) -> Tensor:
    """Return a tensor with memory of its own that autograd does not take for a view."""
    return without_view(t) if t.untyped_storage().nbytes() == t.nbytes else t.clone()


def part(reset: Tensor | None, window: schedule.Window) -> Tensor | None:
    return None if reset is None else reset[:, window.at]


def with_last(dh: Tensor, dy: Tensor) -> Tensor:
    """Return dh (B, T, NH, DH), wide, with dy added to its last token's."""
    summed = dh.to(dy.dtype, copy=True)
    summed[:, -1] += dy
    return summed
