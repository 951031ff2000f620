"""How many tokens a model reads at once: from the free memory of its device, and less when that was too much."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from torch_xlstm_ops import config
from torch_xlstm_ops.runtime import devices

# Tokens a piece, unless a segment is longer: progress is seen on a CPU, and a GPU has enough to do.
PIECES = {"cpu": 2048, "cuda": 8192, "mps": 4096}
LEAST = 16  # a piece as small as this that does not fit means that the model itself does not
SHARE = 0.5  # of the free memory, for what a piece holds
_NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")


def usual(device: torch.device) -> int:
    """Return the tokens of a piece where memory is no concern: whole segments, so that the carry is the schedule's."""
    most = PIECES[device.type]
    segment = config.current().segment or most
    return segment * max(1, most // segment)


def bytes_per_token(model: Any) -> int:
    """Return about what a model holds for each token of a piece: one layer's streams and projections."""
    settings = model.config
    hidden: int = settings.hidden_size
    widest: float = 2 * settings.qk_dim_factor + 4 * settings.v_dim_factor + 3 * settings.ffn_proj_factor
    return round(4 * hidden * (4 + widest))  # states and norms are float32 whatever the weights are


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a device or the host had no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _NO_MEMORY)


class Allocation:
    """The tokens of the next piece, `size`: what was asked for, or a half, a quarter, ... of it where memory is short.

    segment: tokens a piece; default what suits the device.
    fixed: whether they are kept unless memory runs out; otherwise the free memory decides, before every piece.
    """

    def __init__(self, model: Any, device: torch.device, segment: int | None = None, *, fixed: bool = False) -> None:
        if segment is not None and segment < 1:
            raise ValueError(f"segment must be a whole number of at least 1, got {segment}")
        self._device, self._fixed = device, fixed
        self._each = bytes_per_token(model)
        self.size = self._ceiling = segment or usual(device)
        self.size = self._fitting()

    def adapt(self) -> None:
        """Look at the free memory again, where the user left the size open."""
        size = self._fitting()
        if size != self.size:
            _say(f"{size} tokens at once instead of {self.size}: the memory of {self._device} changed")
            self.size = size

    def shrink(self, error: BaseException) -> None:
        """Go one size down after `error`; raises it where there is none."""
        if self.size <= LEAST:
            raise error
        self.size //= 2
        self._ceiling = self.size
        _say(f"{self.size} tokens at once from here on: {self._device} had no memory for {2 * self.size}")

    def _fitting(self) -> int:
        """Return the largest size that fits; the present one stays until the next one up fits twice over."""
        if self._fixed:
            return self.size
        free = _free(self._device)
        if free is None:
            return self.size
        size = self._ceiling
        while size > LEAST and size * self._each * (2 if size > self.size else 1) > SHARE * free:
            size //= 2
        return size


def _free(device: torch.device) -> int | None:
    """Return the bytes that reading may still take: what is free, of the share that `mem_fraction` allows."""
    free, share = devices.available(device), config.current().mem_fraction
    memory = devices.memory(device)
    if free is None or share is None or memory.budget is None or memory.used is None:
        return free
    return max(0, min(free, int(share * memory.budget) - memory.used))


def _say(text: str) -> None:
    warnings.warn(f"reading goes on with {text}", RuntimeWarning, stacklevel=4)
