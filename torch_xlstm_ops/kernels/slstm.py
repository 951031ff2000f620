"""The compiled functions of the sLSTM's sequence operators, and what suits each kind of device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops.kernels.threads import step_threads
from torch_xlstm_ops.maths import slstm
from torch_xlstm_ops.maths.shapes import state_dtype
from torch_xlstm_ops.maths.slstm import Product
from torch_xlstm_ops.runtime import compiler

Run = Callable[[list[Tensor]], object]
Lookup = Callable[[list[Tensor]], Run]  # from the arguments of a block to what runs such blocks


class Lengths(NamedTuple):
    """Steps a block, by the kernel that runs it."""

    block: int
    replay: int
    backward: int


class Kernels(NamedTuple):
    """The functions of the op, those in blocks by a look-up; their arguments as in `slstm`, (written) and optional?."""

    lengths: Lengths
    block: Lookup  # x r b h_before c n m (h y c_after n_after m_after) reset?
    activate: Run  # x products b (log_f igate z o not_f), of all tokens at once
    replay: Lookup  # log_f igate (which become keep add) z c_before n_before (m c n) reset?
    backward: Lookup  # dh keep add z o not_f c_before n_before c n r (gradients after) (gradients before) reset?
    products: Callable[[Tensor, Tensor], Tensor]
    operand_gradient: Callable[[Sequence[Tensor], Tensor], Tensor]
    weight_gradients: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class DeviceDefaults(NamedTuple):
    """What suits a kind of device: on the CPU found by measurement, elsewhere by counting launches."""

    lengths: Lengths
    piece: int  # tokens laid out at once, and recorded as one graph
    fused_bytes: int  # most bytes of R that the rows of a step may read for sums to beat a matrix product


DEFAULTS = {
    # Blocks of eight steps save the CPU an eighth of a forward pass (5.0 to 4.4 ms for 256 steps) and cost four times
    # the compilation (2.4 to 8.7 s), and a tail another.
    "cpu": DeviceDefaults(Lengths(block=1, replay=1, backward=1), piece=128, fused_bytes=0),
    # In a graph a step is one kernel, however long the block.
    "cuda": DeviceDefaults(Lengths(block=1, replay=1, backward=1), piece=1024, fused_bytes=32 << 20),
    "mps": DeviceDefaults(Lengths(block=4, replay=1, backward=1), piece=1024, fused_bytes=32 << 20),
}


def kernels(x: Tensor, product: Product, masked: bool, floor: float) -> Kernels:
    """Return the functions of a call. masked: whether it has resets."""
    def lookup(fn: compiler.PureFunction, **static: Any) -> Lookup:
        axes = slstm.axes(fn, product, masked)
        return lambda args: compiler.get(fn, axes, args, threads=threads, floor=floor, **static)

    def activate(args: list[Tensor]) -> object:
        fn = slstm.activate_
        return compiler.get(fn, slstm.axes(fn, product, False), args)(args)

    wide, threads = state_dtype(x.dtype), step_threads(x[:, 0, 0].numel())
    return Kernels(
        lengths=DEFAULTS[x.device.type].lengths, block=lookup(slstm.block_, product=product),
        activate=activate, replay=lookup(slstm.replay_), backward=lookup(slstm.block_backward_, product=product),
        products=slstm.recurrent_products, weight_gradients=slstm.weight_gradients,
        operand_gradient=lambda gates, r: slstm.operand_gradient(gates, r, wide, product),
    )


def product_of(x: Tensor, r: Tensor) -> Product:
    """Return how blocks multiply by R."""
    read = x.shape[0] * r.numel() * r.element_size()
    return Product.FUSED if read <= DEFAULTS[x.device.type].fused_bytes else Product.MATMUL


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which matrix products read R: only CUDA accumulates a narrow product in a wide dtype."""
    return x.dtype if x.device.type == "cuda" else state_dtype(x.dtype)


def block_dtype(x: Tensor, product: Product) -> torch.dtype:
    """Return the dtype in which blocks read R; the meta function of CUDA's wide product fails on symbolic sizes."""
    return x.dtype if product is Product.FUSED else state_dtype(x.dtype)
