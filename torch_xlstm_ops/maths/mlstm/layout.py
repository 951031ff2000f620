"""The streams of a call as the chunks of a task."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torch_xlstm_ops.maths.nonfinite import IDENTITY_FGATE, IDENTITY_IGATE

# What a padding token holds, in the order q k v igate fgate: the monoid's identity.
PADDING = (0.0, 0.0, 0.0, IDENTITY_IGATE, IDENTITY_FGATE)


def chunked(like: Tensor, *streams: Tensor, tokens_first: tuple[bool, ...]) -> tuple[Tensor, ...]:
    """Return q, k, v, igate, fgate, each (B*NH, NC, L, ...), padded, as blocks of memory for `in_chunks`.

    like: (NC, L), not read. streams: (B, NH, S, ...), or (B, S, NH, ...) where `tokens_first` says so.
    """
    token = torch.arange(like.numel(), device=like.device)
    found = []
    for t, first, value in zip(streams, tokens_first, PADDING, strict=True):
        t = t.transpose(1, 2) if first else t
        S = t.shape[2]
        padding = (token >= S).view(-1, *[1] * (t.dim() - 3))
        # An index, as padding has no meta function of symbolic sizes.
        found.append(torch.where(padding, value, t[:, :, token.clamp(max=S - 1)]).flatten())
    return tuple(torch.cat([found[index] for index in block]) for block in blocks(streams))


def blocks(streams: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """Return which streams share a block of memory: v, which outlives the others, has its own."""
    q, _, _, igate, fgate = streams
    if q.dtype == igate.dtype == fgate.dtype:
        return [(0, 1, 3, 4), (2,)]
    return [(0, 1), (2,), (3, 4)] if igate.dtype == fgate.dtype else [(0, 1), (2,), (3,), (4,)]


def in_chunks(found: Sequence[Tensor], streams: Sequence[Tensor], NC: int, L: int) -> list[Tensor]:
    """Return the streams (B*NH, NC, L, ...) as views of the blocks of `chunked`; streams: (B, NH, S, ...)."""
    views: dict[int, Tensor] = {}
    for memory, indices in zip(found, blocks(streams), strict=True):
        shapes = {i: (streams[i].shape[0] * streams[i].shape[1], NC, L, *streams[i].shape[3:]) for i in indices}
        parts = torch.split(memory, [math.prod(shape) for shape in shapes.values()])
        views |= {i: part.view(shape) for part, (i, shape) in zip(parts, shapes.items(), strict=True)}
    return [views[i] for i in range(len(streams))]
