"""Every operator with drawn arguments and the recurrence that it must equal."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops.maths import mlstm, slstm
from torch_xlstm_ops.maths.shapes import EPS

MLSTM = {"B": 1, "NH": 4, "S": 300, "DHQK": 64, "DHHV": 128}  # whole chunks and a partial one
SLSTM = {"B": 2, "NH": 4, "S": 40, "DH": 64}  # whole blocks and a partial one
OURS, TORCH = "torch_xlstm_ops", "torch"  # whose result a row is


class Case(NamedTuple):
    """An operator, a function that draws its arguments in a dtype, and the recurrence that it must equal.

    inputs: compare the gradients of so many first arguments; default 0, compare the results. dtypes: default all.
    party: whose result it is. settings: of the configuration, while it is called.
    """

    name: str
    draw: Callable[[torch.dtype], list[Tensor]]
    call: Callable[..., Sequence[Tensor]]
    exact: Callable[..., Sequence[Tensor]]
    inputs: int = 0
    meaning: str = ""
    party: str = OURS
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    settings: Mapping[str, Any] = MappingProxyType({})

    def results(self, function: Callable[..., Sequence[Tensor]], args: Sequence[Tensor]) -> list[Tensor]:
        """Return the results of a function for `args`, or the gradients of the first `inputs` arguments."""
        if not self.inputs:
            return list(function(*args))
        given = [t.detach().requires_grad_() for t in args[: self.inputs]]
        outputs = function(*given)
        generator = torch.Generator().manual_seed(1)
        seeds = [torch.randn(t.shape, generator=generator).bfloat16().to(t) for t in outputs]  # exact in every dtype
        return list(torch.autograd.grad(list(outputs), given, seeds))


def draw_mlstm(dtype: torch.dtype, **sizes: int) -> list[Tensor]:
    """Return q, k, v, igate, fgate, c, n, m of a sequence; sizes: in place of those of MLSTM."""
    B, NH, S, DHQK, DHHV = (MLSTM | sizes).values()
    generator = torch.Generator().manual_seed(0)
    shapes = ((S, DHQK), (S, DHQK), (S, DHHV), (S,), (S,), (DHQK, DHHV), (DHQK,), (1,))
    drawn = [torch.randn(B, NH, *shape, generator=generator) for shape in shapes]
    drawn[4] += 3
    return [*(t.to(dtype) for t in drawn[:5]), *drawn[5:]]


def draw_mlstm_token(dtype: torch.dtype) -> list[Tensor]:
    """Return q, k, v, igate, fgate, c, n, m of a token."""
    q, k, v, igate, fgate, *state = draw_mlstm(dtype)
    return [*(t[:, :, 0].contiguous() for t in (q, k, v)), igate[:, :, :1].contiguous(), fgate[:, :, :1].contiguous(),
            *state]


def draw_slstm(dtype: torch.dtype) -> list[Tensor]:
    """Return x, r, b, y, c, n, m of a sequence."""
    B, NH, S, DH = SLSTM.values()
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, S, 4, NH, DH), (4, NH, DH, DH), (4, NH, DH), *[(B, NH, DH)] * 4)
    x, r, b, y, c, n, m = (torch.randn(shape, generator=generator) for shape in shapes)
    return [*(t.to(dtype) for t in (x, r * DH**-0.5, b)), y, c, n.abs() + 1, m]


def draw_slstm_token(dtype: torch.dtype) -> list[Tensor]:
    """Return x, r, b, y, c, n, m of a token."""
    x, *rest = draw_slstm(dtype)
    return [x[:, 0].contiguous(), *rest]


def _op(name: str) -> Callable[..., Sequence[Tensor]]:
    return lambda *args: getattr(torch.ops.xlstm, name)(*args)


def _step_in_place(*args: Tensor) -> list[Tensor]:
    return [torch.ops.xlstm.mlstm_step_(*args), *args[5:]]


def _mlstm_step(*args: Tensor) -> Sequence[Tensor]:
    return mlstm.step(*args, eps=EPS)


def _mlstm_recurrent(*args: Tensor) -> Sequence[Tensor]:
    return mlstm.recurrent(*args, eps=EPS)


def _slstm_step(*args: Tensor) -> Sequence[Tensor]:
    return slstm.step(*args, floor=0.0, product=slstm.Product.FUSED)


def _compiled(*args: Tensor) -> Sequence[Tensor]:
    """Call the operator in a function compiled by our backend, which Inductor sees as one call among others."""
    run = torch.compile(lambda *given: [t.sin() for t in torch.ops.xlstm.mlstm_chunkwise(*given)], backend="xlstm")
    return list(run(*args))


def _exact_compiled(*args: Tensor) -> Sequence[Tensor]:
    return [t.sin() for t in _mlstm_recurrent(*args)]


CASES = (
    Case("mlstm_step", draw_mlstm_token, _op("mlstm_step"), _mlstm_step, meaning="one token of an mLSTM layer"),
    Case("mlstm_step_", draw_mlstm_token, _step_in_place, _mlstm_step,
         meaning="one token of an mLSTM layer, the state written in place"),
    Case("mlstm_chunkwise", draw_mlstm, _op("mlstm_chunkwise"), _mlstm_recurrent,
         meaning="a prompt of 300 tokens through an mLSTM layer"),
    Case("mlstm_chunkwise and backward", draw_mlstm, _op("mlstm_chunkwise"), _mlstm_recurrent, 8,
         meaning="the same in training: forward and backward"),
    Case("slstm_step", draw_slstm_token, _op("slstm_step"), _slstm_step, meaning="one token of an sLSTM layer"),
    Case("slstm_sequence", draw_slstm, _op("slstm_sequence"), slstm.recurrent,
         meaning="a prompt of 40 tokens through an sLSTM layer"),
    Case("slstm_sequence and backward", draw_slstm, _op("slstm_sequence"), slstm.recurrent, 7,
         meaning="the same in training: forward and backward"),
)
_FLOAT32 = (torch.float32,)
SIZES = (
    Case("mlstm, states of 131,072", functools.partial(draw_mlstm, NH=1, S=70, DHQK=256, DHHV=512),
         _op("mlstm_chunkwise"), _mlstm_recurrent, 8, dtypes=_FLOAT32,
         meaning="a head of xLSTM-7B in training, whose inner product has more than 32,767 terms"),
    Case("mlstm, several segments", draw_mlstm, _op("mlstm_chunkwise"), _mlstm_recurrent, dtypes=_FLOAT32,
         settings={"segment": 128}, meaning="a prompt in three segments, each from the state before"),
    Case("mlstm, one head a task", draw_mlstm, _op("mlstm_chunkwise"), _mlstm_recurrent, dtypes=_FLOAT32,
         settings={"heads_per_band": 1}, meaning="each head on its own, read and written as a slice"),
    Case('backend="xlstm"', draw_mlstm, _compiled, _exact_compiled, dtypes=_FLOAT32,
         meaning="a function compiled by our Dynamo backend"),
)
