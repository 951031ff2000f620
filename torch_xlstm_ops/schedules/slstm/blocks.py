"""An sLSTM sequence as blocks of steps, forward and backward.

Time is the first axis, (S, B, ...), so that a block is contiguous. A block writes its results into preallocated
arguments: nothing is allocated or copied between blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_xlstm_ops.kernels.slstm import Kernels, Lookup, Run


def forward(
    kernels: Kernels, x: Tensor, r: Tensor, b: Tensor, y: Tensor, c: Tensor, n: Tensor, m: Tensor,
    reset: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Return h (S, B, NH, DH) and the state y, c, n, m after x (S, B, 4, NH, DH), S > 0; reset: (S, B)."""
    h, last_y = x.new_empty(x[:, :, 0].shape), torch.empty_like(y)
    lengths = _lengths(x.shape[0], kernels.lengths.block)
    h_blocks = torch.split(h, lengths)
    h_before = [y.to(x.dtype), *(block[-1] for block in h_blocks[:-1])]
    states = _alternate((c, n, m), len(lengths))
    streams = zip(torch.split(x, lengths), h_before, states, h_blocks, states[1:], _masks(reset, lengths), strict=False)
    _run_all(kernels.block, (
        [x_block, r, b, before, *state, h_block, last_y, *after, *mask]
        for x_block, before, state, h_block, after, mask in streams
    ))
    return h, last_y, *states[-1]


def backward(
    kernels: Kernels, gradients: Sequence[Tensor], x: Tensor, h_before: Tensor, r: Tensor, r_dense: Tensor, b: Tensor,
    c: Tensor, n: Tensor, m: Tensor, reset: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Return the gradients of the gates (4, S, B, NH, DH) and dr, db, dy, dc, dn, dm; S > 0.

    gradients: dh (S, B, NH, DH), wide, and dy, dc, dn, dm after the last token. c, n, m: the state at the start.
    h_before: (S, B, NH, DH), what R was multiplied with.
    r: laid out for the block; r_dense: (4, NH, DH, DH), for the product over all tokens.
    """
    dh, dy, dc, dn, dm = gradients
    S = x.shape[0]
    operands = h_before.flatten(0, 1)
    factors = keep, add, z, _, _ = c.new_empty(5, S, *c.shape).unbind(0)
    c_all, n_all = (torch.cat([s[None], s.new_empty(S, *s.shape)]) for s in (c, n))
    kernels.activate([x.flatten(0, 1), kernels.products(operands, r_dense), b, *(t.flatten(0, 1) for t in factors)])
    _replay(kernels, keep, add, z, c_all, n_all, m.clone(), reset)

    dgates = x.new_empty(4, S, *c.shape)
    dh = torch.cat([dh[:-1], dh[-1:] + dy])
    lengths = _lengths(S, kernels.lengths.backward)
    dstates = _alternate((dc, dn, dm), len(lengths))
    found = [*zip(*[torch.split(gate, lengths) for gate in dgates.unbind(0)], strict=True)]
    gates_after = [*([block[0] for block in blocks] for blocks in found[1:]), [torch.zeros_like(x[0, :, 0])] * 4]
    streams = [torch.split(t, lengths) for t in (dh, *factors, c_all[:-1], n_all[:-1], c_all[1:], n_all[1:])]
    blocks = [*zip(zip(*streams, strict=True), gates_after, found, _masks(reset, lengths, 1), strict=True)]
    _run_all(kernels.backward, (
        [*parts, r, *gates, *dstate, *found, *before, *mask]
        for (parts, gates, found, mask), dstate, before in zip(reversed(blocks), dstates, dstates[1:], strict=False)
    ))
    dy = kernels.operand_gradient(dgates[:, 0].unbind(0), r).contiguous()
    if reset is not None:
        dy = torch.where(reset[0, :, None, None], 0.0, dy)
        # Tokens whose gradient is 0 add nothing to those of R, though what R was multiplied with may be NaN.
        idle = (dgates == 0).all(0).all(-1, keepdim=True)
        operands = torch.where(idle.flatten(0, 1), 0.0, operands)
    return dgates, *kernels.weight_gradients(dgates.flatten(1, 2), operands), dy, *dstates[-1]


def _replay(
    kernels: Kernels, keep: Tensor, add: Tensor, z: Tensor, c: Tensor, n: Tensor, m: Tensor, reset: Tensor | None
) -> None:
    """Turn log_f and igate into keep and add, and fill c, n (S + 1, B, NH, DH) after their first entries."""
    lengths = _lengths(z.shape[0], kernels.lengths.replay)
    before = [[block[0] for block in torch.split(t[:-1], lengths)] for t in (c, n)]
    factors, states = ([torch.split(t, lengths) for t in both] for both in ((keep, add, z), (c[1:], n[1:])))
    _run_all(kernels.replay, (
        [*parts, c_before, n_before, m, *after, *mask]
        for parts, c_before, n_before, after, mask
        in zip(zip(*factors, strict=True), *before, zip(*states, strict=True), _masks(reset, lengths), strict=True)
    ))


def _alternate(first: Sequence[Tensor], blocks: int) -> list[Sequence[Tensor]]:
    """Return the tensors that hold a state before the first block and after each: `first`, then two sets in turn."""
    sets = [[torch.empty_like(t) for t in first] for _ in range(2)]
    return [first, *(sets[block % 2] for block in range(blocks))]


def _lengths(S: int, T: int) -> list[int]:
    """Cut S steps into as many blocks of T as fit and then single steps, so that every S needs two compiles at most."""
    return [T] * (S // T) + [1] * (S % T)


def _masks(reset: Tensor | None, lengths: list[int], beyond: int = 0) -> list[tuple[Tensor, ...]]:
    """Return the reset mask of each block, over `beyond` more tokens than the block has, as optional arguments."""
    if reset is None:
        return [()] * len(lengths)
    padded = F.pad(reset, (0, 0, 0, beyond))
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return [(padded[start:start + length + beyond],) for start, length in zip(starts, lengths, strict=False)]


def _run_all(lookup: Lookup, blocks: Iterable[list[Tensor]]) -> None:
    """Run blocks in order, with one look-up for each length."""
    by_length: dict[int, Run] = {}
    for args in blocks:
        length = args[0].shape[0]
        run = by_length.get(length)
        if run is None:
            run = by_length[length] = lookup(args)
        run(args)
