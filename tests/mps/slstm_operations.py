"""Ways to call the sLSTM ops, each with the recurrence as its oracle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops.maths import slstm
from torch_xlstm_ops.maths.slstm import Product


class SLSTM(NamedTuple):
    """One way to call an op: tokens, with resets or without, with its gradient or without."""

    op: str
    tokens: int = 0
    reset: bool = False
    gradient: bool = False
    quick: str = "bfloat16"  # the dtype of the default run, if any; the others are slow
    B: int = 3
    NH: int = 2
    DH: int = 40
    schedule: str = "inductor"
    config: Mapping[str, Any] = MappingProxyType({})

    def arguments(self, dtype: torch.dtype) -> list[Tensor]:
        """Return x, r, b, y, c, n, m and, if asked, reset, on the CPU; one cell in four is fresh."""
        generator = torch.Generator().manual_seed(0)
        B, NH, DH = self.B, self.NH, self.DH
        tokens = (self.tokens,) if self.op == "slstm_sequence" else ()
        x, r, b = (torch.randn(shape, generator=generator)
                   for shape in ((B, *tokens, 4, NH, DH), (4, NH, DH, DH), (4, NH, DH)))
        y, c, n, m = (torch.randn(B, NH, DH, generator=generator) for _ in range(4))
        used = torch.rand(B, NH, DH, generator=generator) > 0.25
        y, c, n = y * used, c * used, (n.abs() + 1) * used
        args = [*(t.to(dtype) for t in (x, r * DH**-0.5, b)), y, c, n, m]
        return [*args, torch.rand(B, self.tokens, generator=generator) < 0.2] if self.reset else args

    def gradients(self, args: list[Tensor]) -> list[Tensor]:
        """Return what to put into the backward pass: one tensor for each result, or nothing."""
        if not self.gradient:
            return []
        generator = torch.Generator().manual_seed(1)
        shapes = ((self.B, self.tokens, self.NH, self.DH), *((self.B, self.NH, self.DH),) * 4)
        dh, *dstate = [torch.randn(shape, generator=generator) for shape in shapes]
        return [dh.to(args[0].dtype), *dstate]

    def call(self, args: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        """Call the op; return its results, or the gradients of its arguments."""
        return self.results(getattr(torch.ops.xlstm, self.op), args, gradients)

    def oracle(self, args: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        """Return what `call` has to return, by the recurrence."""
        return self.results(self._recurrence, self._with_bool_reset(args), gradients)

    def eager(self, args: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        """Return what the eager recurrence in the arguments' dtype gives on the CPU."""
        return self.oracle(args, gradients)

    def _recurrence(self, *args: Tensor) -> tuple[Tensor, ...]:
        if self.op == "slstm_sequence":
            return slstm.recurrent(*args)
        return slstm.step(*args, floor=0.0, product=Product.FUSED)

    def _with_bool_reset(self, args: list[Tensor]) -> list[Tensor]:
        return [*args[:7], *(t.bool() for t in args[7:])]

    def results(self, run: Callable[..., Any], args: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        """Return the results of a function, or the gradients of its first seven arguments where theirs are given."""
        if not gradients:
            return list(run(*args))
        inputs = [t.detach().requires_grad_() for t in args[:7]]
        return list(torch.autograd.grad(run(*inputs, *args[7:]), inputs, gradients))


OPERATIONS = {
    "slstm step": SLSTM("slstm_step", quick=""),
    "slstm blocks": SLSTM("slstm_sequence", 8, quick=""),
    "slstm tail": SLSTM("slstm_sequence", 9),
    "slstm reset": SLSTM("slstm_sequence", 8, reset=True, quick=""),
    "slstm products": SLSTM("slstm_sequence", 8, B=64, NH=4, DH=256, quick=""),
    "slstm gradient": SLSTM("slstm_sequence", 8, gradient=True, quick="float32"),
    "slstm gradient tail": SLSTM("slstm_sequence", 9, gradient=True, quick=""),
    "slstm gradient reset": SLSTM("slstm_sequence", 8, reset=True, gradient=True, quick=""),
}
