"""Laws of the values that gates and states may take: every operator and schedule gives what the recurrence gives."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from tests.oracle import GRADIENT_TOLERANCE, TOLERANCE, Sizes, assert_close, draw, exact, float32_tolerance, weigh
from tests.parameters import tail
from torch_xlstm_ops import config, mlstm_chunkwise, mlstm_step, mlstm_step_, trace
from torch_xlstm_ops.api import slstm_sequence, slstm_step
from torch_xlstm_ops.maths import mlstm, packing, slstm

L = 16
NONE, ALL = -math.inf, math.inf
S = 40
SCHEDULES = ["inductor", "queued", "recurrent"]
DTYPES = [torch.float32, torch.float64]
every_schedule = pytest.mark.parametrize("schedule", tail(SCHEDULES))
# Kernels in float64 are compiled in the long run alone.
every_dtype = pytest.mark.parametrize("dtype", tail(DTYPES, lambda dtype: dtype == torch.float32), ids=str)


def empty_state(args: list[Tensor]) -> None:
    """Begin as others write an empty state."""
    for t, value in zip(args[5:], (0.0, 0.0, NONE), strict=True):
        t.fill_(value)


def empty_m(args: list[Tensor]) -> None:
    args[7].fill_(NONE)


def empty_some(args: list[Tensor]) -> None:
    args[7][0].fill_(NONE)


def large_m(args: list[Tensor]) -> None:
    """Let the state outweigh every token; its q.n is no small difference, which would divide what is next to 0."""
    args[7].fill_(100.0)
    args[0].abs_(), args[6].abs_()


def huge_m(args: list[Tensor]) -> None:
    large_m(args)
    args[7].fill_(1e30)


def small_m(args: list[Tensor]) -> None:
    args[7].fill_(-1e30)


def empty_then_masked(args: list[Tensor]) -> None:
    """Begin empty, with tokens that add nothing."""
    empty_state(args)
    args[3][:, :, :3] = NONE


def masked_and_closed(args: list[Tensor]) -> None:
    for at in (0, 11, 15, 16, 33):
        args[3][0, :, at] = args[4][0, :, at] = NONE


def masked_and_closed_at_the_end(args: list[Tensor]) -> None:
    args[3][..., -3:], args[4][..., -3:] = NONE, NONE


def all_masked_and_closed(args: list[Tensor]) -> None:
    args[3][:], args[4][:] = NONE, NONE


def closed_then_masked(args: list[Tensor]) -> None:
    """Close, add nothing for longer than a chunk, and begin again."""
    args[4][..., 5] = NONE
    args[3][..., 5:30] = NONE


def masked(args: list[Tensor]) -> None:
    args[3][..., 3:9] = NONE


def masked_from_zero(args: list[Tensor]) -> None:
    for t in args[5:]:
        t.zero_()
    args[3][..., :20] = NONE


def identities(args: list[Tensor]) -> None:
    args[3][..., 7:19], args[4][..., 7:19] = NONE, ALL


def identities_from_nothing(args: list[Tensor]) -> None:
    empty_state(args)
    args[3][..., :19], args[4][..., :19] = NONE, ALL


LEGAL: dict[str, Callable[[list[Tensor]], None]] = {
    f.__name__: f for f in (
        empty_state, empty_m, empty_some, large_m, huge_m, small_m, empty_then_masked, masked_and_closed,
        masked_and_closed_at_the_end, all_masked_and_closed, closed_then_masked, masked, masked_from_zero, identities,
        identities_from_nothing,
    )
}
every_legal = pytest.mark.parametrize("legal", LEGAL.values(), ids=LEGAL)


def drawn(legal: Callable[[list[Tensor]], None], dtype: torch.dtype) -> list[Tensor]:
    args = draw(Sizes(S=S), dtype)
    legal(args)
    return args


def flat(results: tuple[Tensor, tuple[Tensor, ...]]) -> list[Tensor]:
    h, state = results
    return [h, *state]


def hold(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    """Hold results to the oracle's; m may be -inf, in the same places; nothing is NaN."""
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a == NONE, b == NONE)
        assert torch.isfinite(torch.where(a == NONE, 0.0, a)).all()
    assert_close(found, wanted, tolerance)


def usable(results: list[Tensor]) -> list[Tensor]:
    """Return the results that a loss can look at: m only where it is finite."""
    return [torch.where(t == NONE, 0.0, t) for t in results]


