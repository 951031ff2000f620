"""The language model's forward: logits of the last tokens alone, and gradients of long sequences.

transformers' own computes logits of a whole prompt, of which `generate` reads one. In evaluation, beyond
`max_inference_chunksize` tokens, it caps them in place where autograd does not see it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from torch_xlstm_ops.patch import cache_states

KEYWORDS = {"attention_mask": None, "logits_to_keep": 0}  # where Trainer and `generate` look for them, and defaults


def forward(module: ModuleType, original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `xLSTMForCausalLM.forward` with KEYWORDS in its signature."""
    run = module.can_return_tuple(_runner(module))

    @functools.wraps(original)
    def replaced(self: Any, *args: Any, logits_to_keep: int | Tensor = 0, **options: Any) -> Any:
        S = _length(args, options)
        keeps = isinstance(logits_to_keep, Tensor) or 0 < logits_to_keep < S
        beyond = not self.training and torch.is_grad_enabled() and self.config.max_inference_chunksize < S
        if not keeps and not beyond:
            return original(self, *args, **options)
        if "cache_params" in options:
            options["cache"] = options.pop("cache_params")
        return run(self, *args, logits_to_keep=logits_to_keep, **options)

    signature = inspect.signature(original)
    *named, rest = signature.parameters.values()
    ours = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value) for name, value in KEYWORDS.items()]
    replaced.__signature__ = signature.replace(parameters=[*named, *ours, rest])  # type: ignore[attr-defined]
    return replaced


def _length(args: tuple[Any, ...], options: dict[str, Any]) -> int:
    """Return the number of tokens of a call, 0 for one without inputs."""
    found = [*args[:2], options.get("input_ids"), options.get("inputs_embeds")]
    return next((value.shape[1] for value in found if isinstance(value, Tensor) and value.dim() > 1), 0)


def _runner(module: ModuleType) -> Callable[..., Any]:
    """Return a `xLSTMForCausalLM.forward`, without its decorators, that selects tokens and caps out of place."""
    taken = cache_states.name_in(module.xLSTMModel.forward)
    name = cache_states.name_in(module.xLSTMCausalLMOutput)

    def run(
        self: Any, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, cache: Any = None,
        labels: Tensor | None = None, use_cache: bool | None = None, logits_to_keep: int | Tensor = 0, **options: Any,
    ) -> Any:
        out = self.backbone(input_ids, inputs_embeds=inputs_embeds, use_cache=use_cache, **{taken: cache}, **options)
        kept = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep or None, None)
        h = out.last_hidden_state[:, kept]
        logits = module.soft_cap(self.lm_head(h.to(self.lm_head.weight.dtype)).float(),
                                 self.config.output_logit_soft_cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **options)
        return module.xLSTMCausalLMOutput(
            loss=loss, logits=logits, hidden_states=out.hidden_states, **{name: getattr(out, name)},
        )

    return run
