"""Drop-in for the package xlstm: mLSTM cells, sLSTM cells, and xlstm_large through mlstm_kernels.

The default backend of the sLSTM, "cuda", compiles CUDA when a layer is built, and fails where it cannot. While patched,
a layer is built without that and runs on every device. A cell of either backend loads the weights of the other, which
have another layout: see `checkpoints`.

mLSTM cells accumulate k / sqrt(DH) in c and n, our operators accumulate k: q is therefore scaled up and k down, and the
states keep the package's convention. States are float32 between calls; the original's have the model's dtype.
`sLSTMCell.step` returns the state after the token; the original returns the one before, which ``compat`` repeats.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_xlstm_ops.patch.adapters import mlstm, slstm
from torch_xlstm_ops.patch.checkpoints import load_either
from torch_xlstm_ops.patch.replacements import Replacement
from torch_xlstm_ops.patch.upstream import mlstm_kernels, xlstm_stack
from torch_xlstm_ops.patch.upstream.flashrnn import every_state

MLSTM_STATE = tuple[Tensor, Tensor, Tensor]


def replacements(compat: bool) -> Sequence[Replacement]:
    """Return the replacements."""
    from xlstm.blocks.mlstm import cell as mlstm_cell
    from xlstm.blocks.slstm import cell as slstm_cell

    backends = (mlstm_cell.parallel_stabilized_simple, mlstm_cell.recurrent_step_stabilized_simple)
    mlstms, slstms = mlstm_cell.mLSTMCell, slstm_cell.sLSTMCellBase
    sequence, step = "an mLSTM sequence is one op call", "an mLSTM step is one op call, its states stay float32"
    stepped = "the state is the one before the token, as in xlstm" if compat else "the state is the one after the token"
    found = [
        Replacement(mlstms, "forward", lambda original: _mlstm_forward(original, backends[0]), sequence,
                    ("self", "q", "k", "v", "kwargs")),
        Replacement(mlstms, "step", lambda original: _mlstm_step(original, backends[1], compat), step,
                    ("self", "q", "k", "v", "mlstm_state", "kwargs")),
        Replacement(slstms, "forward", functools.partial(_slstm_forward, compat=compat),
                    "an sLSTM sequence is one op call", ("self", "input", "state", "lengths")),
        Replacement(slstms, "step", functools.partial(_slstm_step, compat=compat), stepped,
                    ("self", "input", "state")),
        Replacement(slstms, "_load_from_state_dict", load_either, "the weights of either backend are loaded"),
        Replacement(slstm_cell, "sLSTMCellFuncGenerator", _function_generator, 'backend "cuda" needs no CUDA compiler',
                    ("training", "config")),
    ]
    found += xlstm_stack.replacements()
    if importlib.util.find_spec("mlstm_kernels") is not None:
        found += mlstm_kernels.replacements(compat)
    return found


def _mlstm_forward(original: Callable[..., Any], backend: object) -> Callable[..., Any]:
    """Return a `mLSTMCell.forward`; cells with another backend go to `original`."""

    def forward(self: Any, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Any:
        if self.backend_fn is not backend:
            return original(self, q, k, v, **kwargs)
        return _run_mlstm(self, q, k, v, None)[0]

    return forward


def _mlstm_step(original: Callable[..., Any], backend: object, compat: bool) -> Callable[..., Any]:
    def step(
        self: Any, q: Tensor, k: Tensor, v: Tensor, mlstm_state: MLSTM_STATE | None = None, **kwargs: Any
    ) -> Any:
        if self.backend_fn_step is not backend:
            return original(self, q, k, v, mlstm_state=mlstm_state, **kwargs)
        state = mlstm_state
        if state is not None and compat:
            state = (state[0].to(q.dtype), state[1].to(q.dtype), state[2].to(q.dtype))
        h, after = _run_mlstm(self, q, k, v, state)
        return h, tuple(t.to(q.dtype) for t in after) if compat else after

    return step


def _run_mlstm(cell: Any, q: Tensor, k: Tensor, v: Tensor, state: MLSTM_STATE | None) -> tuple[Tensor, MLSTM_STATE]:
    """Run a cell on q, k, v (B, S, NH DH) from a state c (B, NH, DH, DH), n (B, NH, DH, 1), m (B, NH, 1, 1)."""
    B, S, _ = q.shape
    gate_input = torch.cat([q, k, v], dim=-1)
    igate, fgate = cell.igate(gate_input).transpose(1, 2), cell.fgate(gate_input).transpose(1, 2)  # (B, NH, S)
    q, k, v = (torch.unflatten(t, -1, (cell.config.num_heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, NH, S, DH)
    scale = q.shape[-1] ** 0.5
    c, n, m = (None, None, None) if state is None else (state[0], state[1].squeeze(-1), state[2].squeeze(-1))
    h, after = mlstm(q * scale, k / scale, v, igate, fgate, c, n, m, eps=1e-6)
    out = cell.outnorm(h).transpose(1, 2).reshape(B, S, -1)
    return out, (after.c, after.n.unsqueeze(-1), after.m.unsqueeze(-1))


def _slstm_forward(original: Callable[..., Any], compat: bool) -> Callable[..., Any]:
    """Return a `sLSTMCellBase.forward`; other functions, and altered gradients, go to `original`."""

    def forward(self: Any, input: Tensor, state: Tensor | None = None, lengths: object = None) -> Any:
        if not _is_ours(self.config):
            return original(self, input, state, lengths)
        h, after = _run_slstm(self, input, state)
        out = _arranged(h, self.config.output_shape)
        if torch.is_autocast_enabled():
            return out, after
        return out.to(input.dtype), after.to(input.dtype) if compat else after

    return forward


def _slstm_step(original: Callable[..., Any], compat: bool) -> Callable[..., Any]:
    def step(self: Any, input: Tensor, state: Tensor | None) -> Any:
        if not _is_ours(self.config):
            return original(self, input, state)
        h, after = _run_slstm(self, input, state)
        return _arranged(h, self.config.output_shape), state if compat else after

    return step


def _is_ours(config: Any) -> bool:
    """Return whether a cell is an sLSTM with exact gradients; vanilla ignores the options that alter them."""
    altered = config.gradient_recurrent_cut or config.gradient_recurrent_clipval is not None
    return config.function == "slstm" and not (config.backend == "cuda" and altered)


def _run_slstm(cell: Any, input: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return h (B, S, NH, DH) and the states y, c, n, m (4, B, H) after it; `input` has the config's layout."""
    config = cell.config
    if input.shape[-1] != 4 * config.hidden_size:
        raise ValueError(f"input must have 4 * hidden_size = {4 * config.hidden_size} features, got {input.shape[-1]}")
    NH, DH = config.num_heads, config.head_dim
    x = torch.unflatten(input, -1, (4, NH, DH))
    if config.input_shape == "SBGNH":
        x = x.transpose(0, 1)
    r, b = cell._recurrent_kernel_, cell._bias_
    if config.backend == "vanilla":
        r, b = r.view(NH, 4, DH, DH).transpose(0, 1), b.view(4, NH, DH)
    else:
        x, r, b = _narrow(config, x), cuda_weights(r), b.view(NH, 4, DH).transpose(0, 1)
    before = None if state is None else torch.unflatten(state, -1, (NH, DH)).unbind(0)
    h, after = slstm(x, r, b, before)
    return h, torch.stack(after).flatten(2)


