"""Drop-in for transformers' xLSTM (`xLSTMModel`, `xLSTMForCausalLM`).

transformers decides at import where its blocks come from: its own classes, or xlstm_large and through it
mlstm_kernels when the package xlstm is installed. Either way one backend call runs the mLSTM of a layer, and the
model keeps the states between calls in an `xLSTMCache`: that is where we step in.

The peer holds those states in the embedding's dtype, so a bfloat16 model rounds them at every call; a cache made
while patched holds them in float32 (float64 beside float64) and reports the dtype it was asked for. A cache made
before keeps its own, and so do all with ``compat``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_xlstm_ops.maths.shapes import state_dtype
from torch_xlstm_ops.patch import decoding
from torch_xlstm_ops.patch.kernels import mlstm, returns_states
from torch_xlstm_ops.patch.replacements import Change
from torch_xlstm_ops.patch.upstream import mlstm_kernels

BACKEND_PARAMETERS = (
    "self", "query", "key", "value", "igate", "fgate", "c_initial", "n_initial", "m_initial", "return_last_states",
    "mode",
)


def changes(compat: bool) -> Sequence[Change]:
    """Return what to replace for the branch that transformers chose when it was imported."""
    from transformers.models.xlstm import modeling_xlstm as peer

    states = Change(peer.xLSTMCache, "__init__", _with_wide_states, "states stay float32 between calls",
                    ("self", "config", "max_batch_size", "dtype", "device", "kwargs"))
    token = Change(peer.xLSTMBlock, "__call__", decoding.call_or, decoding.EFFECT,
                   beside=(("forward", ("self", "x", "state")),))
    kept = [token] if compat else [states, token]
    if peer.external_xlstm:
        return [*kept, *mlstm_kernels.changes(compat)]
    effect = "sequences of any length and steps are one op call"
    return [*kept, Change(peer.xLSTMBackend, "forward", lambda theirs: _forward, effect, BACKEND_PARAMETERS)]


def _forward(
    self: Any, query: Tensor, key: Tensor, value: Tensor, igate: Tensor, fgate: Tensor,
    c_initial: Tensor | None = None, n_initial: Tensor | None = None, m_initial: Tensor | None = None,
    return_last_states: bool | None = None, mode: str | None = None,
) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
    """Stand in for `xLSTMBackend.forward`."""
    config = self.config
    both = returns_states(
        return_last_states, mode, mode_default=config.mode, states_default=config.return_last_states
    )
    h, state = mlstm(query, key, value, igate, fgate, c_initial, n_initial, m_initial, eps=config.eps)
    return (h, tuple(state)) if both else h


def _with_wide_states(original: Callable[..., None]) -> Callable[..., None]:
    """Return an `xLSTMCache.__init__` that allocates the states in float32 whatever dtype it is asked for."""

    @functools.wraps(original)
    def init(
        self: Any, config: Any, max_batch_size: int, dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None, **kwargs: Any,
    ) -> None:
        original(self, config, max_batch_size, dtype=state_dtype(dtype), device=device, **kwargs)
        self.dtype = dtype

    return init
