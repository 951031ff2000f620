"""The ways to run the same weights: a schedule, a dtype, patched or the package's own code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops import config, schedules
from torch_xlstm_ops.config import Schedule
from torch_xlstm_ops.models import transformers as adapter
from torch_xlstm_ops.patch import patch

THEIRS = "transformers"  # the contender that is not patched


class Contender(NamedTuple):
    """One way to run a model; no schedule means the package's own code."""

    name: str
    schedule: str | None = "inductor"
    dtype: str = "float32"

    @contextmanager
    def active(self) -> Iterator[None]:
        """Run the models of transformers in this way."""
        if self.schedule is None:
            yield
            return
        with patch("transformers"), config.use(schedule=self.schedule):
            yield


class Conditions(NamedTuple):
    """Settings of all parts: device, amount of work, schedules, and the function that shows progress."""

    device: torch.device
    schedules: Sequence[str]  # the first is the reference
    quick: bool = False
    say: Callable[[str], None] = print


def usable(device: torch.device) -> list[str]:
    """Return the schedules that can run here except `auto`, which chooses one of them; the reference is first."""
    names = [str(s) for s in Schedule if s is not Schedule.AUTO and schedules.unavailable(s, device) is None]
    return sorted(names, key=lambda name: name != "inductor")


def cut(length: int, sizes: Sequence[int]) -> list[int]:
    """Return pieces of the given sizes, repeated up to `length`."""
    pieces: list[int] = []
    while length > 0:
        pieces.append(min(length, sizes[len(pieces) % len(sizes)]))
        length -= pieces[-1]
    return pieces


def read(model: Any, ids: Tensor, pieces: Sequence[int], state: Any = None) -> Iterator[tuple[slice, Tensor, Any]]:
    """Yield each piece of ids (B, S) with its logits (B, piece, V) in float32 and the state after it."""
    start = 0
    for size in pieces:
        where = slice(start, start + size)
        logits, state = adapter.forward(model, ids[:, where], state)
        yield where, logits.float(), state
        start += size
