"""The states of the cache that a transformers model is decoding with: a block may write them in place.

The model copies the state that a block returns over the cache's. Where the block has already written the cache's own
tensors and returns them, that copy does nothing. Outside such a call a block returns new states, as the original does.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from itertools import chain, islice
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

ALIGNED = 64  # elements: the states in one block of memory begin at multiples of it
EFFECT = "a token's states are written into the cache"
CACHE_NAMES = ("cache", "cache_params")  # of the argument and the result that carry it, the newest first
_NONE: Mapping[int, object] = MappingProxyType({})
_written: ContextVar[Mapping[int, object]] = ContextVar("written", default=_NONE)  # the cache's tuples, by id


def model_call(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return an `xLSTMModel.__call__` that tells blocks which states the call will overwrite."""

    @functools.wraps(original)
    def call(self: Any, *args: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            return original(self, *args, **options)
        states = getattr(given(options), "rnn_state", None)
        upstream = type(self).forward.__module__.startswith("transformers.models.xlstm.")
        if not isinstance(states, dict) or not upstream or "forward" in vars(self):
            return original(self, *args, **options)
        token = _written.set({id(state): state for state in states.values()})
        try:
            return original(self, *args, **options)
        finally:
            _written.reset(token)

    return call


def given(options: Mapping[str, Any]) -> Any:
    """Return the cache among the arguments of a call, or None."""
    return next((options[name] for name in CACHE_NAMES if options.get(name) is not None), None)


def name_in(function: Callable[..., Any]) -> str:
    """Return the name that a function has for the cache."""
    return next(name for name in CACHE_NAMES if name in inspect.signature(function).parameters)


def zero_states(shapes: Sequence[Sequence[torch.Size]], dtype: torch.dtype, device: Any) -> list[tuple[Tensor, ...]]:
    """Return zeros for the c, n, m of each layer in one block of memory, which is filled once."""
    sizes = [[-(-shape.numel() // ALIGNED) * ALIGNED for shape in layer] for layer in shapes]
    memory = torch.zeros(sum(map(sum, sizes)), dtype=dtype, device=device)
    parts = torch.split(memory, [*chain(*sizes)])
    views = (part[:shape.numel()].view(shape) for part, shape in zip(parts, chain(*shapes), strict=True))
    return [tuple(islice(views, len(layer))) for layer in shapes]


def is_written(state: object) -> bool:
    """Return whether the running model call overwrites this state with what the block returns."""
    return _written.get().get(id(state)) is state
