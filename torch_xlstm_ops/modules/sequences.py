"""The inputs of a recurrent module: batches in either order, one sequence, and PackedSequence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence


class Sequences(NamedTuple):
    """Sequences as the operators take them: a batch, or one row of all their tokens and where each ends."""

    x: Tensor  # (B, S, H), or (1, tokens, H)
    ends: Tensor | None  # (sequences + 1,), on the CPU, from 0; None for a batch

    @property
    def rows(self) -> int:
        """Return the number of sequences."""
        return len(self.x) if self.ends is None else len(self.ends) - 1

    def reversed(self, x: Tensor) -> Tensor:
        """Return x, of the shape of `self.x`, with each sequence back to front."""
        if self.ends is None:
            return x.flip(1)
        starts, stops = self.ends[:-1], self.ends[1:]
        sizes = stops - starts
        at = torch.repeat_interleave(starts + stops - 1, sizes) - torch.arange(x.shape[1])
        return x[:, at.to(x.device)]


def enter(given: Tensor | PackedSequence, *, batch_first: bool, features: int) -> Sequences:
    """Return the sequences of an input: (S, B, H), with batch_first (B, S, H), one sequence (S, H), or packed."""
    x = given.data if isinstance(given, PackedSequence) else given
    if x.dim() not in ((2,) if x is not given else (2, 3)) or x.shape[-1] != features:
        layout = "(B, S, {0})" if batch_first else "(S, B, {0})"
        raise ValueError(f"input must be {layout.format(features)}, (S, {features}) or packed, got {tuple(x.shape)}")
    if isinstance(given, PackedSequence):
        padded, lengths = pad_packed_sequence(given, batch_first=True)
        real = torch.arange(padded.shape[1]) < lengths[:, None]
        ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        return Sequences(padded[real.to(padded.device)][None], ends)
    if x.dim() == 2:
        return Sequences(x[None], None)
    return Sequences(x if batch_first else x.transpose(0, 1), None)


def leave(y: Tensor, sequences: Sequences, given: Tensor | PackedSequence, *, batch_first: bool) -> (
    Tensor | PackedSequence
):
    """Return outputs y (B, S, F), or (1, tokens, F), in the layout of the input."""
    if not isinstance(given, PackedSequence) or sequences.ends is None:
        if given.dim() == 2:  # type: ignore[union-attr]
            return y[0]
        return y if batch_first else y.transpose(0, 1)
    lengths = sequences.ends.diff()
    padded = torch.nn.utils.rnn.pad_sequence(list(torch.split(y[0], lengths.tolist())), batch_first=True)
    if given.sorted_indices is not None:
        padded, lengths = padded[given.sorted_indices], lengths[given.sorted_indices.cpu()]
    data = pack_padded_sequence(padded, lengths, batch_first=True).data
    return PackedSequence(data, given.batch_sizes, given.sorted_indices, given.unsorted_indices)
