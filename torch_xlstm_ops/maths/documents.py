"""Packed documents with a state each: lay documents of one row out as rows of a batch, run that, and pack again.

An mLSTM's documents are padded with tokens that change nothing, in groups of similar length, one call each. An sLSTM
has no such token, as its y changes with every one: its documents run together up to the end of the shortest, and so on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torch_xlstm_ops.maths.nonfinite import identity_where

Results = tuple[Tensor, Sequence[Tensor]]  # h, and the state
Run = Callable[..., Results]


def lengths(cu_seqlens: Tensor, B: int, S: int) -> list[int]:
    """Return the length of each document of one row. Synchronises with the device of cu_seqlens.

    cu_seqlens: (documents + 1,), the end of each document behind a 0.
    Raises ValueError if it does not divide S tokens of one row, TypeError if it is no tensor of integers.
    """
    if cu_seqlens.dtype.is_floating_point or cu_seqlens.dtype.is_complex or cu_seqlens.dtype == torch.bool:
        raise TypeError(f"cu_seqlens must be integers, got {cu_seqlens.dtype}")
    if B != 1 or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError("cu_seqlens must be (documents + 1,), for at least one document, and the batch one row, "
                         f"got {tuple(cu_seqlens.shape)}, {B} rows")
    ends = cu_seqlens.tolist()
    found = [b - a for a, b in itertools.pairwise(ends)]
    if ends[0] != 0 or ends[-1] != S or any(length < 0 for length in found):
        raise ValueError(f"cu_seqlens must rise from 0 to S = {S}, got {ends if len(ends) < 9 else [*ends[:8], '...']}")
    return found


def mlstm(run: Run, counts: Sequence[int], streams: Sequence[Tensor], state: Sequence[Tensor | None]) -> Results:
    """Run an mLSTM on documents of counts tokens; streams q k v igate fgate (1, NH, S, ...), a state (documents, ...).

    run: the mLSTM of a batch, from streams and a state to h and a state.
    """
    starts = _starts(counts)
    groups: dict[int, list[int]] = {}
    for document, count in enumerate(counts):
        groups.setdefault(count.bit_length(), []).append(document)
    device = streams[0].device
    found_h, found_state, order = [], [], []
    for documents in groups.values():
        longest = max(counts[d] for d in documents)
        at = torch.tensor([starts[d] for d in documents], device=device)[:, None] + torch.arange(longest, device=device)
        size = torch.tensor([counts[d] for d in documents], device=device)
        real = torch.arange(longest, device=device) < size[:, None]  # (documents, longest)
        q, k, v, igate, fgate = (_rows(t, at) for t in streams)
        igate, fgate = identity_where(~real[:, None], igate, fgate)
        index = torch.tensor(documents, device=device)
        h, after = run(q, k, v, igate, fgate, *(None if t is None else t[index] for t in state))
        found_h.append(h.transpose(1, 2)[real])  # (tokens, NH, DHHV)
        order.append(at[real])
        found_state.append((index, after))
    place = torch.cat(order).argsort()
    h = torch.cat(found_h)[place].transpose(0, 1)[None]
    back = torch.cat([index for index, _ in found_state]).argsort()
    return h, tuple(torch.cat(parts)[back] for parts in zip(*(after for _, after in found_state), strict=True))


def slstm(run: Run, counts: Sequence[int], x: Tensor, state: Sequence[Tensor]) -> Results:
    """Run an sLSTM on documents of counts tokens; x (1, S, 4, NH, DH), a state (documents, NH, DH).

    run: the sLSTM of a batch, from x and a state to h and a state.
    """
    starts = _starts(counts)
    order = sorted(range(len(counts)), key=lambda d: -counts[d])  # the longest first
    alive: Sequence[Tensor] = [t[torch.tensor(order, device=x.device)] for t in state]
    ended: list[Sequence[Tensor]] = []
    found_h, places, before = [], [], 0
    for count in sorted(set(counts)):
        here = [d for d in order if counts[d] >= count]
        if count > before:
            steps = torch.arange(before, count, device=x.device)
            at = torch.tensor([starts[d] for d in here], device=x.device)[:, None] + steps
            h, alive = run(x[0, at], *alive)
            found_h.append(h.flatten(0, 1))
            places.append(at.flatten())
        left = sum(counts[d] > count for d in here)
        ended.insert(0, [t[left:] for t in alive])
        alive, before = [t[:left] for t in alive], count
    if not found_h:
        return x.new_empty((1, 0, *x.shape[3:])), tuple(t.clone() for t in state)
    h = torch.cat(found_h)[torch.cat(places).argsort()][None]
    back = torch.tensor(order, device=x.device).argsort()
    return h, tuple(torch.cat(parts)[back] for parts in zip(*ended, strict=True))


def check_states(documents: int, **state: Tensor | None) -> None:
    """Raise ValueError unless each given state has a row for each document."""
    for name, t in state.items():
        if t is not None and (not t.dim() or len(t) != documents):
            raise ValueError(f"{name} must have a row for each of {documents} documents, got {tuple(t.shape)}")


def _starts(counts: Sequence[int]) -> list[int]:
    found = [0]
    for count in counts:
        found.append(found[-1] + count)
    return found


def _rows(t: Tensor, at: Tensor) -> Tensor:
    """Return tokens (documents, NH, longest, ...) of t (1, NH, S, ...); those beyond its end are its last."""
    return t[0][:, at.clamp(max=max(t.shape[2] - 1, 0))].transpose(0, 1) if t.shape[2] else t[0][:, at].transpose(0, 1)
