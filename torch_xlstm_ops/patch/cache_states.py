"""The states of the cache that a transformers model is decoding with: a block may write them in place.

The model copies the state that a block returns over the cache's. Where the block has already written the cache's own
tensors and returns them, that copy does nothing. Outside such a call a block returns new states, as the original does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch

EFFECT = "a token's states are written into the cache"
CACHE_NAMES = ("cache", "cache_params")
_written: ContextVar[frozenset[int]] = ContextVar("written", default=frozenset())  # ids of the cache's tuples


def model_call(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return an `xLSTMModel.__call__` that tells blocks which states the call will overwrite."""

    @functools.wraps(original)
    def call(self: Any, *args: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            return original(self, *args, **options)
        cache = next((options[name] for name in CACHE_NAMES if options.get(name) is not None), None)
        states = getattr(cache, "rnn_state", None)
        upstream = type(self).forward.__module__.startswith("transformers.models.xlstm.")
        if not isinstance(states, dict) or not upstream or "forward" in vars(self):
            return original(self, *args, **options)
        token = _written.set(frozenset(map(id, states.values())))
        try:
            return original(self, *args, **options)
        finally:
            _written.reset(token)

    return call


def is_written(state: object) -> bool:
    """Return whether the running model call overwrites this state with what the block returns."""
    return id(state) in _written.get()
