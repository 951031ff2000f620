"""The operators as pure functions of ATen calls: no schedule, no compiler, no host read, no data-dependent shape.

Slower than the operators, and right under everything that looks inside a computation: forward mode, transforms of
torch.func, derivatives of any order, exporters that know ATen alone. The mLSTM has no loop over tokens; the sLSTM has
one. Arguments and results are those of the operators.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_xlstm_ops.maths import mlstm, packing, slstm
from torch_xlstm_ops.maths.shapes import EPS, state_dtype

Results = tuple[Tensor, ...]
CHUNK = 64  # tokens a chunk
CHUNKS = 64  # chunks a segment; their weights are (CHUNKS, CHUNKS) a head
_INF = float("inf")


def mlstm_step(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, c: Tensor, n: Tensor, m: Tensor, *, eps: float = EPS
) -> Results:
    """Advance an mLSTM by one token; arguments as of the operator `mlstm_step`."""
    return mlstm.step(q, k, v, igate, fgate, c, n, m, eps=eps)


def mlstm_step_(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, c: Tensor, n: Tensor, m: Tensor, *, eps: float = EPS
) -> Tensor:
    """Advance an mLSTM by one token, find the new state, and copy it over the old."""
    h, *new = mlstm.step(q, k, v, igate, fgate, c, n, m, eps=eps)
    for state, value in zip((c, n, m), new, strict=True):
        state.copy_(value)
    return h


def mlstm_chunkwise(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor,
    c: Tensor | None = None, n: Tensor | None = None, m: Tensor | None = None, reset: Tensor | None = None,
    *, chunk_size: int | None = None, schedule: str | None = None, eps: float = EPS, chunks: int = CHUNKS,
) -> Results:
    """Run an mLSTM over a sequence in segments of at most `chunks` chunks; the other arguments as of the operator.

    A length that a tracer left symbolic is one segment, so that nothing depends on its value. schedule: ignored.
    """
    if reset is not None:
        run = functools.partial(mlstm_chunkwise, chunk_size=chunk_size, eps=eps, chunks=chunks)
        h, *after = packing.forward(run, reset, (q, k, v, igate, fgate), (c, n, m), static=True)
        return h.clone(), *after
    (B, NH, S, _), L = q.shape, chunk_size or CHUNK
    if isinstance(S, int):
        L = max(1, min(L, S))
    given = _mlstm_state(q, v) if c is None or n is None or m is None else (c, n, m)
    streams, state = [t.flatten(0, 1) for t in (q, k, v, igate, fgate)], [t.flatten(0, 1) for t in given]
    if isinstance(S, int):
        longest, parts = chunks * L, []
        for start in range(0, S, longest):
            part, *state = _segment([t[:, start:start + longest] for t in streams], state, L, eps)
            parts.append(part)
        h = torch.cat(parts, 1) if parts else streams[2]
    else:
        h, *state = _segment(streams, state, L, eps)
    results = [torch.unflatten(t, 0, (B, NH)) for t in (h, *state)]
    return tuple(results if S != 0 else [t.clone() for t in results])


def _segment(streams: Sequence[Tensor], state: Sequence[Tensor], L: int, eps: float) -> Results:
    """Run streams (G, S, ...) as one segment of chunks of L tokens; return h (G, S, DHHV) and the state after it."""
    q, k, v, igate, fgate = streams
    c, n, m = state
    S = q.shape[1]
    NC = (S + L - 1) // L
    if not isinstance(S, int):
        NC = NC + 1  # torch would record that a symbolic number of chunks is not 1: let it be 2 at least
    tail = NC * L - S
    q, k, v = (torch.unflatten(F.pad(t, (0, 0, 0, tail)), 1, (NC, L)) for t in (q, k, v))
    igate, fgate = (
        torch.unflatten(F.pad(t, (0, tail), value=fill), 1, (NC, L)) for t, fill in ((igate, -_INF), (fgate, _INF))
    )
    h, *after = mlstm.segment(q, k, v, igate, fgate, c, n, m, eps=eps)
    return h.flatten(1, 2)[:, :S], *after


def slstm_step(
    x: Tensor, r: Tensor, b: Tensor, y: Tensor, c: Tensor, n: Tensor, m: Tensor, *, floor: float = 0.0
) -> Results:
    """Advance an sLSTM by one token; arguments as of the operator `slstm_step`."""
    return slstm.step(x, r, b, y, c, n, m, floor=floor, product=slstm.Product.FUSED)


def slstm_sequence(
    x: Tensor, r: Tensor, b: Tensor, y: Tensor | None = None, c: Tensor | None = None, n: Tensor | None = None,
    m: Tensor | None = None, reset: Tensor | None = None, *, floor: float = 0.0,
    schedule: str | None = None,
) -> Results:
    """Run an sLSTM over a sequence, step by step; arguments as of the operator `slstm_sequence`. schedule: ignored."""
    y, c, n, m = state = _slstm_state(x, (y, c, n, m))
    h, *after = slstm.recurrent(x, r, b, y, c, n, m, reset, floor=floor)
    return h, *[t.clone() if any(t is s for s in state) else t for t in after]


def mlstm_chunkwise_backward(
    dh: Tensor, dc: Tensor, dn: Tensor, dm: Tensor,
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor,
    c: Tensor | None = None, n: Tensor | None = None, m: Tensor | None = None, reset: Tensor | None = None,
    *, chunk_size: int | None = None, schedule: str | None = None, eps: float = EPS,
) -> Results:
    """Return the gradients of `mlstm_chunkwise`, themselves differentiable; arguments as of the operator."""
    state = _mlstm_state(q, v) if c is None or n is None or m is None else (c, n, m)

    def forward(
        q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, c: Tensor, n: Tensor, m: Tensor
    ) -> Results:
        return mlstm_chunkwise(q, k, v, igate, fgate, c, n, m, reset, chunk_size=chunk_size, eps=eps)

    return _gradients(forward, (q, k, v, igate, fgate, *state), (dh, dc, dn, dm))


def slstm_sequence_backward(
    dh: Tensor, dy: Tensor, dc: Tensor, dn: Tensor, dm: Tensor, x: Tensor, r: Tensor, b: Tensor,
    y: Tensor | None, c: Tensor | None, n: Tensor | None, m: Tensor | None, h: Tensor, reset: Tensor | None = None,
    *, floor: float = 0.0, schedule: str | None = None,
) -> Results:
    """Return the gradients of `slstm_sequence`, themselves differentiable; arguments as of the operator.

    h is what the operator's gradient saves computing; here it is not read.
    """
    def forward(x: Tensor, r: Tensor, b: Tensor, y: Tensor, c: Tensor, n: Tensor, m: Tensor) -> Results:
        return slstm_sequence(x, r, b, y, c, n, m, reset, floor=floor)

    return _gradients(forward, (x, r, b, *_slstm_state(x, (y, c, n, m))), (dh, dy, dc, dn, dm))


def _gradients(forward: Callable[..., Results], inputs: Sequence[Tensor], given: Sequence[Tensor]) -> Results:
    with torch.enable_grad():
        found: Results = torch.func.vjp(forward, *inputs)[1](tuple(given))
    return found


def _mlstm_state(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the state c, n, m before the first token: zeros."""
    (B, NH, _, DHQK), wide = q.shape, state_dtype(q.dtype)
    return (
        q.new_zeros((B, NH, DHQK, v.shape[-1]), dtype=wide), q.new_zeros((B, NH, DHQK), dtype=wide),
        q.new_zeros((B, NH, 1), dtype=wide),
    )


def _slstm_state(x: Tensor, state: Sequence[Tensor | None]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the state y, c, n, m before the first token: as given, or zeros."""
    B, _, _, NH, DH = x.shape
    zeros = functools.partial(x.new_zeros, (B, NH, DH), dtype=state_dtype(x.dtype))
    y, c, n, m = (zeros() if t is None else t for t in state)
    return y, c, n, m