@every_legal
@every_schedule
@every_dtype
def test_chunkwise_equals_recurrence(legal, schedule, dtype):
    args = drawn(legal, dtype)
    wanted = exact(args)
    for settings in ({}, {"segment": L, "heads_per_band": 2}):
        with config.use(**settings):
            hold(flat(mlstm_chunkwise(*args, chunk_size=L, schedule=schedule)), wanted, TOLERANCE[dtype])


@every_legal
@every_schedule
@every_dtype
def test_gradients_of_chunkwise_equal_those_of_the_recurrence(legal, schedule, dtype):
    args = [t.requires_grad_() for t in drawn(legal, dtype)]
    wide = [t.detach().double().requires_grad_() for t in args]
    wanted = torch.autograd.grad(weigh(usable(exact(wide))), wide)
    for settings in ({}, {"segment": L, "heads_per_band": 2}):
        with config.use(**settings):
            results = flat(mlstm_chunkwise(*args, chunk_size=L, schedule=schedule))
        hold(torch.autograd.grad(weigh(usable(results)), args), wanted, GRADIENT_TOLERANCE[dtype])


@every_legal
@every_dtype
def test_a_sequence_without_a_state_equals_recurrence(legal, dtype):
    """From zeros: on the CPU one chunk is a case of its own."""
    for size in (L, S):
        args = [t[:, :, :size].contiguous() for t in drawn(legal, dtype)[:5]]
        hold(flat(mlstm_chunkwise(*args, chunk_size=L, schedule="inductor")), exact(args), TOLERANCE[dtype])


@every_legal
@every_dtype
def test_pieces_equal_the_whole(legal, dtype):
    args = drawn(legal, dtype)
    h, state = [], tuple(args[5:])
    for start, stop in ((0, 5), (5, 11), (11, 12), (12, 17), (17, S)):
        part, state = mlstm_chunkwise(*[t[:, :, start:stop] for t in args[:5]], *state, chunk_size=L)
        h.append(part)
    hold([torch.cat(h, 2), *state], exact(args), TOLERANCE[dtype])


@every_legal
@every_dtype
def test_steps_equal_recurrence(legal, dtype):
    args = drawn(legal, dtype)
    state, written, h, h_written = tuple(args[5:]), [t.clone() for t in args[5:]], [], []
    for t in range(S):
        token = [*(x[:, :, t] for x in args[:3]), *(x[:, :, t, None] for x in args[3:5])]
        part, state = mlstm_step(*token, *state)
        h.append(part)
        h_written.append(mlstm_step_(*token, *written))
    wanted = exact(args)
    hold([torch.stack(h, 2), *state], wanted, TOLERANCE[dtype])
    hold([torch.stack(h_written, 2), *written], wanted, TOLERANCE[dtype])


@every_legal
@every_dtype
def test_gradients_of_a_step_equal_those_of_the_recurrence(legal, dtype):
    args = [t[:, :, :1] for t in drawn(legal, dtype)[:5]] + drawn(legal, dtype)[5:]
    token = [t.requires_grad_() for t in [*(x[:, :, 0] for x in args[:3]), *args[3:]]]
    with config.use(chunk_size=L):  # whose kernels are there
        found = torch.autograd.grad(weigh(usable(flat(mlstm_step(*token)))), token)
    wide = [t.detach().double().requires_grad_() for t in args]
    h, *state = exact(wide)
    wanted = torch.autograd.grad(weigh(usable([h[:, :, 0], *state])), wide)
    hold(found, [g.view(f.shape) for f, g in zip(found, wanted, strict=True)], GRADIENT_TOLERANCE[dtype])


# What is not finite


NAMES = ["q", "k", "v", "igate", "fgate", "c", "n", "m"]
BAD = 22


def spoiled(name: str, value: float, dtype: torch.dtype) -> list[Tensor]:
    """Return arguments with one element that is not finite, of token BAD or of the state of the same head."""
    args = draw(Sizes(S=S), dtype)
    t = args[NAMES.index(name)]
    head = t[0, 1, BAD] if name in NAMES[:5] else t[0, 1]
    head.view(-1)[-1:] = value
    return args


def hold_where_finite(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], tolerance: float) -> None:
    for name, a, b in zip(NAMES, found, wanted, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite()), name
    found, wanted = ([torch.where(t.isfinite(), t, 0.0) for t in ts] for ts in (found, wanted))
    assert_close(found, wanted, tolerance)


