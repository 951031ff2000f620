"""Stacks of xlstm: several tokens at once from a state, by `step` or by `forward(x, state=...)`.

The package's `step` takes one token, and its `forward` no state for an mLSTM.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_xlstm_ops.patch.replacements import Replacement


def replacements() -> Sequence[Replacement]:
    """Return the replacements."""
    from xlstm.components.conv import CausalConv1d
    from xlstm.xlstm_block_stack import xLSTMBlockStack

    return [
        Replacement(CausalConv1d, "step", _conv_step, "steps of several tokens", ("self", "x", "conv_state")),
        Replacement(xLSTMBlockStack, "forward", _stack_forward, "takes state and return_last_state",
                    ("self", "x", "kwargs"), uses=(("step", ("self", "x", "state")),)),
    ]


def _conv_step(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `CausalConv1d.step` for any number of tokens; one token without gradients goes to `original`.

    The original writes the state in place, which gradients do not allow.
    """

    @functools.wraps(original)
    def step(self: Any, x: Tensor, conv_state: Sequence[Tensor] | None = None) -> Any:
        size = self.config.kernel_size
        if size == 0 or self.groups == 1 or (x.shape[1] == 1 and not torch.is_grad_enabled()):
            return original(self, x, conv_state)
        before = x.new_zeros((x.shape[0], size, x.shape[2])) if conv_state is None else conv_state[0].to(x.dtype)
        read = torch.cat([before, x], 1)
        y = F.conv1d(read[:, 1:].transpose(1, 2), self.conv.weight, self.conv.bias, groups=self.groups)
        return y.transpose(1, 2), (read[:, -size:].clone(),)

    return step


def _stack_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `xLSTMBlockStack.forward` that takes a state, as `step` returns it, and returns one if asked.

    With a state, or with return_last_state, it returns (x, state); the given state is left as it is.
    """

    @functools.wraps(original)
    def forward(
        self: Any, x: Tensor, *, state: dict[str, dict[str, Any]] | None = None, return_last_state: bool = False,
        **options: Any,
    ) -> Any:
        if state is None and not return_last_state:
            return original(self, x, **options)
        return self.step(x, {} if state is None else _copied(state))

    return forward


def _copied(state: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return a state whose convolutions are copies, as a step of one token writes them in place."""
    return {
        block: {name: tuple(t.clone() for t in value) if name == "conv_state" and value is not None else value
                for name, value in parts.items()}
        for block, parts in state.items()
    }
