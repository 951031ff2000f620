"""The states of the cache of a transformers model's running call: a block may write them in place.

The model copies the state that a block returns over the cache's. Where the block has already written the cache's own
tensors and returns them, that copy does nothing. A cache that the call itself created takes the block's new tensors in
place of its zeros, which nobody else has seen, and that copy does nothing either. Outside such a call a block returns
new states, as the original does.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

ALIGNED = 64  # elements: the states in one block of memory begin at multiples of it
EFFECT = "a token's states are written into the cache"
CACHE_NAMES = ("cache", "cache_params")  # of the argument and the result that carry it, the newest first
State = tuple[Tensor, ...]


class _Place(NamedTuple):
    """Where a cache keeps a layer's state; `created`: by the running model call."""

    states: dict[int, State]
    layer: int
    state: State
    created: bool


_places: ContextVar[dict[int, _Place] | None] = ContextVar("places", default=None)  # by the state's id


def model_call(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return an `xLSTMModel.__call__` that tells blocks which states the call will overwrite."""

    @functools.wraps(original)
    def call(self: Any, *args: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            return original(self, *args, **options)
        cache = given(options)
        states = {} if cache is None else getattr(cache, "rnn_state", None)
        upstream = type(self).forward.__module__.startswith("transformers.models.xlstm.")
        if not isinstance(states, dict) or not upstream or "forward" in vars(self):
            return original(self, *args, **options)
        token = _places.set(_places_of(states, created=False))
        try:
            return original(self, *args, **options)
        finally:
            _places.reset(token)

    return call


def _places_of(states: dict[int, State], *, created: bool) -> dict[int, _Place]:
    return {id(state): _Place(states, layer, state, created) for layer, state in states.items()}


def note_created(states: dict[int, State]) -> None:
    """Tell the running model call, if any, of the zero states of a cache that was created just now."""
    places = None if torch.compiler.is_compiling() else _places.get()
    if places is not None:
        places.update(_places_of(states, created=True))


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
    """Return whether the running model call overwrites this state of a cache it was given with what a block returns."""
    place = _place(state)
    return place is not None and not place.created


def adopted(state: object, new: State) -> State:
    """Return the state `new` that a block computed from `state`, which a cache that the call created then keeps."""
    place = _place(state)
    if place is not None and place.created and all(map(_alike, place.state, new)):
        place.states[place.layer] = new
    return new


def _place(state: object) -> _Place | None:
    place = (_places.get() or {}).get(id(state))
    return place if place is not None and place.state is state else None


def _alike(kept: Tensor, new: Tensor) -> bool:
    return kept.shape == new.shape and kept.dtype == new.dtype and kept.device == new.device
