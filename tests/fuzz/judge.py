"""Compare a call with the float64 recurrence; name the reason of a difference, or return what is unexplained."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.fuzz.bounds import UNIT, Bounds, bounds
from tests.fuzz.draws import DHHV, DHQK, NAMES, Call, L
from tests.oracle import GRADIENT_TOLERANCE, TOLERANCE, error, exact, weigh
from torch_xlstm_ops import config, mlstm_chunkwise, mlstm_step, mlstm_step_
from torch_xlstm_ops.api import slstm_sequence, slstm_step
from torch_xlstm_ops.maths import slstm

ROUNDINGS = 64.0  # rounding errors of the unit in a bound
TINY = 1e-30  # float32 takes weights below exp(-80) for 0, and exp(-m) for at most exp(80)
NEAR = 256.0  # units within which two values count as equal
SAME, CANCELS, BALANCED, EXPONENTS, JUMPS, TIES, RANGE, SPREADS, SENSITIVE = (
    "within the tolerance", "q.n cancels", "a gradient is a small difference, its error small beside the largest one",
    "exponents of large gates round", "|q.n| is at exp(-m), where gradients jump",
    "the arguments of m's maximum are equal but for rounding", "beyond the range of the dtype",
    "what is not finite, and packed documents", "rounding the inputs changes as much",
)


class Unexplained(AssertionError):
    """A difference without a reason."""


def judge(call: Call) -> str:
    """Run a call; return why it differs, SAME if it does not. Raises Unexplained."""
    if call.operator.startswith("slstm"):
        return _judge_slstm(call)
    gradient = call.operator == "gradient"
    args = [t.detach().requires_grad_(gradient) for t in call.args]
    wide = [t.detach().double().clone().requires_grad_(gradient) for t in call.args]
    found, wanted = _run(call, args), _documents(wide, call.reset)
    reason = _compare(call, found, wanted)
    if not gradient or reason in (RANGE, SPREADS) or not call.args[0].numel():
        return reason
    return max(reason, _compare_gradients(call, args, wide, found, wanted), key=lambda one: one != SAME)


def _run(call: Call, args: list[Tensor]) -> list[Tensor]:
    if call.operator.startswith("step"):
        token = [*(t[:, :, 0] for t in args[:3]), *(t[:, :, :1] for t in args[3:5])]
        if call.operator == "step":
            h, state = mlstm_step(*token, *args[5:])
            return [h[:, :, None], *state]
        written = [_copy(t) for t in args[5:]]
        return [mlstm_step_(*token, *written)[:, :, None], *written]
    with config.use(**call.settings):
        h, state = mlstm_chunkwise(*args, reset=call.reset, chunk_size=L, schedule=call.schedule)
    return [h, *state]


def _copy(t: Tensor) -> Tensor:
    """Return a copy with the same strides."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t)


def _documents(args: list[Tensor], reset: Tensor | None) -> list[Tensor]:
    """Run the float64 recurrence, each row's documents one after another."""
    if reset is None:
        return list(exact(args))
    B, S = reset.shape
    rows = []
    for row in range(B):
        state, h = [t[row:row + 1] for t in args[5:]] or _zeros(args[0][row:row + 1]), []
        cuts = [0, *(t for t in range(S) if reset[row, t] and t), S]
        for start, stop in itertools.pairwise(cuts):
            if stop > start and reset[row, start]:
                state = [torch.zeros_like(t) for t in state]
            part, *state = exact([*(t[row:row + 1, :, start:stop] for t in args[:5]), *state])
            h.append(part)
        rows.append([torch.cat(h, 2), *state])
    return [torch.cat(parts) for parts in zip(*rows, strict=True)]


def _zeros(q: Tensor) -> list[Tensor]:
    shape = q.shape[:2]
    return [q.new_zeros(*shape, DHQK, DHHV), q.new_zeros(*shape, DHQK), q.new_zeros(*shape, 1)]


def _finite_input(call: Call) -> bool:
    """Return whether nothing but gates and m of -inf, and forget gates of +inf, is not finite."""
    for name, t in zip(NAMES, call.args, strict=False):
        most = torch.inf if name == "fgate" else torch.finfo(t.dtype).max
        least = -torch.inf if name in ("igate", "fgate", "m") else -most
        if not bool(((t >= least) & (t <= most)).all()):
            return False
    return True


