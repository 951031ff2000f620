"""The workloads of an operator: prefill and training step. The command line adds those of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops import config
from torch_xlstm_ops.api import mlstm_chunkwise
from torch_xlstm_ops.maths import mlstm
from torch_xlstm_ops.maths.shapes import EPS
from torch_xlstm_ops.maths.tolerance import GRADIENT_TOLERANCE, TOLERANCE, error
from torch_xlstm_ops.schedules.plan import Shape

CHECKED_TOKENS = 96  # compared with the recurrence


class WrongResult(RuntimeError):
    """A plan computes wrong results."""


class Workload(NamedTuple):
    """A call to time with a plan."""

    phase: str  # prefill, train, decode or first-token
    length: int  # tokens of the prompt
    tokens: int  # read or written by one call
    weight: float  # in the mean over workloads
    call: Callable[[], object]
    results: Callable[[], Sequence[Tensor]]  # of one call
    tolerance: float  # relative, between two plans

    @property
    def name(self) -> str:
        """Return its name in tables."""
        return f"{self.phase} {self.length}"


class Sizes(NamedTuple):
    """The sizes of an operator's call."""

    B: int
    NH: int
    S: int
    DHQK: int
    DHHV: int

    @property
    def shape(self) -> Shape:
        """Return the sizes that a plan depends on."""
        return Shape(self.B * self.NH, self.S, self.DHQK, self.DHHV)


def prefill(sizes: Sizes, dtype: torch.dtype, device: torch.device, weight: float = 1.0) -> Workload:
    """Return the workload of a forward pass without gradients.

    Raises WrongResult unless the default plan equals the recurrence on the first tokens.
    """
    args = draw(sizes, dtype, device)

    def results() -> list[Tensor]:
        with torch.inference_mode():
            h, state = mlstm_chunkwise(*args)
        return [h, *state]

    def call() -> None:
        with torch.inference_mode():
            mlstm_chunkwise(*args)

    _check_against_recurrence(args)
    return Workload("prefill", sizes.S, sizes.B * sizes.S, weight, call, results, 2 * TOLERANCE[dtype])


def train(sizes: Sizes, dtype: torch.dtype, device: torch.device, weight: float = 1.0) -> Workload:
    """Return the workload of a forward and a backward pass. Raises WrongResult as `prefill`."""
    args = draw(sizes, dtype, device)
    _check_against_recurrence(args)
    leaves = [t.requires_grad_() for t in args]
    seed = torch.randn_like(leaves[2])

    def results() -> list[Tensor]:
        h, _ = mlstm_chunkwise(*leaves)
        return [h.detach(), *torch.autograd.grad(h, leaves, seed)]

    return Workload("train", sizes.S, sizes.B * sizes.S, weight, results, results, 2 * GRADIENT_TOLERANCE[dtype])


def draw(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Draw q, k, v, igate, fgate; forget gates are mostly open, as in trained models."""
    generator = torch.Generator().manual_seed(0)
    B, NH, S, DHQK, DHHV = sizes
    streams = [torch.randn(B, NH, S, D, generator=generator).to(device, dtype) for D in (DHQK, DHQK, DHHV)]
    igate, fgate = (torch.randn(B, NH, S, generator=generator).to(device) for _ in range(2))
    return [*streams, igate, fgate + 3]


def check(found: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float) -> float:
    """Return the largest relative error of results.

    Raises WrongResult if it exceeds the tolerance or is NaN.
    """
    worst = error(found, [t.double() for t in wanted])
    if worst > tolerance:
        raise WrongResult(f"results must be within {tolerance:.0e} of the default plan's, got {worst:.1e}")
    return worst


def _check_against_recurrence(args: Sequence[Tensor]) -> None:
    short = [t[:, :, :CHECKED_TOKENS] for t in args]
    with torch.inference_mode(), config.use(tuned="off"):
        found, state = mlstm_chunkwise(*short, schedule="inductor")
        fresh = [torch.zeros(t.shape, dtype=torch.float64) for t in state]
        wanted, *_ = mlstm.recurrent(*[t.cpu().double() for t in short], *fresh, eps=EPS)
    check([found.cpu()], [wanted], 2 * TOLERANCE[found.dtype])
