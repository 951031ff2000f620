"""The reference of the tests: the float64 recurrence, drawn inputs, and one tolerance per dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops.maths import mlstm
from torch_xlstm_ops.maths.shapes import state_dtype
from torch_xlstm_ops.maths.tolerance import GRADIENT_TOLERANCE as GRADIENT_TOLERANCE
from torch_xlstm_ops.maths.tolerance import TOLERANCE as TOLERANCE


class Sizes(NamedTuple):
    """The sizes of one drawn call."""

    B: int = 2
    NH: int = 3
    S: int = 19
    DHQK: int = 8
    DHHV: int = 16


def draw(
    sizes: Sizes, dtype: torch.dtype = torch.float32, *, seed: int = 0, state: bool = True,
    gates: torch.dtype | None = None, shift: float = 2.0, spread: float = 2.0,
) -> list[Tensor]:
    """Return q, k, v, igate, fgate and, if `state`, c, n, m. Forget gates have mean `shift` and deviation `spread`."""
    g = torch.Generator().manual_seed(seed)
    B, NH, S, DHQK, DHHV = sizes

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64)

    streams = [normal(B, NH, S, DHQK), normal(B, NH, S, DHQK), normal(B, NH, S, DHHV)]
    preactivations = [normal(B, NH, S) * spread, normal(B, NH, S) * spread + shift]
    drawn = [t.to(dtype) for t in streams] + [t.to(gates or dtype) for t in preactivations]
    if state:
        drawn += [t.to(state_dtype(dtype)) for t in (normal(B, NH, DHQK, DHHV), normal(B, NH, DHQK), normal(B, NH, 1))]
    return drawn


def exact(args: Sequence[Tensor], eps: float = 1e-6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return h, c, n, m of the float64 recurrence for `args`; a missing state is zero."""
    wide = [t.double() for t in args]
    q, v = wide[0], wide[2]
    if len(wide) == 5:
        B, NH, _, DHQK = q.shape
        wide += [q.new_zeros(B, NH, DHQK, v.shape[-1]), q.new_zeros(B, NH, DHQK), q.new_zeros(B, NH, 1)]
    return mlstm.recurrent(*wide, eps=eps)


def error(found: Tensor, wanted: Tensor, scale: float = 0.0) -> float:
    """Return ||found - wanted|| / max(||wanted||, scale); NaN or infinity in different places is an infinite error."""
    found, wanted = found.detach().double(), wanted.detach().double()
    assert found.shape == wanted.shape, f"shape {tuple(found.shape)}, wanted {tuple(wanted.shape)}"
    finite = wanted.isfinite()
    if not torch.equal(finite, found.isfinite()):
        return float("inf")
    distance, size = float((found[finite] - wanted[finite]).norm()), max(_size(wanted), scale)
    return distance / size if size else distance


def assert_close(found: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float) -> None:
    """Assert the relative error of each result; one of small norm is relative to a thousandth of the largest."""
    scale = 1e-3 * max(_size(t.detach()) for t in wanted)
    errors = [error(a, b, scale) for a, b in zip(found, wanted, strict=True)]
    assert max(errors) <= tolerance, f"relative errors {errors}, tolerance {tolerance}"


def _size(t: Tensor) -> float:
    return float(t[t.isfinite()].double().norm())


def float32_tolerance(args: Sequence[Tensor], wanted: Tensor) -> float:
    """Return the tolerance of a drawn call: twice the change of h when its inputs are rounded, if that is larger.

    Where a denominator nearly cancels, rounding the inputs changes h more than TOLERANCE.
    """
    generator = torch.Generator().manual_seed(0)

    def rounded(t: Tensor) -> Tensor:
        return t.double() * (1 + 2.0**-24 * (2 * torch.rand(t.shape, generator=generator, dtype=torch.float64) - 1))

    changes = (error(mlstm.recurrent(*[rounded(t) for t in args], eps=1e-6)[0], wanted) for _ in range(4))
    return 2 * max(TOLERANCE[torch.float32], *changes)


def weigh(results: Sequence[Tensor]) -> Tensor:
    """Return a scalar that depends on every element of every result, differently."""
    total = results[0].new_zeros((), dtype=torch.float64)
    for t in results:
        weight = torch.sin(torch.arange(1, t.numel() + 1, dtype=torch.float64)).view(t.shape)
        total = total + (t.double() * weight).sum()
    return total
