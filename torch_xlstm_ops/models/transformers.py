"""The adapter for transformers' xLSTM (`xLSTMForCausalLM`), patched or not, on its own classes or on the package xlstm.

The argument and the result that carry the cache are called `cache`, or `cache_params` in older releases.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

CACHE_NAMES = ("cache", "cache_params")  # the newest first
Layer = tuple[Tensor, Tensor, Tensor]  # c (B, NH, DHQK, DHHV), n (B, NH, DHQK), m (B, NH, 1)


class Output(NamedTuple):
    """The result of a model call."""

    logits: Tensor  # (B, S, V) from `forward`, (B, 1, V) within `last_position_only`, (B, V) from `forward_last`
    cache: Any  # an xLSTMCache


def is_causal_lm(model: object) -> bool:
    """Return whether a model is an xLSTM of transformers with a language model head."""
    config = getattr(model, "config", None)
    return getattr(config, "model_type", None) == "xlstm" and output_embeddings(model) is not None


# --- forward ---


def forward(model: Any, ids: Tensor, cache: Any = None) -> Output:
    """Run a model, compiled or not, on ids (B, S) and update the cache in place; None starts from an empty cache.

    Raises TypeError for a model whose forward takes no cache.
    """
    out = model(input_ids=ids, use_cache=True, **{cache_parameter(model): cache})
    return Output(out.logits, out.cache if hasattr(out, "cache") else out.cache_params)


@torch.no_grad()
def forward_last(model: Any, ids: Tensor, cache: Any = None) -> Output:
    """Like `forward`, but compute the logits (B, V) of the last position only, and no gradients."""
    if ids.shape[1] == 1:
        out = forward(model, ids, cache)
    else:
        with last_position_only(model):
            out = forward(model, ids, cache)
    return Output(out.logits[:, -1], out.cache)


_parameters: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()  # by forward


def cache_parameter(model: Any) -> str:
    """Return the name of the parameter of a model's forward that takes the cache. Raises TypeError if there is none."""
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper keeps the model there
    name = _cache_parameter_of(model.forward) or _cache_parameter_of(type(model).forward)
    if name is None:
        found = ", ".join(inspect.signature(type(model).forward).parameters)
        raise TypeError(f"the forward of {type(model).__name__} must take {' or '.join(CACHE_NAMES)}, got ({found})")
    return name


def _cache_parameter_of(forward: Callable[..., Any]) -> str | None:
    forward = getattr(forward, "__func__", forward)  # a bound method is a new object at each access
    name = _parameters.get(forward)
    if name is None:
        taken = inspect.signature(forward).parameters
        name = next((name for name in CACHE_NAMES if name in taken), None)
        if name is not None:
            _parameters[forward] = name
    return name


def last_position_only(model: Any) -> RemovableHandle:
    """Make a model compute the logits of the last position only, until the handle is removed; `with` removes it."""
    handle: RemovableHandle = output_embeddings(model).register_forward_pre_hook(_slice_last_position)
    return handle


def _slice_last_position(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0][:, -1:],)


# --- modules ---


def device_of(model: Any) -> torch.device:
    """Return the device of a model's embeddings, where its input ids must be."""
    return model.get_input_embeddings().weight.device  # type: ignore[no-any-return]


def vocabulary_size(model: Any) -> int:
    """Return the number of token ids that a model has embeddings for."""
    return model.get_input_embeddings().num_embeddings  # type: ignore[no-any-return]


def output_embeddings(model: Any) -> Any:
    """Return the layer that computes the logits, or None."""
    get = getattr(model, "get_output_embeddings", None)
    return None if get is None else get()


def backbone(model: Any) -> nn.Module:
    """Return the model without its head."""
    return model.backbone  # type: ignore[no-any-return]


def blocks(model: Any) -> nn.ModuleList:
    """Return the blocks, from the first to the last."""
    return model.backbone.blocks  # type: ignore[no-any-return]


@contextmanager
def first_block_only(model: Any) -> Iterator[None]:
    """Make a model run its first block only."""
    every = blocks(model)
    model.backbone.blocks = every[:1]
    try:
        yield
    finally:
        model.backbone.blocks = every


# --- the cache ---


def empty_cache(model: Any, rows: int = 1, device: Any = None) -> Any:
    """Return a cache of zeros for a batch of `rows`, as the model's own forward makes it.

    device: default that of the embeddings.
    """
    from transformers.models.xlstm.modeling_xlstm import xLSTMCache

    weight = model.get_input_embeddings().weight
    return xLSTMCache(model.config, rows, dtype=weight.dtype, device=weight.device if device is None else device)


def layers(cache: Any) -> list[Layer]:
    """Return the states of every layer, the first layer first; they are the cache's own tensors."""
    return list(cache.rnn_state.values())


def set_layers(cache: Any, states: Sequence[Layer]) -> None:
    """Replace the state tensors of every layer of a cache."""
    cache.rnn_state = dict(zip(cache.rnn_state, states, strict=True))


def copy_row(cache: Any, row: int = 0) -> list[Layer]:
    """Return a copy of one row of every layer's state, with a batch dimension of 1."""
    return [(c[row : row + 1].clone(), n[row : row + 1].clone(), m[row : row + 1].clone())
            for c, n, m in layers(cache)]


@torch.no_grad()
def cache_of_rows(model: Any, rows: Sequence[Sequence[Layer]], position: int) -> Any:
    """Return a cache of copies of states, one sequence of layers per row, that counts `position` tokens as read."""
    cache = empty_cache(model, len(rows))
    for index, layer in enumerate(layers(cache)):
        for part, tensor in enumerate(layer):
            for row, states in enumerate(rows):
                tensor[row].copy_(states[index][part][0])
    set_position(cache, position)
    return cache


def take_rows(model: Any, cache: Any, rows: Sequence[int]) -> Any:
    """Return a cache with copies of some rows of another."""
    taken = empty_cache(model, len(rows))
    set_layers(taken, [(c[rows], n[rows], m[rows]) for c, n, m in layers(cache)])
    return taken


def put_rows(cache: Any, rows: Sequence[int], part: Any) -> None:
    """Copy the states of `part`, as made by `take_rows`, back into these rows of a cache."""
    for layer, changed in zip(layers(cache), layers(part), strict=True):
        for tensor, new in zip(layer, changed, strict=True):
            tensor[rows] = new


def tensors(cache: Any) -> list[Tensor]:
    """Return every tensor that a model call writes: the states, and the token count if it is a tensor."""
    count = [cache.seqlen_offset] if isinstance(cache.seqlen_offset, Tensor) else []
    return [t for layer in layers(cache) for t in layer] + count


def position(cache: Any) -> int:
    """Return the number of tokens that a cache has read."""
    return int(cache.seqlen_offset)


def advance_position(cache: Any, tokens: int) -> None:
    """Count more tokens as read, without waiting for the device."""
    cache.seqlen_offset += tokens


def set_position(cache: Any, tokens: int) -> None:
    """Set the number of tokens that a cache has read."""
    if isinstance(cache.seqlen_offset, Tensor):
        cache.seqlen_offset.fill_(tokens)
    else:
        cache.seqlen_offset = tokens
