"""What the tests of known bugs of MPS run: products at full size, without their kernels, and long sums with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_xlstm_ops import config
from torch_xlstm_ops.maths import mlstm, products, slstm

from . import emulator
from .instrument import relative_errors

PRODUCTS = {"bmm", "mm", "baddbmm", "baddbmm_", "addmm", "addmm_", "matmul", "linear", "_mps_linear", "mv", "dot"}


def full_size(op: str) -> dict[str, Any]:
    """Return the products of an op, forward and backward, and its host traffic; mLSTM shapes as xLSTM-7B's."""
    emulator.set_dry(True)
    with config.use(**({"segment": 128, "heads_per_band": 4} if op == "mlstm" else {})):
        run = {"mlstm": _mlstm, "slstm": _slstm}[op]()
        with emulator.recording() as log:
            run()
    return report(log)


def report(log: emulator.Log) -> dict[str, Any]:
    """Return each product's name, number of terms and whether it owns its result's memory, and the host traffic."""
    found = []
    for call in log.aten:
        if call.op in PRODUCTS:
            left = [t for t in call.tensors if not t.written and len(t.sizes) > 1][-2]
            own = all(t.offset == 0 and t.contiguous for t in call.tensors if t.written)
            found.append([call.name, left.sizes[-1], own])
    return {"products": found, "host": [c.name for c in log.aten if c.waits_for_device or c.reads_host]}


def _mlstm() -> Callable[[], object]:
    B, NH, S, DHQK, DHHV = 1, 8, 256, 256, 512
    shapes = [(B, NH, S, *d) for d in ((DHQK,), (DHQK,), (DHHV,), (), ())]
    shapes += [(B, NH, DHQK, DHHV), (B, NH, DHQK), (B, NH, 1)]
    args = [torch.zeros(shape).to("mps").requires_grad_() for shape in shapes]
    gradients = [torch.zeros(shape).to("mps") for shape in (shapes[2], *shapes[5:])]

    def run() -> object:
        return torch.autograd.grad(torch.ops.xlstm.mlstm_chunkwise(*args, chunk_size=64), args, gradients)

    return run


def _slstm() -> Callable[[], object]:
    B, S, NH, DH = 4100, 8, 1, 8
    shapes = [(B, S, 4, NH, DH), (4, NH, DH, DH), (4, NH, DH), *[(B, NH, DH)] * 4]
    args = [torch.zeros(shape).to("mps").requires_grad_() for shape in shapes]
    gradients = [torch.zeros(B, S, NH, DH).to("mps"), *[torch.zeros(B, NH, DH).to("mps") for _ in range(4)]]
    return lambda: torch.autograd.grad(torch.ops.xlstm.slstm_sequence(*args), args, gradients)


def long_sums(dtype: str) -> dict[str, Any]:
    """Return the errors of sums over 40,000 terms and of their gradients, each with its products."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(getattr(torch, dtype))

    gates, operand = draw(4, 40000, 1, 16), draw(40000, 1, 16)
    weights, sources = draw(2, 3, 3), draw(2, 3, 40000)

    def gradient(W: Tensor, right: Tensor) -> Tensor:
        W = W.detach().requires_grad_()
        out = products.columns(W, right)
        return torch.autograd.grad(out, W, torch.ones_like(out))[0]

    cases: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
        "slstm weights": (lambda *given: slstm.weight_gradients(*given)[0], [gates, operand]),
        "columns": (products.columns, [weights, sources]),
        "gradient of columns": (gradient, [weights, sources]),
        "mlstm segment": (_segment_gradient, []),
    }
    found = {}
    for name, (fn, args) in cases.items():
        on_device = [t.to("mps") for t in args]
        with emulator.recording() as log:
            got = fn(*on_device) if args else fn("mps", dtype)
        exact = fn(*(t.double() for t in args)) if args else fn("cpu", "float64")
        eager = fn(*args) if args else fn("cpu", dtype)
        found[name] = {"error": relative_errors([got], [exact])[0], "eager": relative_errors([eager], [exact])[0],
                       **report(log)}
    return found


def _segment_gradient(device: str, dtype: str) -> Tensor:
    """Return the gradient of a segment's forget gates at a head of 192 by 192, whose states have 36,864 elements."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, 3, 16, 192), (1, 3, 16, 192), (1, 3, 16, 192), (1, 3, 16), (1, 3, 16)]
    args = [torch.randn(shape, generator=generator).to(getattr(torch, dtype)).to(device) for shape in shapes]
    wide = torch.float64 if dtype == "float64" else torch.float32
    state = [torch.zeros(1, 192, 192), torch.zeros(1, 192), torch.zeros(1, 1)]
    fgate = args[4].requires_grad_()
    h = mlstm.segment(*args[:4], fgate, *(t.to(device, wide) for t in state), eps=1e-6)[0]
    return torch.autograd.grad(h, fgate, torch.ones_like(h))[0]
