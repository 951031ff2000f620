"""Functions of upstream packages on our operators, with the layouts of their tensors and results.

`t` has the tensors in the order of our operators, `given` all arguments by their upstream names. States are float32
(float64 for float64 inputs) unless an argument names a dtype. What an operator does not return is NaN: an sLSTM's c, n
and m before the last token, and its gates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_xlstm_ops.api import slstm_step
from torch_xlstm_ops.maths.shapes import state_dtype
from torch_xlstm_ops.patch.adapters import mlstm, mlstm_sigmoid, slstm
from torch_xlstm_ops.patch.upstream.flashrnn import FLOOR, every_state

Given = Mapping[str, Any]
NAN = float("nan")


def mlstm_sequence(t: Sequence[Any], given: Given) -> Any:
    """Run q, k, v (B, NH, S, D), gates and a state with the arguments of transformers and mlstm_kernels."""
    h, state = mlstm(*t, eps=given["eps"])
    return (h, tuple(_in(given.get("dtype_state"), state))) if given["return_last_states"] else h


def mlstm_token(t: Sequence[Any], given: Given) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run one token of `mlstm_sequence`; q, k, v (B, NH, D)."""
    q, k, v, *rest = t
    h, state = mlstm(q.unsqueeze(2), k.unsqueeze(2), v.unsqueeze(2), *rest, eps=given["eps"])
    return h.squeeze(2), tuple(_in(given["dtype_state"], state))


def mlstm_sigmoid_sequence(t: Sequence[Any], given: Given) -> Any:
    """Run a sequence with a sigmoid input gate with the arguments of mlstm_kernels."""
    h, state = mlstm_sigmoid(*t, normalize=given["normalize"], eps=given["eps"])
    return (h, tuple(state)) if given["return_last_states"] else h


def mlstm_sigmoid_inference(t: Sequence[Any], given: Given) -> Any:
    """Run what `mlstm_sigmoid_sequence` does where callers take a state c, n, m; m is zero."""
    h, (c, n) = mlstm_sigmoid(*t, normalize=given["normalize"], eps=given["eps"])
    state = _in(given.get("dtype_state"), (c, n, c.new_zeros((*n.shape[:2], 1))))
    return (h, tuple(state)) if given["return_last_states"] else h


def xlstm_parallel(t: Sequence[Any], given: Given) -> Tensor:
    """Run q, k, v (B, NH, S, DH) and gates (B, NH, S, 1) the layouts of xlstm's blocks."""
    q, k, v, igate, fgate = t
    return mlstm(q, k, v, igate.squeeze(-1), fgate.squeeze(-1), None, None, None, eps=given["eps"])[0]


def xlstm_token(t: Sequence[Any], given: Given) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run one token of `xlstm_parallel`; c and n (B, NH, DH, 1) accumulate k / sqrt(DH), m is (B, NH, 1, 1)."""
    q, k, v, igate, fgate, c, n, m = t
    scale = q.shape[-1] ** 0.5
    gates, state = (igate.squeeze(-1), fgate.squeeze(-1)), (c, n.squeeze(-1), m.squeeze(-1))
    h, after = mlstm(q * scale, k / scale, v, *gates, *state, eps=given["eps"])
    c_after, n_after, m_after = _in(c.dtype, after)
    return h, (c_after, n_after.unsqueeze(-1), m_after.unsqueeze(-1))


def xlstm_slstm(t: Sequence[Any], given: Given) -> tuple[Tensor, Tensor, Tensor]:
    """Run x (S, B, 4 H) from states (4, B, H) by r (NH, 4 DH, DH) and b (4 H), the layouts of xlstm's vanilla cell.

    Returns the states (4, S + 1, B, H), the given one first; the last one; and the gates (S + 1, 4, B, H).
    """
    x, r, b, states = t
    h, after = slstm(*_xlstm_cell(x, r, b, states))
    every = torch.cat([states[:, None].to(x.dtype), every_state(h, after).flatten(3)], 1)
    return every, torch.stack(after).flatten(2).to(states.dtype), x.new_full((len(x) + 1, 4, *states.shape[1:]), NAN)


def xlstm_slstm_token(t: Sequence[Any], given: Given) -> tuple[Tensor, Tensor]:
    """Run the first token of x (1, B, 4 H); return the states (4, 1, B, H), and the gates (2, 1, 4, B, H)."""
    x, r, b, states = t
    streams, *weights, cells = _xlstm_cell(x, r, b, states)
    after = slstm_step(streams[:, 0], *weights, *[s.to(state_dtype(x.dtype)) for s in cells])
    found = torch.stack(after).flatten(2).to(states.dtype)
    return found[:, None], x.new_full((2, 1, 4, *states.shape[1:]), NAN)


def _xlstm_cell(x: Tensor, r: Tensor, b: Tensor, states: Tensor) -> tuple[Tensor, Tensor, Tensor, Sequence[Tensor]]:
    """Return x (B, S, 4, NH, DH), r (4, NH, DH, DH), b (4, NH, DH) and the states y, c, n, m (B, NH, DH)."""
    heads = (r.shape[0], r.shape[2])
    return (
        torch.unflatten(x, -1, (4, *heads)).transpose(0, 1), torch.unflatten(r, 1, (4, heads[1])).transpose(0, 1),
        torch.unflatten(b, 0, (4, *heads)), torch.unflatten(states, -1, heads).unbind(0),
    )


def flashrnn(t: Sequence[Any], given: Given) -> tuple[Tensor, Tensor]:
    """Run x (S, B, 4, NH, DH) from states (1, B, 4, NH, DH) by r (NH, DH_in, 4, DH_out) and b (4, NH, DH).

    Returns the states (S, B, 4, NH, DH), and the last of them (1, B, 4, NH, DH).
    """
    x, r, b, states = t
    h, after = slstm(x.transpose(0, 1), r.permute(2, 0, 3, 1), b, states[0].unbind(1), floor=FLOOR)
    return every_state(h, after).permute(1, 2, 0, 3, 4), torch.stack(after, 1)[None].to(states.dtype)


def _in(dtype: torch.dtype | None, state: Sequence[Tensor]) -> Sequence[Tensor]:
    return state if dtype is None else [s.to(dtype) for s in state]
