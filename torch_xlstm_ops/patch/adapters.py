"""Call our operators for upstream packages: any sequence length, states of any dtype and device, one call each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_xlstm_ops.api import mlstm_chunkwise, mlstm_sigmoid_chunkwise, mlstm_step, slstm_sequence
from torch_xlstm_ops.maths.shapes import MLSTMState, SLSTMState, state_dtype
from torch_xlstm_ops.maths.sigmoid_gate import SigmoidState
from torch_xlstm_ops.patch.tokens import Marked, unmarked


def mlstm(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor,
    c: Tensor | None, n: Tensor | None, m: Tensor | Marked | None, *, eps: float, schedule: str | None = None,
) -> tuple[Tensor, MLSTMState]:
    """Run an mLSTM on a sequence (B, NH, S, D): the step for one token, else the chunkwise operator.

    c, n, m: states of any floating dtype on any device; a missing one is zero. m may be marked with the tokens.
    Returns h in v's dtype and new states in float32 (float64 for float64 inputs), whatever the given ones were.
    """
    B, NH, S, DHQK = q.shape
    wide = state_dtype(q.dtype)
    m, tokens = unmarked(m, q.device)
    igate, fgate = tokens.gates(igate, fgate)
    step = S == 1 and tokens.reset is None
    if c is None and n is None and m is None and not step:
        return mlstm_chunkwise(q, k, v, igate, fgate, reset=tokens.reset, eps=eps, schedule=schedule)
    saved = requires_grad(q, k, v, igate, fgate, c, n, m)
    # Copy for autograd, because packages overwrite the state that they passed once they have the new one.
    c = q.new_zeros((B, NH, DHQK, v.shape[-1]), dtype=wide) if c is None else c.to(q.device, wide, copy=saved)
    n = q.new_zeros((B, NH, DHQK), dtype=wide) if n is None else n.to(q.device, wide, copy=saved)
    m = q.new_zeros((B, NH, 1), dtype=wide) if m is None else m.to(q.device, wide, copy=saved)
    if not step:
        return mlstm_chunkwise(q, k, v, igate, fgate, c, n, m, reset=tokens.reset, eps=eps, schedule=schedule)
    h, state = mlstm_step(q.squeeze(2), k.squeeze(2), v.squeeze(2), igate, fgate, c, n, m, eps=eps)
    return h.unsqueeze(2), state


def mlstm_sigmoid(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, c: Tensor | None, n: Tensor | None,
    m: Tensor | Marked | None, *, normalize: bool, eps: float,
) -> tuple[Tensor, SigmoidState]:
    """Run an mLSTM with a sigmoid input gate on a sequence (B, NH, S, D).

    c, n: states of any floating dtype on any device, or None; m, which such an mLSTM has not, may be marked with the
    tokens. Returns h in v's dtype and new states in float32 (float64 for float64 inputs).
    """
    tokens = unmarked(m, q.device)[1]
    igate, fgate = tokens.gates(igate, fgate)
    saved = requires_grad(q, k, v, igate, fgate, c, n)
    c, n = (None if t is None else t.to(q.device, state_dtype(q.dtype), copy=saved) for t in (c, n))
    return mlstm_sigmoid_chunkwise(q, k, v, igate, fgate, c, n, normalize=normalize, reset=tokens.reset, eps=eps)


def slstm(
    x: Tensor, r: Tensor, b: Tensor, states: Sequence[Tensor] | None, *, floor: float = 0.0
) -> tuple[Tensor, SLSTMState]:
    """Run an sLSTM on a sequence x (B, S, 4, NH, DH); r (4, NH, DH, DH) [gate, head, out, in] is cast to x's dtype.

    states: y, c, n, m (B, NH, DH) of any floating dtype, or None for zeros.
    Returns h (B, S, NH, DH) in x's dtype and new states in float32 (float64 for float64 inputs).
    """
    if states is None:
        return slstm_sequence(x, r.to(x.dtype), b, floor=floor)
    saved = requires_grad(x, r, b, *states)
    y, c, n, m = (state.to(x.device, state_dtype(x.dtype), copy=saved) for state in states)
    return slstm_sequence(x, r.to(x.dtype), b, y, c, n, m, floor=floor)


def returns_states(asked: bool | None, mode: str | None, *, mode_default: str, states_default: bool) -> bool:
    """Return whether an upstream backend returns (h, states) or only h; inference always returns both.

    Raises ValueError for an unknown mode, and for states after padding, as upstream does.
    """
    mode = mode_default if mode is None else mode
    if "train" in mode:
        wanted = states_default if asked is None else asked
        if wanted and mode_default == "train_with_padding":
            raise ValueError("return_last_states must be False in mode train_with_padding, got True")
        return wanted
    if "inference" in mode:
        return True
    raise ValueError(f"mode must be train, train_with_padding or inference, got {mode!r}")


def requires_grad(*tensors: Tensor | None) -> bool:
    """Return whether autograd records a call with these arguments."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
