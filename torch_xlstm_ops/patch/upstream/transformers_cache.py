"""What `generate` asks of a cache and transformers' xLSTMCache does not have: its length, rows, and the way back.

A state holds no past, so that tokens cannot be cut off its end. A cache that is asked to record keeps an earlier state
and the calls since, and reads those anew up to the token that is wanted: `crop` costs one call.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops.patch import cache_states
from torch_xlstm_ops.patch.replacements import Replacement

RECORD = "_xlstm_ops_record"  # on a cache that records: its Record


class Call(NamedTuple):
    """The arguments of a model call: inputs (B, S, ...), and what else tells of its tokens."""

    model: weakref.ref[torch.nn.Module]
    name: str  # input_ids or inputs_embeds
    inputs: Tensor
    given: Mapping[str, Any]

    def read(self, cache: Any, S: int) -> None:
        """Read the first S tokens again."""
        model = self.model()
        if model is None:
            raise RuntimeError("the model that wrote the cache must be alive for the cache to be cropped")
        total = self.inputs.shape[1]
        given = {name: value if value.dim() < 2 else value[:, : value.shape[1] - total + S]
                 for name, value in self.given.items()}
        name = cache_states.name_in(type(model).forward)
        model(**{self.name: self.inputs[:, :S], name: cache}, use_cache=True, **given)


class Record:
    """An earlier state of a cache, and the model calls since."""

    def __init__(self, cache: Any) -> None:
        self.position = int(cache.seqlen_offset)
        self.states = {layer: tuple(t.clone() for t in state) for layer, state in cache.rnn_state.items()}
        self.calls: list[Call] = []


def records(cache: object) -> bool:
    """Return whether a cache records."""
    return RECORD in vars(cache)


def note(model: torch.nn.Module, cache: Any, name: str, inputs: Tensor, given: Mapping[str, Any]) -> None:
    """Tell a cache that records of a model call that goes on from it."""
    vars(cache)[RECORD].calls.append(Call(weakref.ref(model), name, inputs, given))


def replacements(module: ModuleType) -> Sequence[Replacement]:
    """Return the replacements in transformers' `modeling_xlstm`."""
    def add(name: str, member: object) -> Replacement:
        return Replacement(module.xLSTMCache, name, lambda original: member, effect)

    effect = "generate goes on from a cache, and beam search and assisted decoding run with one"
    found = [add(name, member) for name, member in vars(_Methods).items() if not name.startswith("__")]
    if cache_states.name_in(module.xLSTMModel.forward) == "cache":
        lm = module.xLSTMForCausalLM
        make = functools.partial(_prepared_cache, module.xLSTMCache)
        found.append(Replacement(lm, "_prepare_cache_for_generation", make, "assisted decoding begins with a cache"))
        found.append(Replacement(lm, "_is_stateful", lambda original: False, "assisted decoding is allowed"))
    return found


class _Methods:
    """Members for `xLSTMCache`."""

    is_compileable = False

    @property
    def is_linear(self: Any) -> list[bool]:
        """Return false for every layer: the number of read tokens tells `generate` which ids are new."""
        return [False] * len(self.rnn_state)

    @property
    def is_croppable(self: Any) -> bool:
        """Return whether tokens can be taken back."""
        return RECORD in vars(self)

    @property
    def batch_size(self: Any) -> int:
        """Return the number of rows."""
        return next(iter(self.rnn_state.values()))[0].shape[0]  # type: ignore[no-any-return]

    def get_seq_length(self: Any, layer_idx: int = 0) -> int:
        """Return the number of tokens that were read, padding included."""
        return int(self.seqlen_offset)

    def reset(self: Any) -> None:
        """Empty the cache."""
        for state in self.rnn_state.values():
            for tensor in state:
                tensor.zero_()
        self.seqlen_offset = self.seqlen_offset * 0
        vars(self).pop(RECORD, None)

    def reorder_cache(self: Any, beam_idx: Tensor) -> None:
        """Make row i what row beam_idx[i] was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self: Any, indices: Tensor) -> None:
        """Keep rows by index, in the given order, or by a bool mask."""
        self.rnn_state = {
            layer: tuple(t[indices.to(t.device)] for t in state) for layer, state in self.rnn_state.items()
        }
        _begin_record(self)

    def batch_repeat_interleave(self: Any, repeats: int) -> None:
        """Repeat each row."""
        self.rnn_state = {layer: tuple(t.repeat_interleave(repeats, 0) for t in state)
                          for layer, state in self.rnn_state.items()}
        _begin_record(self)

    def activate_past_recording(self: Any) -> None:
        """Record from now on, so that later tokens can be taken back."""
        if RECORD not in vars(self):
            vars(self)[RECORD] = Record(self)

    def crop(self: Any, tokens_to_remove: int) -> None:
        """Take tokens back: -tokens_to_remove of them, or, for a positive number, all after so many.

        Raises ValueError if they were not read since the cache records, or since it was last cropped.
        """
        position = int(self.seqlen_offset)
        target = position + tokens_to_remove if tokens_to_remove <= 0 else min(tokens_to_remove, position)
        _take_back(self, position, target)
        _begin_record(self)


def _take_back(cache: Any, position: int, target: int) -> None:
    record = vars(cache).get(RECORD)
    if target == position:
        return
    if record is None or target < record.position:
        since = "it does not record: call activate_past_recording()" if record is None else f"from {record.position} on"
        raise ValueError(f"a cache of {position} tokens can be cropped only to what it recorded, {since}, got {target}")
    for layer, state in record.states.items():
        for kept, before in zip(cache.rnn_state[layer], state, strict=True):
            kept.copy_(before)
    cache.seqlen_offset = cache.seqlen_offset - (position - record.position)
    del vars(cache)[RECORD]
    with torch.no_grad():
        left = target - record.position
        for call in record.calls:
            if left > 0:
                call.read(cache, min(left, call.inputs.shape[1]))
            left -= call.inputs.shape[1]
    vars(cache)[RECORD] = record


def _begin_record(cache: Any) -> None:
    """Record from here on, if the cache records."""
    if RECORD in vars(cache):
        vars(cache)[RECORD] = Record(cache)


def _prepared_cache(cache: type, original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `_prepare_cache_for_generation` that makes a cache for assisted decoding, which wants one at the start.
    """

    @functools.wraps(original)
    def prepare(
        self: Any, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int,
        *rest: Any, **options: Any,
    ) -> Any:
        result = original(self, generation_config, model_kwargs, generation_mode, batch_size, *rest, **options)
        assisted = generation_config.is_assistant or str(getattr(generation_mode, "value", "")) == "assisted_generation"
        if assisted and generation_config.use_cache is not False:
            if model_kwargs.get("cache") is None:
                model_kwargs["cache"] = cache(self.config, batch_size, dtype=self.dtype, device=self.device)
            model_kwargs["cache"].activate_past_recording()
        return result

    return prepare
