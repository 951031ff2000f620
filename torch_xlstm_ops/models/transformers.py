"""The adapter for transformers' xLSTM (`xLSTMForCausalLM`), patched or not, on its own classes or on the package xlstm.

The argument and the result that carry the cache are called `cache`, or `cache_params` in older releases.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

CACHE_NAMES = ("cache", "cache_params")  # the newest first
Layer = tuple[Tensor, Tensor, Tensor]  # c (B, NH, DHQK, DHHV), n (B, NH, DHQK), m (B, NH, 1)


class Output(NamedTuple):
    """What a call of the model gives."""

    logits: Tensor  # (B, S, V), or (B, 1, V) under `last_position_only`
    cache: Any  # an xLSTMCache


def is_causal_lm(model: object) -> bool:
    """Return whether a model is an xLSTM of transformers with a language model's head."""
    config = getattr(model, "config", None)
    return getattr(config, "model_type", None) == "xlstm" and output_embeddings(model) is not None


def run(model: Any, ids: Tensor, cache: Any = None) -> Output:
    """Run a model, compiled or not, over ids (B, S) from a cache, which it moves on; None begins with an empty one.

    Raises TypeError for a model whose forward takes no cache.
    """
    out = model(input_ids=ids, use_cache=True, **{cache_parameter(model): cache})
    return Output(out.logits, out.cache if hasattr(out, "cache") else out.cache_params)


_parameters: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()  # by forward


def cache_parameter(model: Any) -> str:
    """Return the name of the parameter of a model's forward that takes the cache. Raises TypeError where none does."""
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    name = _named(model.forward) or _named(type(model).forward)
    if name is None:
        found = ", ".join(inspect.signature(type(model).forward).parameters)
        raise TypeError(f"the forward of {type(model).__name__} must take {' or '.join(CACHE_NAMES)}, got ({found})")
    return name


def _named(forward: Callable[..., Any]) -> str | None:
    forward = getattr(forward, "__func__", forward)  # a bound method lives no longer than this call
    name = _parameters.get(forward)
    if name is None:
        taken = inspect.signature(forward).parameters
        name = next((name for name in CACHE_NAMES if name in taken), None)
        if name is not None:
            _parameters[forward] = name
    return name


def last_position_only(model: Any) -> RemovableHandle:
    """Have a model compute the logits of the last position alone, until the handle is removed; `with` removes it."""
    handle: RemovableHandle = output_embeddings(model).register_forward_pre_hook(_last)
    return handle


def _last(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0][:, -1:],)


def output_embeddings(model: Any) -> Any:
    """Return the layer that computes the logits, or None."""
    get = getattr(model, "get_output_embeddings", None)
    return None if get is None else get()


# --- blocks ---


def backbone(model: Any) -> nn.Module:
    """Return the model without its head."""
    return model.backbone  # type: ignore[no-any-return]


def blocks(model: Any) -> nn.ModuleList:
    """Return the blocks, from the first to the last."""
    return model.backbone.blocks  # type: ignore[no-any-return]


@contextmanager
def first_block_alone(model: Any) -> Iterator[None]:
    """Have a model run its first block only."""
    every = blocks(model)
    model.backbone.blocks = every[:1]
    try:
        yield
    finally:
        model.backbone.blocks = every


# --- the cache ---


def empty_cache(model: Any, rows: int = 1, device: Any = None) -> Any:
    """Return the cache that a model begins with, of the very kind that its own forward makes.

    device: default that of the embeddings.
    """
    from transformers.models.xlstm.modeling_xlstm import xLSTMCache

    weight = model.get_input_embeddings().weight
    return xLSTMCache(model.config, rows, dtype=weight.dtype, device=weight.device if device is None else device)


def layers(cache: Any) -> list[Layer]:
    """Return the states of every layer, the first layer first; they are the cache's own tensors."""
    return list(cache.rnn_state.values())


def put_layers(cache: Any, states: Sequence[Layer]) -> None:
    """Have a cache hold these tensors, of every layer, in place of its own."""
    cache.rnn_state = dict(zip(cache.rnn_state, states, strict=True))


def tensors(cache: Any) -> list[Tensor]:
    """Return every tensor that a call of the model writes: the states, and the count of tokens where it is one."""
    count = [cache.seqlen_offset] if isinstance(cache.seqlen_offset, Tensor) else []
    return [t for layer in layers(cache) for t in layer] + count


def position(cache: Any) -> int:
    """Return how many tokens a cache has read."""
    return int(cache.seqlen_offset)


def move(cache: Any, tokens: int) -> None:
    """Count more tokens as read, without waiting for the device."""
    cache.seqlen_offset += tokens


def place(cache: Any, tokens: int) -> None:
    """Set how many tokens a cache has read."""
    if isinstance(cache.seqlen_offset, Tensor):
        cache.seqlen_offset.fill_(tokens)
    else:
        cache.seqlen_offset = tokens
