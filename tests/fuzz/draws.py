"""One drawn call: operator, sizes, dtypes, layouts in memory, gates, states, what is not finite, and resets."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torch_xlstm_ops.maths.shapes import state_dtype

L, DHQK, DHHV = 16, 8, 16  # as in most tests, whose kernels are there
DTYPES = [torch.float32] * 5 + [torch.float64] * 2 + [torch.bfloat16, torch.float16]
OPERATORS = ["chunkwise"] * 4 + ["gradient"] * 4 + ["step", "step_", "slstm", "slstm_gradient", "slstm_step"]
SCHEDULES = ["inductor"] * 4 + ["queued", "recurrent"]
LENGTHS = [0, 1, 2, 5, 15, 16, 17, 31, 33, 48, 63, 70]
LONG = 415
NAMES = ["q", "k", "v", "igate", "fgate", "c", "n", "m"]


class Call(NamedTuple):
    """A call of an operator; str() of it and its seed tell all."""

    operator: str
    schedule: str
    dtype: torch.dtype
    drawn: tuple[str, ...]  # the kinds of gates, states, layouts and values that were drawn
    args: list[Tensor]
    reset: Tensor | None
    settings: dict[str, int]  # of `config.use`

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.args[0].shape))
        return f"{self.operator} {self.schedule} {str(self.dtype)[6:]} {sizes} {' '.join(self.drawn)} {self.settings}"


def draw(seed: int) -> Call:
    """Return the call of a seed."""
    choose, g = random.Random(seed), torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64)

    operator, dtype = choose.choice(OPERATORS), choose.choice(DTYPES)
    if operator.startswith("slstm"):
        return _slstm(choose, normal, operator, dtype)
    B, NH = choose.choice([(1, 1), (1, 3), (2, 1), (2, 3), (3, 2)])
    S = LONG if choose.random() < 0.02 else choose.choice(LENGTHS)
    S = 1 if operator.startswith("step") else S
    streams = [normal(B, NH, S, D) for D in (DHQK, DHQK, DHHV)]
    kinds = [choose.choice(list(GATES)), choose.choice(list(STATES))]
    gates = GATES[kinds[0]](normal(B, NH, S), normal(B, NH, S), choose)
    state = STATES[kinds[1]](normal(B, NH, DHQK, DHHV), normal(B, NH, DHQK), normal(B, NH, 1))
    if operator.startswith("step") and not state:
        state = [torch.zeros(B, NH, DHQK, DHHV), torch.zeros(B, NH, DHQK), torch.zeros(B, NH, 1)]
    gate_dtype = torch.float32 if dtype == torch.float16 else dtype
    dtypes = [dtype] * 3 + [gate_dtype] * 2 + [state_dtype(dtype)] * len(state)
    args = [t.to(wanted) for t, wanted in zip([*streams, *gates, *state], dtypes, strict=True)]
    kinds += _spoil(choose, args)
    reset = None
    if operator in ("chunkwise", "gradient") and choose.random() < 0.2:
        reset = torch.rand(B, S, generator=g) < choose.choice([0.05, 0.5])
        kinds.append("reset")
    args, layouts = _lay_out(choose, args, operator)
    settings = {"segment": choose.choice([L, 2 * L]), "heads_per_band": choose.choice([1, 2])}
    schedule = choose.choice(SCHEDULES)
    schedule = schedule if dtype == torch.float32 or schedule != "queued" else "inductor"  # kernels of its own
    return Call(operator, schedule, dtype, (*kinds, *layouts), args, reset,
                settings if choose.random() < 0.5 else {})


def _slstm(choose: random.Random, normal: Callable[..., Tensor], operator: str, dtype: torch.dtype) -> Call:
    dtype = dtype if dtype.itemsize > 2 else torch.float32  # in 16 bits the recurrence itself rounds y
    B, S, scale = choose.choice([1, 3]), choose.choice([0, 1, 5, 11, 20]), choose.choice([0.5, 2.0, 20.0])
    S = 1 if operator == "slstm_step" else S
    args = [normal(B, S, 4, 2, 4) * scale, normal(4, 2, 4, 4) / 2, normal(4, 2, 4)]
    args += [normal(B, 2, 4), normal(B, 2, 4), normal(B, 2, 4).exp(), normal(B, 2, 4)]
    kinds = [f"scale {scale}"]
    if choose.random() < 0.3:
        args[4], args[5], args[6] = (torch.zeros_like(t) for t in args[4:7])
        kinds.append("fresh")
    if choose.random() < 0.2 and S:
        args[0][:, choose.randrange(S), :2] = -math.inf
        kinds.append("both closed")
    reset = None
    if operator != "slstm_step" and choose.random() < 0.2:
        reset = normal(B, S) > 1
        kinds.append("reset")
    args, layouts = _lay_out(choose, [t.to(dtype) for t in args], operator)
    return Call(operator, "", dtype, (*kinds, *layouts), args, reset, {})


def _gates(spread: float, shift: float) -> Callable[..., list[Tensor]]:
    return lambda igate, fgate, choose: [igate * spread, fgate * spread + shift]


def _closed(igate: Tensor, fgate: Tensor, choose: random.Random) -> list[Tensor]:
    """Close gates, mask tokens, do both, and let tokens change nothing, here and there."""
    igate, fgate = igate * 2, fgate * 2 + 2
    for name in choose.sample(["closed", "masked", "both", "identity"], choose.randint(1, 4)):
        chosen = torch.rand(igate.shape, generator=torch.Generator().manual_seed(choose.randrange(1 << 30))) < 0.2
        if name != "closed":
            igate[chosen] = -math.inf
        if name != "masked":
            fgate[chosen] = math.inf if name == "identity" else -math.inf
    return [igate, fgate]


GATES: dict[str, Callable[..., list[Tensor]]] = {
    "usual gates": _gates(2.0, 2.0), "open gates": _gates(1.0, 8.0), "wide open gates": _gates(3.0, 20.0),
    "spread of 20": _gates(20.0, 0.0), "spread of 1e4": _gates(1e4, 0.0), "shut gates": _gates(1.0, -30.0),
    "equal gates": lambda igate, fgate, choose: [igate.round(), fgate.round()], "closed gates": _closed,
}
STATES: dict[str, Callable[..., list[Tensor]]] = {
    "no state": lambda c, n, m: [], "zero state": lambda c, n, m: [c * 0, n * 0, m * 0],
    "a state": lambda c, n, m: [c, n, m], "large m": lambda c, n, m: [c, n, m + 100.0],
    "huge m": lambda c, n, m: [c, n, m * 0 + 1e30], "small m": lambda c, n, m: [c, n, m * 0 - 1e30],
    "empty": lambda c, n, m: [c * 0, n * 0, m * 0 - math.inf],
    "m of -inf alone": lambda c, n, m: [c, n, m * 0 - math.inf],
    "large c": lambda c, n, m: [c * 1e4, n, m], "n of 0": lambda c, n, m: [c, n * 0, m],
}


def _spoil(choose: random.Random, args: list[Tensor]) -> list[str]:
    """Make one element of one argument NaN or infinite, now and then."""
    if choose.random() > 0.15 or not args[0].numel():
        return []
    number, value = choose.randrange(len(args)), choose.choice([math.nan, math.inf, -math.inf])
    t = args[number]
    t.view(-1)[choose.randrange(t.numel())] = value
    return [f"{value} in {NAMES[number]}"]


def _lay_out(choose: random.Random, args: list[Tensor], operator: str) -> tuple[list[Tensor], list[str]]:
    """Return arguments in drawn layouts; expanded and overlapping ones take other values."""
    written = operator == "step_"
    laid, names = [], []
    for number, t in enumerate(args):
        kinds = ["plain"] * 4 + ["gaps", "transposed", "offset"]
        kinds += [] if written and number > 4 else ["expanded", "overlapping"]
        kind = choose.choice(kinds)
        laid.append(LAYOUTS[kind](t) if t.numel() and t.dim() > 1 else t)
        names += [] if kind == "plain" else [f"{number}:{kind}"]
    if choose.random() < 0.1 and laid[0].shape == laid[1].shape and not operator.startswith("slstm"):
        laid[1] = laid[0]
        names.append("k is q")
    return laid, names


def _gaps(t: Tensor) -> Tensor:
    return t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])[..., ::2].copy_(t)


def _overlapping(t: Tensor) -> Tensor:
    """Return windows of one row that overlap: element (i, j) is that of i + j."""
    rows, size = t.shape[0], t[0].numel()
    if rows == 1:
        return t
    base, strides = t.reshape(-1)[: rows + size - 1].clone(), t[:1].contiguous().stride()[1:]
    return base.as_strided(t.shape, (1, *strides))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda t: t, "gaps": _gaps, "transposed": lambda t: t.mT.contiguous().mT,
    "offset": lambda t: torch.cat([t.new_zeros(3), t.reshape(-1)])[3:].view(t.shape),
    "expanded": lambda t: t[:1].expand(t.shape), "overlapping": _overlapping,
}