def cuda_weights(r: Tensor) -> Tensor:
    """Return r (4, NH, DH_out, DH_in) from the layout of the CUDA kernels, (NH, DH_in, 4 DH_out)."""
    return torch.unflatten(r, -1, (4, -1)).permute(2, 0, 3, 1)


def _narrow(config: Any, x: Tensor) -> Tensor:
    """Cast x to the compute dtype of the cuda backend."""
    mixed = config.enable_automatic_mixed_precision and x.dtype != torch.float64
    return x.to(config.torch_dtype_w) if mixed else x


def _arranged(h: Tensor, shape: str) -> Tensor:
    """Return h (B, S, NH, DH) in the layout of a config's output_shape."""
    if shape == "BNSH":
        return h.transpose(1, 2)
    if shape == "BSH":
        return h.flatten(2)
    return h.transpose(0, 1) if shape == "SBNH" else h.transpose(0, 1).flatten(2)


class Function:
    """Replaces the autograd function of a cuda cell, in the layouts of its kernels."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def apply(self, training: bool, input: Tensor, state: Tensor, r: Tensor, b: Tensor) -> Tensor:
        """Return y, c, n, m (4, S + 1, B, H), the given first, NaN for c, n, m of tokens before the last.

        input: (S, B, NH 4 DH); state: (4, B, H); r: (NH, DH_in, 4 DH_out); b: (NH 4 DH).
        """
        NH = self.config.num_heads
        x = _narrow(self.config, torch.unflatten(input, -1, (NH, 4, -1)).permute(1, 0, 3, 2, 4))
        before = torch.unflatten(state, -1, (NH, -1))
        h, after = slstm(x, cuda_weights(r), torch.unflatten(b, 0, (NH, 4, -1)).transpose(0, 1), before.unbind(0))
        return torch.cat([before[:, None].to(h.dtype), every_state(h, after)], 1).flatten(3)


def _function_generator(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `sLSTMCellFuncGenerator` that compiles no CUDA for an sLSTM."""

    def generate(training: bool, config: Any) -> Any:
        return Function(config) if _is_ours(config) else original(training, config)

    return generate