def _compare(call: Call, found: Sequence[Tensor], wanted: Sequence[Tensor]) -> str:
    if not _finite_input(call):
        return _compare_places(call, found, wanted)
    limit = torch.finfo(call.dtype).max / 2
    if float(wanted[0].detach().abs().max() if wanted[0].numel() else 0) > limit:
        return RANGE
    if max(error(_plain(a), _plain(b), 1e-3 * _size(wanted)) for a, b in zip(found, wanted, strict=True)) <= (
            TOLERANCE[call.dtype]):
        return SAME
    if call.reset is not None:
        return _judge_documents(call, found, wanted)
    limits = _bounds(call)
    _check_bound(found, wanted, limits, call.dtype)
    return EXPONENTS if limits.exponent > 100 else CANCELS


def _judge_documents(call: Call, found: Sequence[Tensor], wanted: Sequence[Tensor]) -> str:
    """Compare with the bound of documents run one by one."""
    assert call.reset is not None
    for row in range(call.reset.shape[0]):
        state = [t[row:row + 1] for t in call.args[5:]] or _zeros(call.args[0][row:row + 1].double())
        cuts = sorted({0, *call.reset[row].nonzero().flatten().tolist(), call.reset.shape[1]})
        for start, stop in itertools.pairwise(cuts):
            if call.reset[row, start]:
                state = [torch.zeros_like(t) for t in state]
            part = [*(t[row:row + 1, :, start:stop] for t in call.args[:5]), *state]
            limits = bounds([t.detach() for t in part])
            h = [t[row:row + 1, :, start:stop] for t in (found[0], wanted[0])]
            _check(h[0], h[1], limits.h, limits.exponent, call.dtype, "h of a document")
            state = [t.detach() for t in exact(part)[1:]]
    return CANCELS


def _bounds(call: Call) -> Bounds:
    given = [t.detach() for t in call.args]
    return bounds(given if len(given) > 5 else [*given, *_zeros(given[0].double())])