@pytest.mark.parametrize("seen", [BAD - 2, S], ids=["earlier tokens", "all tokens"])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("name", NAMES)
@every_schedule
@every_dtype
def test_what_is_not_finite_spreads_over_gradients_as_in_the_recurrence(dtype, schedule, name, value, seen):
    args = [t.requires_grad_() for t in spoiled(name, value, dtype)]
    wide = [t.detach().double().requires_grad_() for t in args]
    wanted = torch.autograd.grad(weigh([exact(wide)[0][:, :, :seen]]), wide)
    for settings in ({}, {"segment": L, "heads_per_band": 2}):
        with config.use(**settings):
            h = mlstm_chunkwise(*args, chunk_size=L, schedule=schedule)[0][:, :, :seen]
        hold_where_finite(torch.autograd.grad(weigh([h]), args), wanted, GRADIENT_TOLERANCE[dtype])


# Resets


CUTS = [14, 25]  # where documents begin


def documents(args: list[Tensor], starts: list[int]) -> list[Tensor]:
    """Run the documents of all rows one by one in float64, the first from the given state unless it is reset."""
    state, h = list(args[5:]), []
    for start, stop in zip([0, *starts], [*starts, S], strict=True):
        if start in starts:
            state = [torch.zeros_like(t) for t in state]
        part, *state = exact([*(t[:, :, start:stop] for t in args[:5]), *state])
        h.append(part)
    return [torch.cat(h, 2), *state]


def reset_at(starts: list[int]) -> Tensor:
    reset = torch.zeros(2, S, dtype=torch.bool)
    reset[:, starts] = True
    return reset


def spoil_a_document(name: str, value: float, dtype: torch.dtype) -> tuple[list[Tensor], list[int]]:
    """Return arguments with something that is not finite before the last document, and where documents begin."""
    args = spoiled(name, value, dtype)
    return args, CUTS if name in NAMES[:5] else [0, *CUTS]


@pytest.fixture(params=["on the CPU", "as on a GPU"])
def shut_out(request, monkeypatch):
    """Hold resets with looks at data, and as where looking would stall the device; return whether the latter."""
    apart = request.param == "as on a GPU"
    if apart:
        monkeypatch.setattr(packing, "_uses_mask", lambda reset, static=False: True)
    return apart


every_spoiled = pytest.mark.parametrize("name", NAMES)
every_value = pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)


@every_value
@every_spoiled
@every_schedule
@every_dtype
def test_a_reset_shuts_out_what_is_not_finite(dtype, schedule, name, value, shut_out):
    args, starts = spoil_a_document(name, value, dtype)
    found = flat(mlstm_chunkwise(*args, reset=reset_at(starts), chunk_size=L, schedule=schedule))
    wanted = documents(args, starts)
    for a, b in zip(found, wanted, strict=True):
        finite = a.isfinite()
        # As on a GPU, what is spoiled is so in every element.
        assert torch.equal(finite, b.isfinite()) if not shut_out else not (finite & ~b.isfinite()).any()
    assert found[0][:, :, :BAD if name in NAMES[:5] else S].isfinite().all()
    assert all(t.isfinite().all() for t in (found[0][:, :, CUTS[-1]:], *found[1:]))
    finite = found[0].isfinite()
    kept = [[torch.where(finite, h, 0.0), *state] for h, *state in (found, wanted)]
    assert_close(*kept, TOLERANCE[dtype])


@every_value
@every_spoiled
@every_schedule
@every_dtype
def test_a_documents_gradients_see_nothing_of_another(dtype, schedule, name, value, shut_out):
    args, starts = spoil_a_document(name, value, dtype)
    args = [t.requires_grad_() for t in args]
    wide = [t.detach().double().requires_grad_() for t in args]
    reset = reset_at(starts)
    for start, stop in ((0, CUTS[0]), (CUTS[-1], S)):
        h = mlstm_chunkwise(*args, reset=reset, chunk_size=L, schedule=schedule)[0]
        found = torch.autograd.grad(weigh([h[:, :, start:stop]]), args)
        state = wide[5:] if start not in starts else [torch.zeros_like(t) for t in wide[5:]]
        apart = exact([*(t[:, :, start:stop] for t in wide[:5]), *state])[0]
        wanted = torch.autograd.grad(weigh([apart]), wide, materialize_grads=True)
        hold(found, wanted, GRADIENT_TOLERANCE[dtype])


