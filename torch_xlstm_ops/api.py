"""The documented Python API: named results around the operators, which check their arguments."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from torch_xlstm_ops.maths import documents, sigmoid_gate
from torch_xlstm_ops.maths.shapes import EPS, MLSTMState, SLSTMState, state_dtype
from torch_xlstm_ops.maths.sigmoid_gate import SigmoidState


def mlstm_chunkwise(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor,
    c: Tensor | None = None, n: Tensor | None = None, m: Tensor | None = None,
    *, reset: Tensor | None = None, cu_seqlens: Tensor | None = None, chunk_size: int | None = None,
    schedule: str | None = None, eps: float = EPS,
) -> tuple[Tensor, MLSTMState]:
    """Run an mLSTM over a sequence, by matrix products over chunks and segments; differentiable.

        m' = max(log_f + m, igate)          log_f = logsigmoid(fgate)
        c' = exp(log_f + m - m') c + exp(igate - m') k v^T          n' likewise with k
        h  = (q DHQK^-1/2 . c') / (max(|q DHQK^-1/2 . n'|, exp(-m')) + eps)

    q, k: (B, NH, S, DHQK), any S from 0 up; float32, float16, bfloat16, or float64.
    v: (B, NH, S, DHHV), of q's dtype.
    igate, fgate: (B, NH, S), pre-activations, of any floating dtype; computed in float32.
    c, n, m: the state before the first token, (B, NH, DHQK, DHHV), (B, NH, DHQK), (B, NH, 1), float32 (float64 for
        float64 inputs); all or none, default zeros.
    reset: (B, S), bool, true at the first token of each packed document, which the state before it does not reach;
        default nowhere. Copies the streams, with one more token for each reset, and synchronises to count them.
    cu_seqlens: (documents + 1,), integers, a 0 and then the end of each document of one row (B = 1); default none. Each
        document then has its own initial and final state: the first dimension of states is documents, not B.
        Synchronises with the device.
    chunk_size: tokens a chunk, default chosen by device; changes speed and rounding, never the result.
    schedule: auto, inductor, queued, ray or recurrent; default the configured one.
    eps: added to the denominator, default 1e-6.

    Returns h (B, NH, S, DHHV) in v's dtype, and the state after the last token.
    Raises ValueError for shapes, devices and values, TypeError for dtypes, NotImplementedError for a schedule that
    cannot run here.
    Source: Beck et al. 2024, "xLSTM: Extended Long Short-Term Memory", eq. 19 to 27, stabilised as in its appendix.
    """
    if cu_seqlens is not None:
        counts = _counts(cu_seqlens, q.shape[0], q.shape[2], reset)
        documents.check_states(len(counts), c=c, n=n, m=m)
        run = functools.partial(mlstm_chunkwise, chunk_size=chunk_size, schedule=schedule, eps=eps)
        h, found = documents.mlstm(run, counts, (q, k, v, igate, fgate), (c, n, m))
        return h, MLSTMState(*found)
    h, *state = torch.ops.xlstm.mlstm_chunkwise(
        q, k, v, igate, fgate, c, n, m, reset,
        chunk_size=chunk_size, schedule=None if schedule is None else str(schedule), eps=eps,
    )
    return h, MLSTMState(*state)


def mlstm_step(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, c: Tensor, n: Tensor, m: Tensor, *, eps: float = EPS
) -> tuple[Tensor, MLSTMState]:
    """Advance an mLSTM by one token; the recurrence is that of `mlstm_chunkwise`. Differentiable.

    q, k: (B, NH, DHQK); v: (B, NH, DHHV); igate, fgate: (B, NH, 1); dtypes as there.
    c, n, m: the state before the token, (B, NH, DHQK, DHHV), (B, NH, DHQK), (B, NH, 1).
    eps: added to the denominator, default 1e-6.

    Returns h (B, NH, DHHV) in v's dtype, and the state after the token.
    Raises ValueError for shapes, devices and values, TypeError for dtypes.
    """
    h, *state = torch.ops.xlstm.mlstm_step(q, k, v, igate, fgate, c, n, m, eps=eps)
    return h, MLSTMState(*state)


def mlstm_step_(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, c: Tensor, n: Tensor, m: Tensor, *, eps: float = EPS
) -> Tensor:
    """Advance an mLSTM by one token and write the new state over c, n, m; for inference.

    Arguments as of `mlstm_step`. Returns h (B, NH, DHHV).
    Raises as `mlstm_step`, and RuntimeError where autograd would record the call. torch.func.functionalize refuses it,
    as it does every operator outside ATen that writes to its arguments: use `mlstm_step` there.
    """
    return torch.ops.xlstm.mlstm_step_(q, k, v, igate, fgate, c, n, m, eps=eps)  # type: ignore[no-any-return]


def mlstm_sigmoid_chunkwise(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, c: Tensor | None = None, n: Tensor | None = None,
    *, normalize: bool = True, reset: Tensor | None = None, cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None, schedule: str | None = None, eps: float = EPS,
) -> tuple[Tensor, SigmoidState]:
    """Run an mLSTM with a sigmoid input gate over a sequence; differentiable.

        c' = sigmoid(fgate) c + sigmoid(igate) k v^T          n' likewise with k
        h  = (q DHQK^-1/2 . c') / (max(|q DHQK^-1/2 . n'|, 1) + eps)

    Arguments as of `mlstm_chunkwise`, without m: the state needs no stabiliser.
    normalize: whether h has the denominator, default true; n is returned in either case.

    Returns h (B, NH, S, DHHV) in v's dtype, and the state after the last token.
    Raises as `mlstm_chunkwise`.
    """
    run = functools.partial(mlstm_chunkwise, reset=reset, cu_seqlens=cu_seqlens, chunk_size=chunk_size,
                            schedule=schedule)
    return sigmoid_gate.through(run, (q, k, v, igate, fgate), c, n, normalize=normalize, eps=eps)


def mlstm_sigmoid_step(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, c: Tensor, n: Tensor, *, normalize: bool = True,
    eps: float = EPS,
) -> tuple[Tensor, SigmoidState]:
    """Advance an mLSTM with a sigmoid input gate by one token; differentiable.

    Arguments as of `mlstm_step`, without m, and `mlstm_sigmoid_chunkwise`. Returns h (B, NH, DHHV) and the state after
    the token. Raises as `mlstm_step`.
    """
    return sigmoid_gate.through(mlstm_step, (q, k, v, igate, fgate), c, n, normalize=normalize, eps=eps)


def slstm_sequence(
    x: Tensor, r: Tensor, b: Tensor, y: Tensor | None = None, c: Tensor | None = None, n: Tensor | None = None,
    m: Tensor | None = None, *, reset: Tensor | None = None, cu_seqlens: Tensor | None = None, floor: float = 0.0,
    schedule: str | None = None,
) -> tuple[Tensor, SLSTMState]:
    """Run an sLSTM over a sequence, step by step or parallel in time; differentiable.

        g  = x_t + R y + b, the gates i f z o          log_f = logsigmoid(f)
        m' = i where n == 0 else max(i, log_f + m)
        c' = exp(log_f + m - m') c + exp(i - m') tanh(z)          n' likewise with 1, at least floor
        y' = sigmoid(o) c' / n'

    x: (B, S, 4, NH, DH), the input's part of the gates, any S from 0 up; float32, float16, bfloat16, or float64.
    r: (4, NH, DH, DH) [gate, head, out, in], of x's dtype.
    b: (4, NH, DH), of any floating dtype.
    y, c, n, m: the state before the first token, (B, NH, DH), float32 (float64 for float64 inputs); all or none,
        default zeros. A cell is fresh where n is 0: m' then does not depend on m.
    reset: (B, S), bool, true at the first token of each packed document, which the state before it does not reach;
        default nowhere.
    cu_seqlens: as of `mlstm_chunkwise`; documents of one length are one call.
    floor: least n, default 0.0; FlashRNN's is 1.0.
    schedule: auto, sequential or parallel; default the configured one. parallel computes all tokens at once, in rounds
        that end when the result is the sequential one within the dtype's tolerance. auto is parallel on CUDA from 512
        tokens on, where the kernels for it are compiled already.

    Returns h (B, S, NH, DH) in x's dtype, and the state after the last token.
    Raises ValueError for shapes, devices and values, TypeError for dtypes, NotImplementedError for a schedule that
    cannot run here.
    Source: Beck et al. 2024, "xLSTM: Extended Long Short-Term Memory", eq. 8 to 18.
    """
    if cu_seqlens is not None:
        counts = _counts(cu_seqlens, x.shape[0], x.shape[1], reset)
        documents.check_states(len(counts), y=y, c=c, n=n, m=m)
        zeros = x.new_zeros((len(counts), *x.shape[3:]), dtype=state_dtype(x.dtype))
        before = [zeros if t is None else t for t in (y, c, n, m)]
        h, found = documents.slstm(lambda x, *s: slstm_sequence(x, r, b, *s, floor=floor, schedule=schedule), counts,
                                   x, before)
        return h, SLSTMState(*found)
    name = None if schedule is None else str(schedule)
    h, *state = torch.ops.xlstm.slstm_sequence(x, r, b, y, c, n, m, reset, floor=floor, schedule=name)
    return h, SLSTMState(*state)


def slstm_step(
    x: Tensor, r: Tensor, b: Tensor, y: Tensor, c: Tensor, n: Tensor, m: Tensor, *, floor: float = 0.0
) -> SLSTMState:
    """Advance an sLSTM by one token; the recurrence is that of `slstm_sequence`. Differentiable.

    x: (B, 4, NH, DH); r: (4, NH, DH, DH); b: (4, NH, DH); dtypes as there.
    y, c, n, m: the state before the token, (B, NH, DH).
    floor: least n, default 0.0.

    Returns the state after the token, whose y is the output, in float32 (float64 for float64 inputs).
    Raises ValueError for shapes, devices and values, TypeError for dtypes.
    """
    return SLSTMState(*torch.ops.xlstm.slstm_step(x, r, b, y, c, n, m, floor=floor))


def _counts(cu_seqlens: Tensor, B: int, S: int, reset: Tensor | None) -> list[int]:
    if reset is not None:
        raise ValueError("reset must be None where cu_seqlens is given, got both")
    return documents.lengths(cu_seqlens, B, S)
