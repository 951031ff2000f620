"""Decoding: run a transformers block for one token, or for its part of a prompt, as one compiled call.

For one token a block spends a third of its time between its Linear layers on a CPU, and nearly all of it in launches
on a GPU. Therefore the block's own forward is compiled as a whole, see `traced`. On a GPU so are the norm and the soft
cap after the last block. A short prompt on the CPU is read sooner than a block is compiled. All other calls run the
original.

The class's ``__call__`` is replaced, not its ``forward``: transformers compares the latter with its own to decide
whether to checkpoint gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_xlstm_ops.patch.cache_states import adopted, is_written
from torch_xlstm_ops.patch.traced import axes_of, traced
from torch_xlstm_ops.runtime import compiler, devices, torch_internals
from torch_xlstm_ops.runtime.uncompiled import Uncompiled

EFFECT = "tokens without gradients are one compiled call, in a block of unmodified modules without hooks"
EFFECT_SMALL = "for a token without gradients on a GPU, one compiled call"
PROMPT = 256  # least tokens, of all rows, of a prompt on the CPU for which a block is compiled
Result = tuple[Tensor, Sequence[Tensor]]


def block_call(original: Callable[..., Result]) -> Callable[..., Result]:
    """Return a block's ``__call__`` for a token without gradients; other calls go to `original`."""

    @functools.wraps(original)
    def call(self: nn.Module, *args: Any, **options: Any) -> Result:
        if len(args) == 2 and not options and not self.training and _compiles(*args) and not _observed(*args):
            x, state = args
            in_place = x.shape[1] == 1 and is_written(state)  # a prompt copies: one compile for both
            found = _run(self, [x, *state], in_place)
            if found is not None:
                h, *new = found
                return h, state if in_place else adopted(state, tuple(new))
        return original(self, *args, **options)

    return call


def norm_call(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a norm's ``__call__`` for a token without gradients on a GPU; other calls go to `original`."""

    @functools.wraps(original)
    def call(self: nn.Module, *args: Any, **options: Any) -> Tensor:
        if len(args) == 1 and not options and not self.training and _compiles_on_gpu(args[0]) and not _observed(*args):
            found = _run(self, [args[0]])
            if found is not None:
                return found[0]
        return original(self, *args, **options)

    return call


def soft_cap_call(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a ``soft_cap`` for a token without gradients on a GPU; other calls go to `original`."""

    @functools.wraps(original)
    def call(values: Tensor, cap_value: Any = None) -> Tensor:
        plain = type(cap_value) in (int, float) and _compiles_on_gpu(values) and values.is_contiguous()
        if plain and not _observed(values):
            with devices.submission(values.device):
                run = compiler.get(_capped, [axes_of(values)], [values], cap=float(cap_value))
                if not isinstance(run, Uncompiled):
                    return run([values])[0]
        return original(values, cap_value)

    return call


def _run(module: nn.Module, inputs: Sequence[Tensor], in_place: bool = False) -> Sequence[Tensor] | None:
    """Return a module's results by one compiled call, see `Traced.run`, or None where it cannot be compiled."""
    device = inputs[0].device
    compiled = traced(module, device.type)
    if compiled is None:
        return None
    with devices.submission(device):
        return compiled.run(inputs, in_place=in_place)


def _capped(values: Tensor, *, cap: float) -> tuple[Tensor]:
    return (cap * torch.tanh(values / cap),)


def _compiles(x: Tensor, state: Sequence[Tensor] | None) -> bool:
    """Return whether these are tokens with a state and without gradients; on the CPU, one a row or many."""
    if state is None or not _is_plain(x):
        return False
    B, S, _ = x.shape
    return S == 1 or B * S >= PROMPT or not x.is_cpu


def _compiles_on_gpu(x: Tensor) -> bool:
    return type(x) is Tensor and not x.is_cpu and _is_plain(x)


def _is_plain(x: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or type(x) is not Tensor:
        return False
    device = x.device.type
    return x.dim() == 3 and x.numel() > 0 and device in devices.KINDS and not torch.is_autocast_enabled(device)


def _observed(x: Tensor, state: Sequence[Tensor] = ()) -> bool:
    """Return whether a mode, a transform, a tracer or a global module hook observes the computation.

    A compiled block calls the operator of a prompt, which a mode for our operators then sees; that of a token is part
    of the block.
    """
    return torch_internals.watched(operators=bool(state) and x.shape[1] == 1) or torch_internals.global_hooks()