@pytest.mark.slow
@every_value
@every_spoiled
def test_gradients_of_all_documents(name, value, shut_out):
    args, starts = spoil_a_document(name, value, torch.float64)
    args = [t.requires_grad_() for t in args]
    h = mlstm_chunkwise(*args, reset=reset_at(starts), chunk_size=L)[0]
    found = torch.autograd.grad(weigh([h]), args)
    wanted = torch.autograd.grad(weigh([documents(args, starts)[0]]), args, materialize_grads=True)
    for a, b in zip(found, wanted, strict=True):
        assert (a.isfinite() <= b.isfinite()).all()
        of_others = torch.ones_like(a, dtype=torch.bool)
        if a.dim() > 2 and a.shape[2] == S and name in NAMES[:5]:
            of_others[:, :, CUTS[0]:CUTS[1]] = False
        assert a[of_others].isfinite().all()
        assert_close([torch.where(a.isfinite(), a, 0.0)], [torch.where(a.isfinite(), b, 0.0)], 1e-9)


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_a_static_packing_equals_a_packing(rate):
    args = draw(Sizes(S=S), torch.float64)
    reset = torch.rand(2, S, generator=torch.Generator().manual_seed(0)) < rate
    found = packing.forward(mlstm_recurrent, reset, args[:5], args[5:], static=True)
    assert_close(found, packing.forward(mlstm_recurrent, reset, args[:5], args[5:]), TOLERANCE[torch.float64])


def mlstm_recurrent(*args: Tensor) -> tuple[Tensor, ...]:
    return mlstm.recurrent(*args, eps=1e-6)


def test_a_static_packing_maps_and_traces_over_resets():
    args = draw(Sizes(S=9), torch.float64)
    resets = torch.rand(4, 2, 9, generator=torch.Generator().manual_seed(0)) < 0.3

    def run(reset: Tensor) -> tuple[Tensor, ...]:
        return tuple(packing.forward(mlstm_recurrent, reset, args[:5], args[5:], static=True))

    wanted = [packing.forward(mlstm_recurrent, reset, args[:5], args[5:]) for reset in resets]
    mapped = torch.func.vmap(run)(resets)
    assert_close(mapped, [torch.stack(ts) for ts in zip(*wanted, strict=True)], TOLERANCE[torch.float64])
    traced = make_fx(run)(resets[0])
    assert_close(traced(resets[1]), wanted[1], TOLERANCE[torch.float64])


@every_value
@every_spoiled
def test_a_static_packing_shuts_out_what_is_not_finite(name, value):
    args, starts = spoil_a_document(name, value, torch.float64)
    args = [t.requires_grad_() for t in args]
    h = packing.forward(mlstm_recurrent, reset_at(starts), args[:5], args[5:], static=True)[0][:, :, CUTS[-1]:]
    found = torch.autograd.grad(weigh([h]), args)
    wanted = torch.autograd.grad(weigh([documents(args, starts)[0][:, :, CUTS[-1]:]]), args, materialize_grads=True)
    assert_close([h], [documents(args, starts)[0][:, :, CUTS[-1]:]], 1e-10)
    for a, b in zip(found, wanted, strict=True):
        assert_close([a], [torch.where(b.isfinite(), b, 0.0)], 1e-9)


# Gates of any size


@pytest.mark.parametrize("spread", [5.0, 20.0, 100.0])
@every_schedule
def test_gates_of_any_size_keep_the_tolerance_where_q_n_does_not_cancel(schedule, spread):
    for seed in range(3):
        args = draw(Sizes(S=S), seed=seed, spread=spread)
        for t in (args[0], args[1], args[6]):
            t.abs_()
        found = flat(mlstm_chunkwise(*args, chunk_size=L, schedule=schedule))
        assert_close(found, exact(args), TOLERANCE[torch.float32] / 10)


@pytest.mark.parametrize("spread", [5.0, 20.0])
@every_schedule
def test_where_q_n_cancels_the_error_is_that_of_inputs_rounded_once_more(schedule, spread):
    for seed in range(3):
        args = draw(Sizes(S=S), seed=seed, spread=spread)
        wanted = exact(args)
        found = flat(mlstm_chunkwise(*args, chunk_size=L, schedule=schedule))
        assert_close(found[1:], wanted[1:], TOLERANCE[torch.float32])
        assert_close(found[:1], wanted[:1], float32_tolerance(args, wanted[0]))


# The sLSTM


