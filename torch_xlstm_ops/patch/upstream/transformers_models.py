"""Whole models of transformers: attention masks and packed documents, which its own xLSTM ignores.

A call whose arguments say that tokens are padding, or that documents start within a row, runs the blocks here, with the
tokens beside the states. So does one in evaluation, of more than `max_inference_chunksize` tokens, with gradients or
without a cache: the original has no gradients there, and keeps states in bfloat16 on the CPU. Every other call runs the
original.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from torch_xlstm_ops.patch import cache_states, tokens
from torch_xlstm_ops.patch.replacements import Replacement
from torch_xlstm_ops.patch.upstream import transformers_cache, transformers_logits

INPUTS = ("input_ids", "inputs_embeds")
PLAIN = tokens.Tokens(None, None)
State = tuple[Tensor | None, Tensor | None, Tensor | None]


def replacements(module: ModuleType) -> Sequence[Replacement]:
    """Return the replacements in transformers' `modeling_xlstm`."""
    lm = module.xLSTMForCausalLM
    return [
        Replacement(module.xLSTMModel, "forward", functools.partial(_model_forward, module),
                    "padding of an attention_mask is not read, packed documents start afresh"),
        Replacement(lm, "forward", functools.partial(transformers_logits.forward, module),
                    "takes an attention_mask by name, and logits_to_keep"),
        Replacement(lm, "prepare_inputs_for_generation", _prepared, "a generated token needs no attention_mask"),
        Replacement(lm, "_prepare_attention_mask_for_generation", lambda original: _every_token,
                    "a prompt without an attention_mask is read whole"),
        *transformers_cache.replacements(module),
    ]


def _model_forward(module: ModuleType, original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `xLSTMModel.forward` that heeds what `tokens.ARGUMENTS` say."""
    run = module.merge_with_config_defaults(module.capture_outputs(_runner(module)))

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **options: Any) -> Any:
        given = {name: options.pop(name) for name in tokens.ARGUMENTS if options.get(name) is not None}
        marked = tokens.of_call(given, *_inputs(args, options)[1].shape[:2]) if given else None
        cache = args[2] if len(args) > 2 else cache_states.given(options)
        if cache is not None and transformers_cache.records(cache):
            transformers_cache.note(self, cache, *_inputs(args, options), given)
        if marked is None and not _beyond(self, _inputs(args, options)[1], cache):
            return original(self, *args, **options)
        if "cache_params" in options:
            options["cache"] = options.pop("cache_params")
        return run(self, *args, **options, tokens=marked or PLAIN)

    return forward


def _beyond(model: Any, inputs: Tensor, cache: Any) -> bool:
    """Return whether the original reads these inputs in pieces, and wrongly."""
    apart = not model.training and inputs.dim() > 1 and inputs.shape[1] > model.config.max_inference_chunksize
    return apart and (cache is None or torch.is_grad_enabled())


def _inputs(args: Sequence[Any], options: Mapping[str, Any]) -> tuple[str, Tensor]:
    """Return the name and the value of what a model call reads."""
    found = [*zip(INPUTS, args, strict=False), *((name, options.get(name)) for name in INPUTS)]
    return next(((name, value) for name, value in found if value is not None), (INPUTS[0], torch.empty(0, 0)))


def _runner(module: ModuleType) -> Callable[..., Any]:
    """Return a `xLSTMModel.forward`, without its decorators, that gives `tokens` to the blocks."""
    name = cache_states.name_in(module.xLSTMOutput)

    def run(
        self: Any, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, cache: Any = None,
        use_cache: bool | None = None, tokens: Any = None, **options: Any,
    ) -> Any:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given, "
                             f"got {'none' if input_ids is None else 'both'}")
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and cache is None:
            cache = module.xLSTMCache(self.config, x.shape[0], device=x.device, dtype=x.dtype)
        every = options.get("output_hidden_states") or self.config.output_hidden_states
        whole = self.training or torch.is_grad_enabled() or every
        x = _through_blocks(self, x, cache, tokens, x.shape[1] if whole else self.config.max_inference_chunksize)
        if use_cache:
            cache.seqlen_offset += x.shape[1]
        return module.xLSTMOutput(last_hidden_state=self.out_norm(x), **{name: cache})

    return run


def _through_blocks(model: Any, x: Tensor, cache: Any, marked: tokens.Tokens, size: int) -> Tensor:
    """Run the blocks on x (B, S, H), `size` tokens at a time, and write the states into the cache."""
    states: list[State] = [(None, None, None) if cache is None else tuple(cache.rnn_state[index])
                           for index in range(len(model.blocks))]
    parts, plain = [], marked.read is None and marked.reset is None
    for start in range(0, max(x.shape[1], 1), max(size, 1)):
        part, those = x[:, start : start + size], marked.part(start, start + size)
        for index, block in enumerate(model.blocks):
            c, n, m = states[index]
            if plain:
                part, states[index] = block(part, states[index] if c is not None else None)
            else:
                part, states[index] = block(part, state=(c, n, tokens.Marked(m, those)))
        parts.append(part)
    if cache is not None:
        for index, after in enumerate(states):
            for kept, new in zip(cache.rnn_state[index], after, strict=True):
                kept.copy_(new)
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _prepared(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `prepare_inputs_for_generation` that drops the mask of a token that was generated.

    Ids that are not more than the cache has read are all new, and not the whole text.
    """

    @functools.wraps(original)
    def prepare(self: Any, *args: Any, **options: Any) -> Any:
        if (options.get("next_sequence_length") or 1) < 1:
            options["next_sequence_length"] = None
        inputs = original(self, *args, **options)
        ids = inputs.get("input_ids")
        cached = cache_states.given(inputs) is not None
        if cached and ids is not None and ids.shape[1] == 1 and not options.get("is_first_iteration"):
            inputs.pop("attention_mask", None)
        return inputs

    return prepare


def _every_token(self: Any, inputs: Tensor, *args: Any, **options: Any) -> Tensor:
    """Replace `_prepare_attention_mask_for_generation`, which takes the pad token for padding wherever it stands."""
    return torch.ones(inputs.shape[:2], dtype=torch.long, device=inputs.device)
