"""Small calls of torch alone that are known to be wrong on some Macs: they tell torch's errors from ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_xlstm_ops.cli.checking.cases import TORCH, Case

TERMS = 40_000  # of the long product: more than 32,767


def _drawn(*shapes: tuple[int, ...]) -> Callable[[torch.dtype], list[Tensor]]:
    def draw(dtype: torch.dtype) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]

    return draw


def _into_slice(left: Tensor, right: Tensor) -> Sequence[Tensor]:
    out = left.new_zeros(2 * left.shape[0], left.shape[1], right.shape[2])
    torch.bmm(left, right, out=out[left.shape[0]:])
    return [out]


def _exact_in_slice(left: Tensor, right: Tensor) -> Sequence[Tensor]:
    return [torch.cat([torch.zeros_like(left @ right), left @ right])]


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Sequence[Tensor]:
    return [F.linear(x, weight, bias)]


def _exact_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Sequence[Tensor]:
    return [x @ weight.T + bias]


def _probe(name: str, draw: Callable[[torch.dtype], list[Tensor]], call: Callable[..., Sequence[Tensor]],
           exact: Callable[..., Sequence[Tensor]], meaning: str) -> Case:
    return Case(f"torch: {name}", draw, call, exact, meaning=meaning, party=TORCH, dtypes=(torch.float32,))


PROBES = (
    _probe("F.linear, a vector", _drawn((96,), (80, 96), (80,)), _linear, _exact_linear,
           "a Linear layer with bias on a vector; M1 with macOS 26 drops the bias (pytorch#188438)"),
    _probe("F.linear, three axes", _drawn((2, 5, 96), (80, 96), (80,)), _linear, _exact_linear,
           "a Linear layer with bias on (B, S, K); wrong in virtual machines with macOS 26 (pytorch#192934)"),
    _probe("bmm into a slice", _drawn((3, 24, 40), (3, 40, 24)), _into_slice, _exact_in_slice,
           "a batched product written into a slice; wrong on macOS 14 (pytorch#193385); our operators do not do it"),
    _probe("bmm of 40,000 terms", _drawn((1, 24, TERMS), (1, TERMS, 24)), lambda a, b: [torch.bmm(a, b)],
           lambda a, b: [a @ b],
           "a product of more than 32,767 terms; wrong on M1, M2 (pytorch#195163); ours are split"),
    _probe("cumsum", _drawn((4, 2000)), lambda t: [t.cumsum(-1)], lambda t: [t.cumsum(-1)],
           "running sums of 2,000 numbers"),
    _probe("bmm", _drawn((8, 64, 128), (8, 128, 64)), lambda a, b: [torch.bmm(a, b)], lambda a, b: [a @ b],
           "a batched product of the size of a chunk"),
)
