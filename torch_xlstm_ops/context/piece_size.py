"""The number of tokens that a model reads in one forward pass: from the free memory of its device, and halved when
memory runs out.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from torch_xlstm_ops import config
from torch_xlstm_ops.runtime import devices

# Tokens per piece unless a segment is longer: enough work for a GPU, and progress is visible on a CPU.
PIECE_TOKENS = {"cpu": 2048, "cuda": 8192, "mps": 4096}
MIN_PIECE_TOKENS = 16  # if so few tokens do not fit, the model itself does not
MEMORY_SHARE = 0.5  # of the free memory, for what one piece allocates
_NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")


def default_piece_tokens(device: torch.device) -> int:
    """Return the tokens per piece if memory is no limit: whole segments of the schedule."""
    most = PIECE_TOKENS[device.type]
    segment = config.current().segment or most
    return segment * max(1, most // segment)


def bytes_per_token(model: Any) -> int:
    """Return an estimate of what a forward pass allocates per token: one layer's streams and projections."""
    settings = model.config
    hidden: int = settings.hidden_size
    widest: float = 2 * settings.qk_dim_factor + 4 * settings.v_dim_factor + 3 * settings.ffn_proj_factor
    return round(4 * hidden * (4 + widest))  # states and norms are float32 whatever the weights are


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the device or the host has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _NO_MEMORY)


class PieceSize:
    """The `tokens` of the next piece: the wanted number, or a half, a quarter, ... of it if memory is short.

    segment: tokens per piece; default what suits the device.
    fixed: keep the number until memory runs out; default False: the free memory decides before every piece.
    """

    def __init__(self, model: Any, device: torch.device, segment: int | None = None, *, fixed: bool = False) -> None:
        if segment is not None and segment < 1:
            raise ValueError(f"segment must be a whole number of at least 1, got {segment}")
        self._device, self._fixed = device, fixed
        self._bytes_per_token = bytes_per_token(model)
        self.tokens = self._ceiling = segment or default_piece_tokens(device)
        self.tokens = self._fitting()

    def adapt(self) -> None:
        """Follow the free memory, unless the number is fixed."""
        tokens = self._fitting()
        if tokens != self.tokens:
            _warn(f"{tokens} tokens at a time instead of {self.tokens}: the free memory of {self._device} changed")
            self.tokens = tokens

    def shrink(self, error: BaseException) -> None:
        """Halve the number after an out-of-memory error; raise that error if the number is the smallest."""
        if self.tokens <= MIN_PIECE_TOKENS:
            raise error
        self.tokens //= 2
        self._ceiling = self.tokens
        _warn(f"{self.tokens} tokens at a time from now on: {self._device} ran out of memory with {2 * self.tokens}")

    def _fitting(self) -> int:
        """Return the largest number that fits; it grows only when twice the larger number would fit."""
        if self._fixed:
            return self.tokens
        free = _free_bytes(self._device)
        if free is None:
            return self.tokens
        tokens = self._ceiling
        while (tokens > MIN_PIECE_TOKENS
               and tokens * self._bytes_per_token * (2 if tokens > self.tokens else 1) > MEMORY_SHARE * free):
            tokens //= 2
        return tokens


def _free_bytes(device: torch.device) -> int | None:
    """Return the free memory, within the share of the device that `mem_fraction` allows."""
    free, share = devices.available(device), config.current().mem_fraction
    memory = devices.memory(device)
    if free is None or share is None or memory.budget is None or memory.used is None:
        return free
    return max(0, min(free, int(share * memory.budget) - memory.used))


def _warn(text: str) -> None:
    warnings.warn(f"the prompt is read {text}", RuntimeWarning, stacklevel=4)
