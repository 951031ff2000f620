"""A tiny model and what the laws of extended context ask of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from torch_xlstm_ops.context import states

SEGMENT = 32


def build(seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Return a tiny model with random weights; unpatched, so that nothing is compiled."""
    from transformers import xLSTMConfig, xLSTMForCausalLM

    torch.manual_seed(seed)
    settings = xLSTMConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=2, num_heads=2, qk_dim_factor=1.0, chunk_size=16,
        pad_token_id=0, bos_token_id=0, eos_token_id=None, mode="inference", return_last_states=True,
    )
    return xLSTMForCausalLM(settings).to(dtype).eval()


def some_tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(64, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def equal(a: states.Snapshot, b: states.Snapshot) -> bool:
    """Say whether two snapshots hold the same bits."""
    pairs = zip((a.logits, *itertools.chain(*a.layers)), (b.logits, *itertools.chain(*b.layers)), strict=True)
    return a.position == b.position and all(torch.equal(x, y) for x, y in pairs)


class Interrupting:
    """Tokens in the middle of which something is raised, once."""

    def __init__(self, tokens: list[int], at: int, error: BaseException) -> None:
        self._tokens, self._at, self._error = tokens, at, error

    def __iter__(self) -> Iterator[int]:
        yield from self._tokens[: self._at]
        raise self._error