def _check_bound(found: Sequence[Tensor], wanted: Sequence[Tensor], limits: Bounds, dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    _check(found[0], wanted[0], limits.h, limits.exponent, dtype, "h")
    _check(found[1].flatten(2), wanted[1].flatten(2), limits.c, limits.exponent, dtype, "c")
    _check(found[2], wanted[2], limits.n, limits.exponent, dtype, "n")
    m, wanted_m = (torch.where(t == -torch.inf, 0.0, t.detach()).double() for t in (found[3], wanted[3]))
    if float((m - wanted_m).abs().max()) > NEAR * UNIT[wide] * limits.exponent:
        raise Unexplained(f"m is off by {float((m - wanted_m).abs().max()):.1e}")


def _check(
    found: Tensor, wanted: Tensor, size: Tensor, exponent: float, dtype: torch.dtype, name: str
) -> None:
    """Raise Unexplained unless the error of each vector of the last axis is within the bound."""
    away = (found.detach().double() - wanted.detach()).norm(dim=-1)
    wide = UNIT[torch.float64 if dtype == torch.float64 else torch.float32]
    allowed = ROUNDINGS * (UNIT[dtype] + wide * exponent) * size + max(TINY, torch.finfo(dtype).smallest_normal)
    worst = float((away / allowed).nan_to_num(nan=torch.inf).max()) if away.numel() else 0.0
    if worst > 1:
        raise Unexplained(f"{name} is off by {worst:.1f} times the bound")


def _compare_gradients(
    call: Call, args: list[Tensor], wide: list[Tensor], found: Sequence[Tensor], wanted: Sequence[Tensor]
) -> str:
    """Compare the gradients of a scalar that depends on every result."""
    results, expected = ([torch.where(t == -torch.inf, 0.0, t) for t in ts] for ts in (found, wanted))
    mine = torch.autograd.grad(weigh(results), args)
    exactly = torch.autograd.grad(weigh(expected), wide, materialize_grads=True)
    if any(float(e.abs().max()) > torch.finfo(a.dtype).max / 2 for a, e in zip(mine, exactly, strict=True)):
        return RANGE
    scale = max(_size([t]) for t in exactly)
    tolerance = GRADIENT_TOLERANCE[call.dtype]
    if max(error(a, b, 1e-3 * scale) for a, b in zip(mine, exactly, strict=True)) <= tolerance:
        return SAME
    if max(error(a, b, scale) for a, b in zip(mine, exactly, strict=True)) <= tolerance:
        return BALANCED
    narrow = max([t.dtype for t in call.args[:5]], key=lambda one: UNIT[one])
    if call.reset is not None:
        return _sensitive(call, mine, exactly, tolerance)
    limits, unit = _bounds(call), UNIT[torch.float64 if call.dtype == torch.float64 else torch.float32]
    within = NEAR * unit * limits.exponent
    if limits.tie <= within:
        return TIES
    if limits.kink <= within:
        return JUMPS
    allowed = ROUNDINGS * (UNIT[narrow] + unit * limits.exponent) * limits.kappa
    worst = max(error(a, b, scale) for a, b in zip(mine, exactly, strict=True))
    if worst > allowed:
        raise Unexplained(f"a gradient is off by {worst:.1e} of the largest, allowed {allowed:.1e}, {limits[3:]}")
    return EXPONENTS if limits.exponent > 100 else CANCELS


def _sensitive(
    call: Call, mine: Sequence[Tensor], exactly: Sequence[Tensor], tolerance: float,
    run: Callable[[list[Tensor]], Sequence[Tensor]] | None = None,
) -> str:
    """Compare with what rounding the inputs once more changes in float64."""
    run = run or (lambda args: [torch.where(t == -torch.inf, 0.0, t) for t in _documents(args, call.reset)])
    changes = [tolerance]
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        moved = [(t.detach().double() * (1 + UNIT[call.dtype] * (2 * torch.rand(t.shape, generator=g,
                  dtype=torch.float64) - 1))).requires_grad_() for t in call.args]
        again = torch.autograd.grad(weigh(run(moved)), moved, materialize_grads=True)
        changes.append(max(error(a, b, 1e-3 * max(_size([t]) for t in exactly))
                           for a, b in zip(again, exactly, strict=True)))
    worst = max(error(a, b, 1e-3 * max(_size([t]) for t in exactly)) for a, b in zip(mine, exactly, strict=True))
    if worst > 30 * max(changes):
        raise Unexplained(f"a gradient is off by {worst:.1e}; rounding the inputs changes it by {max(changes):.1e}")
    return SENSITIVE


def _compare_places(call: Call, found: Sequence[Tensor], wanted: Sequence[Tensor]) -> str:
    """Hold what is not finite to the recurrence's places; with packed documents, to their documents."""
    for name, a, b in zip("hcnm", found, wanted, strict=True):
        a, b = (torch.where(t == -torch.inf, 0.0, t.detach()) if name == "m" else t.detach() for t in (a, b))
        finite = a.isfinite()
        if bool((finite & ~b.isfinite()).any()):
            raise Unexplained(f"{name} is finite where the recurrence is not")
        if call.reset is None and bool((~finite & b.isfinite() & (b.abs() < torch.finfo(a.dtype).max / 2)).any()):
            raise Unexplained(f"{name} is not finite where the recurrence is")
    return SPREADS


def _plain(t: Tensor) -> Tensor:
    return torch.where(t == -torch.inf, 0.0, t.detach())


def _size(tensors: Sequence[Tensor]) -> float:
    return max(float(_plain(t).double().norm()) for t in tensors)


def _judge_slstm(call: Call) -> str:
    gradient = call.operator == "slstm_gradient" and bool(call.args[0].numel())
    args = [t.detach().requires_grad_(gradient) for t in call.args]
    wide = [t.detach().double().requires_grad_(gradient) for t in call.args]

    def reference(given: list[Tensor]) -> list[Tensor]:
        return list(slstm.recurrent(*given, call.reset))

    wanted = reference(wide)
    if call.operator == "slstm_step":
        found = [wanted[0], *slstm_step(args[0][:, 0], *args[1:])]
    else:
        h, state = slstm_sequence(*args, reset=call.reset)
        found = [h, *state]
    pairs = [(_plain(a), _plain(b)) for a, b in zip(found, wanted, strict=True)]
    if max(error(a, b, 1e-3 * _size(wanted)) for a, b in pairs) > 10 * TOLERANCE[call.dtype]:
        raise Unexplained("the results of an sLSTM differ")
    if not gradient:
        return SAME
    mine = torch.autograd.grad(weigh(found), args)
    exactly = torch.autograd.grad(weigh(wanted), wide, materialize_grads=True)
    scale = max(_size([t]) for t in exactly)
    if max(error(a, b, 1e-3 * scale) for a, b in zip(mine, exactly, strict=True)) <= GRADIENT_TOLERANCE[call.dtype]:
        return SAME
    return _sensitive(call, mine, exactly, GRADIENT_TOLERANCE[call.dtype], reference)