CELL_NAMES = ["x", "y", "c", "n", "m"]


def draw_cells(dtype: torch.dtype, tokens: int = 11) -> list[Tensor]:
    """Return x, r, b and y, c, n, m, of three rows, two heads and four cells."""
    g = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64)

    cells = [normal(3, 2, 4), normal(3, 2, 4), normal(3, 2, 4).exp(), normal(3, 2, 4)]
    return [t.to(dtype) for t in (normal(3, tokens, 4, 2, 4) * 2, normal(4, 2, 4, 4) / 2, normal(4, 2, 4), *cells)]


def cells_masked_and_closed(args: list[Tensor]) -> None:
    args[0][0, 2:4, :2], args[0][1, -1, :2], args[0][2, 0, :2] = NONE, NONE, NONE


def cells_empty_m(args: list[Tensor]) -> None:
    args[6].fill_(NONE)


def cells_empty_state(args: list[Tensor]) -> None:
    for t, value in zip(args[4:], (0.0, 0.0, NONE), strict=True):
        t.fill_(value)
    args[0][1, :2, 0] = NONE


def cells_masked(args: list[Tensor]) -> None:
    args[0][:, 3:6, 0] = NONE


@pytest.mark.parametrize("legal", [cells_masked_and_closed, cells_empty_m, cells_empty_state, cells_masked])
@every_dtype
def test_slstm_and_its_gradients_equal_the_recurrence(legal, dtype):
    args = draw_cells(dtype)
    legal(args)
    wide = [t.double().requires_grad_() for t in args]
    wanted = slstm.recurrent(*wide)
    args = [t.requires_grad_() for t in args]
    found = flat(slstm_sequence(*args))
    hold(found, list(wanted), TOLERANCE[dtype])
    hold(torch.autograd.grad(weigh(found), args), torch.autograd.grad(weigh(wanted), wide), GRADIENT_TOLERANCE[dtype])
    state = tuple(t.detach() for t in args[3:])
    for t in range(args[0].shape[1]):
        state = slstm_step(args[0][:, t].detach(), *(a.detach() for a in args[1:3]), *state)
    hold(list(state), list(wanted[1:]), TOLERANCE[dtype])


@every_value
@pytest.mark.parametrize("name", CELL_NAMES)
@every_dtype
def test_an_slstms_document_sees_nothing_of_another(dtype, name, value):
    args = draw_cells(dtype)
    start = 0 if name != "x" else 6
    spoil = args[0][:, 3] if name == "x" else args[2 + CELL_NAMES.index(name)]
    spoil.fill_(value)
    reset = torch.zeros(3, 11, dtype=torch.bool)
    reset[:, start] = True
    args = [t.requires_grad_() for t in args]
    wide = [t.detach().double().requires_grad_() for t in args]
    h = slstm_sequence(*args, reset=reset)[0][:, start:]
    wanted = slstm.recurrent(wide[0][:, start:], *wide[1:3], *(torch.zeros_like(t) for t in wide[3:]))[0]
    hold([h], [wanted], TOLERANCE[dtype])
    found = torch.autograd.grad(weigh([h]), args)
    expected = torch.autograd.grad(weigh([wanted]), wide, materialize_grads=True)
    hold([found[0][:, start:], *found[3:]], [expected[0][:, start:], *expected[3:]], GRADIENT_TOLERANCE[dtype])
    assert_close([found[0][:, :start]], [expected[0][:, :start]], 0.0) if start else None
    assert_close(found[1:3], expected[1:3], GRADIENT_TOLERANCE[dtype])


@pytest.mark.parametrize("schedule", ["inductor", "queued"])
def test_a_trace_shows_which_segments_ran_token_by_token(schedule: str) -> None:
    q, k, v, igate, fgate = (t.requires_grad_() for t in draw(Sizes(S=3 * L), state=False))
    with torch.no_grad():
        v[0, 0, L + 1] = math.nan
    settings = {"segment": L, "heads_per_band": 6, "workers": 1}
    with config.use(**settings), trace.record() as recording:
        h, _ = mlstm_chunkwise(q, k, v, igate, fgate, chunk_size=L, schedule=schedule)
        h[:, :, :L].sum().backward()
    phases = {phase: {span.segment for span in recording.entries() if span.phase == phase}
              for phase in ("token_by_token", "token_by_token_backward")}
    assert phases["token_by_token"] == {1, 2}
    assert phases["token_by_token_backward"] >= {1, 2}
