"""The streams of a call as the chunks of a task, by one compiled call in place of a fill and a copy for each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_xlstm_ops.maths.mlstm import chunked, in_chunks
from torch_xlstm_ops.runtime import compiler
from torch_xlstm_ops.runtime.uncompiled import Uncompiled

DEVICES = ("mps",)  # elsewhere nobody has measured it


def lay_out(streams: Sequence[Tensor], NC: int, L: int) -> list[Tensor] | None:
    """Return q, k, v, igate, fgate (B, NH, S, ...) as NC chunks of L tokens, padded: (B*NH, NC, L, ...).

    None where views will do, where a stream is contiguous neither as it is nor with the tokens before the heads, and on
    other devices.
    """
    if streams[0].device.type not in DEVICES or streams[0].shape[2] < 2:
        return None
    tokens_first = tuple(not t.is_contiguous() for t in streams)
    if not any(tokens_first) and streams[0].shape[2] == NC * L:  # views will do
        return None
    bases = [t.transpose(1, 2) if first else t for t, first in zip(streams, tokens_first, strict=True)]
    if not all(t.is_contiguous() for t in bases):
        return None
    axes = [("G S N D" if first else "G N S D")[:2 * t.dim() - 1] for t, first in zip(bases, tokens_first, strict=True)]
    args = [torch.empty(NC, L, dtype=torch.uint8, device=bases[0].device), *bases]
    run = compiler.get(chunked, ["NC L", *axes], args, join_in_place=True, tokens_first=tokens_first)
    return None if isinstance(run, Uncompiled) else in_chunks(run(args), streams, NC, L)
