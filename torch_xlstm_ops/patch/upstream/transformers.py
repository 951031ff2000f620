"""Drop-in for transformers' xLSTM (`xLSTMModel`, `xLSTMForCausalLM`).

transformers takes its blocks from its own classes, or, when the package xlstm is installed at import, from xlstm_large
and mlstm_kernels. In both cases one backend call runs the mLSTM of a layer, and an `xLSTMCache` has the states between
calls; these two are replaced.

The original cache has the dtype of the embedding, so that a bfloat16 model rounds the states at every call. A cache
created while patched has float32 (float64 for float64) and reports the requested dtype. A cache created before, and
every cache with ``compat``, is as the original.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_xlstm_ops.maths.shapes import state_dtype
from torch_xlstm_ops.patch import cache_states, decoding
from torch_xlstm_ops.patch.adapters import mlstm, returns_states
from torch_xlstm_ops.patch.replacements import Replacement
from torch_xlstm_ops.patch.upstream import mlstm_kernels, transformers_models

BACKEND_PARAMETERS = (
    "self", "query", "key", "value", "igate", "fgate", "c_initial", "n_initial", "m_initial", "return_last_states",
    "mode",
)


def replacements(compat: bool) -> Sequence[Replacement]:
    """Return the replacements for the blocks that transformers chose when it was imported."""
    from transformers.models.xlstm import modeling_xlstm as module

    states = Replacement(module.xLSTMCache, "__init__", _with_wide_states, "states stay float32 between calls",
                    ("self", "config", "max_batch_size", "dtype", "device", "kwargs"))
    token = Replacement(module.xLSTMBlock, "__call__", decoding.block_call, decoding.EFFECT,
                   uses=(("forward", ("self", "x", "state")),))
    small = [
        Replacement(module.xLSTMRMSNorm, "__call__", decoding.norm_call, decoding.EFFECT_SMALL),
        Replacement(module, "soft_cap", decoding.soft_cap_call, decoding.EFFECT_SMALL, ("values", "cap_value")),
    ]
    common = [token, *small] if compat else [
        states, token, Replacement(module.xLSTMModel, "__call__", cache_states.model_call, cache_states.EFFECT), *small,
        *transformers_models.replacements(module),
    ]
    if module.external_xlstm:
        return [*common, *mlstm_kernels.replacements(compat)]
    effect = "sequences of any length and steps are one op call"
    return [*common, Replacement(module.xLSTMBackend, "forward", lambda original: _forward, effect, BACKEND_PARAMETERS)]


def _forward(
    self: Any, query: Tensor, key: Tensor, value: Tensor, igate: Tensor, fgate: Tensor,
    c_initial: Tensor | None = None, n_initial: Tensor | None = None, m_initial: Tensor | None = None,
    return_last_states: bool | None = None, mode: str | None = None,
) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
    """Replace `xLSTMBackend.forward`."""
    config = self.config
    both = returns_states(
        return_last_states, mode, mode_default=config.mode, states_default=config.return_last_states
    )
    h, state = mlstm(query, key, value, igate, fgate, c_initial, n_initial, m_initial, eps=config.eps)
    return (h, tuple(state)) if both else h


def _with_wide_states(original: Callable[..., None]) -> Callable[..., None]:
    """Return an `xLSTMCache.__init__` that allocates the states in float32 for every dtype."""

    @functools.wraps(original)
    def init(
        self: Any, config: Any, max_batch_size: int, dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None, **kwargs: Any,
    ) -> None:
        wide, at_once = state_dtype(dtype), device is not None and torch.device(device).type == "mps"
        original(self, config, max_batch_size, dtype=wide, device="meta" if at_once else device, **kwargs)
        self.dtype = dtype
        if at_once:
            shapes = [[t.shape for t in layer] for layer in self.rnn_state.values()]
            zeros = cache_states.zero_states(shapes, wide, device)
            self.rnn_state = dict(zip(self.rnn_state, zeros, strict=True))
            if isinstance(self.seqlen_offset, Tensor):
                self.seqlen_offset = torch.zeros_like(self.seqlen_offset, device=device)
        cache_states.note_created(self.rnn_state)

    return init
