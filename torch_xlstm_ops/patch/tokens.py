"""What the arguments of a model call say about its tokens: which are padding, and where a row starts afresh.

A padding token leaves the state as it is: its input gate is -inf and its forget gate +inf. `Marked` brings that to the
operators: it takes the place of m among the states that a block gets, so that it goes where the states go, through
gradient checkpointing too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops.maths.nonfinite import identity_where

CUMULATIVE = ("cu_seqlens", "cu_seq_lens_q")
ARGUMENTS = ("attention_mask", "position_ids", "seq_idx", *CUMULATIVE)  # of a model's forward


class Tokens(NamedTuple):
    """The tokens of a call."""

    read: Tensor | None  # (B, S) bool, false for padding; None: all are read
    reset: Tensor | None  # (B, S) bool, true where a row starts afresh; None: nowhere

    def part(self, start: int, stop: int) -> Tokens:
        """Return what holds for the tokens from start to stop."""
        return Tokens(*(None if t is None else t[:, start:stop] for t in self))

    def on(self, device: torch.device) -> Tokens:
        """Return the same on a device."""
        return Tokens(*(None if t is None else t.to(device) for t in self))

    def gates(self, igate: Tensor, fgate: Tensor) -> tuple[Tensor, Tensor]:
        """Return gates (B, NH, S) with which padding changes nothing."""
        if self.read is None:
            return igate, fgate
        return identity_where(~self.read[:, None], igate, fgate)


class Marked(NamedTuple):
    """A state m with the tokens of the call."""

    m: Tensor | None
    tokens: Tokens


def unmarked(m: Tensor | Marked | None, device: torch.device) -> tuple[Tensor | None, Tokens]:
    """Return m and the tokens that it is marked with, these on a device."""
    return (m.m, m.tokens.on(device)) if isinstance(m, Marked) else (m, Tokens(None, None))


def of_call(arguments: Mapping[str, Any], B: int, S: int) -> Tokens | None:
    """Return what the arguments of a call of S tokens say; None if every token is read and none starts afresh.

    Raises ValueError for shapes that do not fit, and for a mask that hides what a recurrence cannot leave out.
    """
    mask = arguments.get("attention_mask")
    read, resets = None, []
    if mask is not None:
        read, starts = _of_square_mask(mask, B, S) if mask.dim() == 4 else _of_mask(mask, B, S)
        resets.append(starts)
    resets += [_starts(arguments[name], name, B, S, read, rule) for name, rule in _RULES.items()
               if arguments.get(name) is not None]
    resets += [_cumulative(arguments[name], name, B, S) for name in CUMULATIVE if arguments.get(name) is not None][:1]
    found = [reset for reset in resets if reset is not None]
    reset = torch.stack(found).any(0) if found else None
    if not torch.compiler.is_compiling():  # a look at the device spares what follows
        read = None if read is None or bool(read.all()) else read
        reset = reset if reset is not None and bool(reset.any()) else None
    return None if read is None and reset is None else Tokens(read, reset)


def _of_mask(mask: Tensor, B: int, S: int) -> tuple[Tensor, Tensor | None]:
    """Return the read tokens, and where documents start, of a mask (B, at least S), whose last S columns count.

    Integers above 1 number the documents.
    """
    if mask.dim() != 2 or mask.shape[0] != B or mask.shape[1] < S:
        raise ValueError(f"attention_mask must be (B, at least S) = ({B}, {S}), or (B, 1, S, S), "
                         f"got {tuple(mask.shape)}")
    mask = mask[:, mask.shape[1] - S :]
    read = mask != 0
    if mask.dtype == torch.bool or mask.dtype.is_floating_point or S == 0:
        return read, None
    if not torch.compiler.is_compiling() and int(mask.max()) <= 1:
        return read, None
    return read, _starts(mask, "attention_mask", B, S, read, _differs)


def _of_square_mask(mask: Tensor, B: int, S: int) -> tuple[Tensor, Tensor]:
    """Return the read tokens, and where documents start, of a mask (B, 1, S, at least S) that is causal in documents.

    It is bool, true for what a token sees, or has 0 there and large negative numbers elsewhere.
    """
    if mask.shape[0] not in (1, B) or mask.shape[2] != S or mask.shape[3] < S:
        raise ValueError(f"attention_mask must be (B, 1, S, at least S) = ({B}, 1, {S}, {S}), got {tuple(mask.shape)}")
    sees = (mask if mask.dtype == torch.bool else mask == 0).all(1).expand(B, -1, -1)  # (B, S, past + S)
    past = mask.shape[3] - S
    at = torch.arange(S, device=mask.device)
    new = sees[:, :, past:]
    read = new.diagonal(dim1=1, dim2=2)
    first = sees.int().argmax(-1) - past  # the first token that each sees, below 0 for one of an earlier call
    wanted = read[:, None] & (at >= first[:, :, None]) & (at <= at[:, None])
    if not torch.compiler.is_compiling() and not bool(((wanted == new) | ~read[:, :, None]).all()):
        raise ValueError("attention_mask (B, 1, S, S) must be causal within each document and hide all between them, "
                         "as a recurrence reads: got another pattern")
    return read, read & (first == at) & ((at > 0) | (past > 0))


Rule = Callable[[Tensor, Tensor], Tensor]


def _restarts(value: Tensor, before: Tensor) -> Tensor:
    return value <= before


def _differs(value: Tensor, before: Tensor) -> Tensor:
    return value != before


_RULES: dict[str, Rule] = {"position_ids": _restarts, "seq_idx": _differs}  # whether a token starts afresh


def _starts(values: Tensor, name: str, B: int, S: int, read: Tensor | None, rule: Rule) -> Tensor | None:
    """Return where a row starts afresh, by a rule on the value of each read token and of the one read before it.

    At the first read token of a row only position 0 does, which matters if the call goes on from a state.
    """
    if values.dim() == 1:
        values = values[None]
    if values.dim() != 2 or values.shape[0] not in (1, B) or values.shape[1] < S:
        raise ValueError(f"{name} must be (B, S) = ({B}, {S}), got {tuple(values.shape)}")
    values = values[:, values.shape[1] - S :].expand(B, S)
    if S == 0:
        return None
    read = torch.ones_like(values, dtype=torch.bool) if read is None else read.to(values.device)
    at = torch.arange(S, device=values.device).expand(B, S)
    latest = torch.where(read, at, -1).cummax(1).values  # the latest read token, this one included
    before = torch.cat([latest.new_full((B, 1), -1), latest[:, :-1]], 1)
    first = values == 0 if rule is _restarts else torch.zeros_like(read)
    return read & torch.where(before < 0, first, rule(values, values.gather(1, before.clamp(min=0))))


def _cumulative(ends: Tensor, name: str, B: int, S: int) -> Tensor:
    """Return where documents start, from the cumulative lengths (documents + 1) of the only row."""
    if B != 1 or ends.dim() != 1:
        raise ValueError(f"{name} must be (documents + 1,) and the batch one row, got {tuple(ends.shape)}, {B} rows")
    marked = torch.zeros(1, S + 1, dtype=torch.bool, device=ends.device)
    marked[0, ends.long().clamp(max=S)] = True
    return torch.cat([torch.zeros_like(marked[:, :1]), marked[:, 1:S]], 1)
