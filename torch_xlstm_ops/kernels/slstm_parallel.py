"""The compiled functions of a round of the sLSTM parallel in time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops.kernels.slstm import product_dtype
from torch_xlstm_ops.maths.products import sum_over_terms
from torch_xlstm_ops.maths.shapes import state_dtype
from torch_xlstm_ops.maths.slstm.cell import bmm_in_dtype
from torch_xlstm_ops.maths.slstm.parallel import backward, backward_scan, forward, scan
from torch_xlstm_ops.maths.slstm.parallel.axes import axes
from torch_xlstm_ops.maths.slstm.parallel.certificate import judge, movement
from torch_xlstm_ops.runtime import compiler

Call = Callable[[list[Tensor]], Sequence[Tensor]]
Caller = Callable[..., Call]  # from a function and its keywords

# Of the estimated error of a chunk, relative to its row and head: a rounding or two of y in its dtype. Below NOISE a
# change of y is its rounding.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 4e-6, torch.bfloat16: 2.5e-3, torch.float16: 3e-4}
UNIT = 0.72  # of a rounding step relative to what is rounded, on the average
NOISE = {torch.float64: 5e-13, torch.float32: 3e-7, torch.bfloat16: 1.0e-3, torch.float16: 1.3e-4}
_SUMS = (movement, judge)  # the only functions that are not elementwise
GROUP = 16  # chunks that one thread walks over
WALKING = {"mps"}  # where `emit` walks over summaries by itself, which saves launches


class Kernels(NamedTuple):
    """The functions of a round; arguments as in the maths, a mask last where there is one."""

    products: Callable[[Tensor, Tensor, bool], Tensor]  # h, r, whether an early round
    summarize: Call
    group: Call
    across: Call
    walking: bool  # whether `emit` and `settle` are `emit_across` and `settle_across`
    emit: Call
    settle: Call
    movement: Call
    judge: Call
    record: Call
    operand_gradients: Callable[[Tensor, Tensor, bool], Tensor]
    summarize_back: Call
    group_back: Call
    across_back: Call
    emit_back: Call
    enter: Call
    leave: Call
    weight_gradients: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def compile_call(fn: compiler.PureFunction, **static: Any) -> Call:
    """Return what calls `fn` compiled for the arguments that it is given."""
    def call(args: list[Tensor]) -> Sequence[Tensor]:
        return compiler.get(fn, axes(fn, args), args, unrolled=fn not in _SUMS, **static)(args)

    return call


def ready_call(fn: compiler.PureFunction, **static: Any) -> Call:
    """Return what calls `fn` as `compile_call` does, or raises `compiler.NotReady` where that would compile it."""
    return compile_call(fn, only_ready=True, **static)


def kernels(x: Tensor, masked: bool, floor: float, tolerance: float, caller: Caller = compile_call) -> Kernels:
    """Return the functions of a round for tensors like x."""
    wide = state_dtype(x.dtype)
    narrow = x.dtype if x.device.type == "cuda" else wide  # only CUDA accumulates a narrow product in a wide dtype

    def products(h: Tensor, r: Tensor, early: bool) -> Tensor:
        return forward.products(h, r, narrow if early else wide)

    def operand_gradients(dgates: Tensor, r: Tensor, early: bool) -> Tensor:
        return backward.operand_gradients(dgates, r, narrow if early else wide)

    walking = x.device.type in WALKING
    # Only Metal rounds by a cast there and back; elsewhere h is rounded because it is stored.
    dtype = product_dtype(x) if x.device.type == "mps" else x.dtype
    if walking:
        emit = caller(forward.emit_across, floor=floor, most=GROUP, dtype=dtype)
        settle = caller(forward.settle_across, floor=floor, most=GROUP, dtype=dtype)
    else:
        emit, settle = (caller(fn, floor=floor, dtype=dtype) for fn in (forward.emit, forward.settle))
    return Kernels(
        products=products, operand_gradients=operand_gradients,
        summarize=caller(forward.summarize, floor=floor), group=caller(scan.group, floor=floor),
        across=caller(scan.across, floor=floor), walking=walking, emit=emit, settle=settle,
        movement=caller(movement),
        judge=caller(
            judge, unit=UNIT * torch.finfo(x.dtype).eps, noise=tolerance * NOISE[x.dtype] / TOLERANCE[x.dtype],
            tolerance=tolerance,
        ),
        record=caller(backward.record, floor=floor),
        summarize_back=caller(backward_scan.summarize_back, floor=floor),
        group_back=caller(backward_scan.group_back, floor=floor, masked=masked),
        across_back=caller(backward_scan.across_back, floor=floor, masked=masked),
        emit_back=caller(backward.emit_back, floor=floor, dtype=x.dtype),
        enter=caller(backward.enter, masked=masked), leave=caller(backward.leave, masked=masked),
        weight_gradients=weight_gradients,
    )


def weight_gradients(dgates: Tensor, h_before: Tensor) -> tuple[Tensor, Tensor]:
    """Return dr (4, NH, DH, DH) and db (4, NH, DH), sums over all tokens.

    dgates: (G, T, NH, 4, DH); h_before: what R was multiplied with, (G, T, NH, DH).
    """
    G, T, NH, _, DH = dgates.shape
    left, right = dgates.view(G * T, NH, 4 * DH).permute(1, 2, 0), h_before.reshape(G * T, NH, DH).transpose(0, 1)
    dr = sum_over_terms(left, right).view(NH, 4, DH, DH).transpose(0, 1)
    if dgates.device.type == "cuda":  # where a product is faster than a sum over the first axes
        ones, rows = dgates.new_ones(1, 1, G * T), dgates.view(1, G * T, NH * 4 * DH)
        db = bmm_in_dtype(ones, rows, state_dtype(dgates.dtype)).view(NH, 4, DH)
    else:
        db = dgates.sum((0, 1), dtype=state_dtype(dgates.dtype))
    return dr, db.transpose(0, 1)
