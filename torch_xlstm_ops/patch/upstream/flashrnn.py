"""Drop-in for flashrnn's sLSTM, whichever backend is asked for; its other functions stay theirs.

`flashrnn` asks for its kernel anew at every call, and hands it tensors in the layout of the backend that its config
names. y is returned for every token; of c, n and m only the last are kept, and the tokens before have NaN there: no
model that we know reads them. With ``compat`` flashrnn is left alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_xlstm_ops.patch.kernels import slstm
from torch_xlstm_ops.patch.replacements import Change

FLOOR = 1.0  # flashrnn's least n
Kernel = Callable[..., tuple[Tensor, Tensor]]


def changes(compat: bool) -> Sequence[Change]:
    """Return what to replace."""
    if compat:
        return []
    peer = importlib.import_module("flashrnn.flashrnn.flashrnn")  # a plain import finds the function of that name
    effect = "an sLSTM sequence is one op call"
    return [Change(peer, name, _ours_or, effect, ("config",)) for name in ("_get_kernel", "_get_kernel_step")]


def _ours_or(original: Callable[[Any], Kernel]) -> Callable[[Any], Kernel]:
    """Return a choice of kernel that leaves to `original` what is no sLSTM, or has gradients cut or clipped."""

    def get_kernel(config: Any) -> Kernel:
        if config.function != "slstm" or alters_gradients(config):
            return original(config)

        def kernel(Wx: Tensor, states: Tensor, R: Tensor, b: Tensor, **ignored: Any) -> tuple[Tensor, Tensor]:
            return run(config, Wx, states, R, b)

        return kernel

    return get_kernel


def run(config: Any, Wx: Tensor, states: Tensor, R: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Run an sLSTM on tensors as the config lays them out; return all tokens' states and the last.

    The last are in the dtype of Wx, as the peer's, or in that of `states` where it is wider.
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
    """Return y, c, n, m of all tokens (4, S, B, NH, DH) in the dtype of h (B, S, NH, DH), NaN where they are not known.

    after: y, c, n, m after the last token.
    """
    every = torch.cat([h.transpose(0, 1)[None], h.new_full((1,), torch.nan).expand(3, *h.transpose(0, 1).shape)])
    if h.shape[1] == 0:
        return every
    last = torch.stack([state.to(h.dtype) for state in after[1:]])[:, None]
    return torch.cat([every[:1], torch.cat([every[1:, :-1], last], 1)])


def stream(config: Any, x: Tensor) -> Tensor:
    """Return x in the dtype that the config's backend computes in."""
    narrow = config.backend in ("cuda", "cuda_fused") and config.enable_automatic_mixed_precision
    return x.to(getattr(torch, config.dtype)) if narrow and x.dtype != torch.float64 else x


def alters_gradients(config: Any) -> bool:
    """Say whether the config has its backend cut or clip gradients, which is not the recurrence's own."""
    return config.backend != "vanilla" and bool(
        config.gradient_recurrent_cut or config.gradient_recurrent_clipval is not None
    )


def _permuted(t: Tensor, found: str, wanted: str) -> Tensor:
    return t.permute([found.index(axis) for axis in wanted])
