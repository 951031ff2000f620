"""Drop-in for flashrnn's sLSTM on every backend; its other functions are not replaced.

`flashrnn` looks up its kernel at every call, and passes tensors in the layout of the backend of its config. The kernel
returns y of every token, but c, n and m of the last token only: those of the tokens before are NaN, which no known
model reads. With ``compat`` nothing is replaced.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_xlstm_ops.patch.adapters import slstm
from torch_xlstm_ops.patch.replacements import Replacement

FLOOR = 1.0  # flashrnn's least n
Kernel = Callable[..., tuple[Tensor, Tensor]]


def replacements(compat: bool) -> Sequence[Replacement]:
    """Return the replacements."""
    if compat:
        return []
    module = importlib.import_module("flashrnn.flashrnn.flashrnn")  # a plain import finds the function of that name
    effect = "an sLSTM sequence is one op call"
    return [Replacement(module, name, _kernel_getter, effect, ("config",))
            for name in ("_get_kernel", "_get_kernel_step")]


def _kernel_getter(original: Callable[[Any], Kernel]) -> Callable[[Any], Kernel]:
    """Return a `_get_kernel` with our sLSTM; other functions, and cut or clipped gradients, go to `original`."""

    def get_kernel(config: Any) -> Kernel:
        if config.function != "slstm" or alters_gradients(config):
            return original(config)

        def kernel(Wx: Tensor, states: Tensor, R: Tensor, b: Tensor, **ignored: Any) -> tuple[Tensor, Tensor]:
            return run(config, Wx, states, R, b)

        return kernel

    return get_kernel


def run(config: Any, Wx: Tensor, states: Tensor, R: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Run an sLSTM on tensors in the layout of the config; return the states of all tokens and the last one.

    The last one has the dtype of Wx, as flashrnn's, or that of `states` if it is wider.
    """
    x = stream(config, _permuted(Wx, config._internal_input_shape, "BTGHD"))
    r = _permuted(R, config._internal_recurrent_shape, "GHDP")
    bias = _permuted(b, config._internal_bias_shape.split(",")[0], "GHD")
    layout = config._internal_output_shape
    before = _permuted(states, layout, "STBHD")[:, 0]
    h, after = slstm(x, r, bias, before.unbind(0), floor=FLOOR)
    last = torch.stack(after)[:, None].to(torch.promote_types(Wx.dtype, states.dtype))
    return _permuted(every_state(h, after), "STBHD", layout), _permuted(last, "STBHD", layout)


def every_state(h: Tensor, after: Sequence[Tensor]) -> Tensor:
    """Return y, c, n, m of all tokens (4, S, B, NH, DH) in the dtype of h (B, S, NH, DH), NaN where unknown.

    after: y, c, n, m after the last token.
    """
    every = torch.cat([h.transpose(0, 1)[None], h.new_full((1,), torch.nan).expand(3, *h.transpose(0, 1).shape)])
    if h.shape[1] == 0:
        return every
    last = torch.stack([state.to(h.dtype) for state in after[1:]])[:, None]
    return torch.cat([every[:1], torch.cat([every[1:, :-1], last], 1)])


def stream(config: Any, x: Tensor) -> Tensor:
    """Cast x to the compute dtype of the config's backend."""
    narrow = config.backend in ("cuda", "cuda_fused") and config.enable_automatic_mixed_precision
    return x.to(getattr(torch, config.dtype)) if narrow and x.dtype != torch.float64 else x


def alters_gradients(config: Any) -> bool:
    """Return whether the config's backend cuts or clips gradients, so that they are not the exact ones."""
    return config.backend != "vanilla" and bool(
        config.gradient_recurrent_cut or config.gradient_recurrent_clipval is not None
    )


def _permuted(t: Tensor, found: str, wanted: str) -> Tensor:
    return t.permute([found.index(axis) for axis in wanted])
