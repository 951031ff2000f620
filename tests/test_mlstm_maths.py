"""Laws of the pure functions, uncompiled, against the float64 recurrence."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.oracle import TOLERANCE, Sizes, assert_close, draw, error, exact, weigh
from torch_xlstm_ops.maths import mlstm
from torch_xlstm_ops.maths.mlstm import recurrence

EPS = 1e-6


def chunked(args: list[torch.Tensor], L: int) -> list[torch.Tensor]:
    """Join batch and heads, and split tokens into chunks, as in a task."""
    streams, state = args[:5], args[5:]
    return [t.flatten(0, 1).unflatten(1, (-1, L)) for t in streams] + [t.flatten(0, 1) for t in state]


def whole(results: tuple[torch.Tensor, ...], sizes: Sizes) -> list[torch.Tensor]:
    """Undo `chunked` for h and the state."""
    h, *state = results
    return [t.unflatten(0, (sizes.B, sizes.NH)) for t in (h.flatten(1, 2), *state)]


sizes_and_chunk = st.builds(
    lambda B, NH, NC, L, DHQK, DHHV: (Sizes(B, NH, NC * L, DHQK, DHHV), L),
    *(st.integers(1, n) for n in (2, 3, 5, 9, 5, 6)),
)
gates = st.tuples(st.sampled_from([-30.0, -3.0, 0.0, 3.0, 30.0]), st.sampled_from([0.0, 0.5, 3.0, 20.0]))


@given(sizes_and_chunk, gates, st.integers(0, 2**16))
def test_segment_equals_recurrence(shape, gate, seed):
    sizes, L = shape
    args = draw(sizes, torch.float64, seed=seed, shift=gate[0], spread=gate[1])
    assert_close(whole(mlstm.segment(*chunked(args, L), eps=EPS), sizes), exact(args), 1e-10)


def emitted(args: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Compute a segment as a device does."""
    q, k, v, igate, fgate, c, n, m = args
    P, q_gated, W, dC, *state = mlstm.segment_factors(q, k, v, igate, fgate, mlstm.scores(q, k), c, n, m, eps=EPS)
    h = torch.empty_like(v)
    mlstm.write_output_(P, q_gated, mlstm.inter_chunk_states(W, dC, c), v, h.flatten(0, 1))
    return h, *state


def opened(args: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Compute a segment from a zero state as CUDA does."""
    q, k, v, igate, fgate = args[:5]
    found = mlstm.segment_factors_zero_state(q, k, v, igate, fgate, mlstm.scores(q, k), eps=EPS)
    P, q_gated, W, dC, n, m, keep, add = found
    h, c = torch.empty_like(v), torch.empty_like(args[5])
    C_before = mlstm.inter_chunk_states(W, dC, None)
    mlstm.write_output_(P, q_gated, C_before, v, h.flatten(0, 1))
    mlstm.final_state_(dC, C_before, keep, add, c)
    return h, c, n, m


def single(args: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Compute a segment of one chunk from a zero state."""
    q, k, v, igate, fgate = args[:5]
    P, *state = mlstm.segment_factors_single_chunk(q, k, v, igate, fgate, mlstm.scores(q, k), eps=EPS)
    h = torch.empty_like(v)
    mlstm.write_output_(P, None, None, v, h.flatten(0, 1))
    return h, *state


@given(sizes_and_chunk, gates, st.integers(0, 2**16), st.booleans())
def test_the_compiled_form_of_a_segment_equals_recurrence(shape, gate, seed, fresh):
    sizes, L = shape
    args = draw(sizes, torch.float64, seed=seed, shift=gate[0], spread=gate[1])
    for state in args[5:] if fresh else []:
        state.zero_()
    segment = opened if fresh else emitted
    assert_close(whole(segment(chunked(args, L)), sizes), exact(args), 1e-10)
    if fresh:
        assert_close(whole(single(chunked(args, sizes.S)), sizes), exact(args), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("segments", [8, 32])
def test_states_stay_exact_over_many_segments_with_open_gates(dtype, segments):
    sizes = Sizes(B=1, NH=2, S=64 * segments, DHQK=16, DHHV=16)
    args = draw(sizes, dtype, gates=torch.float32, state=False)
    args[3][:], args[4][:] = 0.0, 40.0
    state = [torch.zeros(size) for size in ((2, 16, 16), (2, 16), (2, 1))]
    parts = zip(*(t.flatten(0, 1).unflatten(1, (segments, -1, 16)).unbind(1) for t in args[:5]), strict=True)
    for number, part in enumerate(parts):
        h, *state = (emitted if number else opened)([*part, *state])
    wanted = exact(args)
    found = [h.flatten(1, 2)[None], *(t[None] for t in state)]
    assert_close(found, [wanted[0][:, :, -64:], *wanted[1:]], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("L", [8, 32, 96])
def test_segment_equals_recurrence_in_its_dtype(dtype, L):
    """Over many tokens: in a few, h can be the small quotient of nearly cancelling sums, and any rounding is large."""
    for seed in range(4):
        sizes = Sizes(B=2, NH=4, S=192, DHQK=32, DHHV=48)
        args = draw(sizes, dtype, seed=seed, gates=torch.float32)
        assert_close(whole(mlstm.segment(*chunked(args, L), eps=EPS), sizes), exact(args), TOLERANCE[dtype])


def test_a_state_in_parts_is_the_state():
    """As CUDA computes a large one."""
    g = torch.Generator().manual_seed(0)
    sizes = ((2, 3, 256, 5), (2, 3, 1), (2, 3, 256), (2, 3, 5), (2, 3, 256))
    c, forget, k, v, q = (torch.randn(size, generator=g, dtype=torch.float64) for size in sizes)
    parts, read = recurrence._update_parts(c, forget, k, v, q)
    assert parts.shape == (2, 3, 2, 128, 5)
    wanted, wanted_read = recurrence._update(c, forget, k, v, q)
    assert_close([parts.flatten(2, 3), read], [wanted, wanted_read], 1e-14)


@given(sizes_and_chunk, gates, st.integers(0, 2**16))
def test_gradients_equal_those_of_the_recurrence(shape, gate, seed):
    sizes, L = shape
    args = [t.requires_grad_() for t in draw(sizes, torch.float64, seed=seed, shift=gate[0], spread=gate[1])]
    found = torch.autograd.grad(weigh(whole(mlstm.segment(*chunked(args, L), eps=EPS), sizes)), args)
    wanted = torch.autograd.grad(weigh(exact(args)), args)
    assert_close(found, wanted, 1e-8)


def test_a_small_decay_is_exact_after_a_large_one():
    """Plain prefix sums in float32 would lose the decay of the last tokens after a sum of -20,000."""
    sizes = Sizes(1, 1, 64, 8, 8)
    args = draw(sizes, torch.float32, spread=0.1)
    args[4][..., :40] = -500.0
    args[4][..., 40:] = 6.0
    results = whole(mlstm.segment(*chunked(args, 32), eps=EPS), sizes)
    assert_close(results, exact(args), 1e-5)


@pytest.mark.parametrize("fgate", [0.0, -2.0, -30.0])
def test_decayed_weights_are_never_denormal(fgate):
    """A CPU's products take ten times as long with them."""
    args = draw(Sizes(1, 2, 256, 16, 16), torch.float32)
    args[4][:] += fgate - args[4].mean()
    args = chunked(args, 128)
    factors = mlstm.segment_factors(*args[:5], mlstm.scores(*args[:2]), *args[5:], eps=EPS)
    for t in factors[:4]:
        denormal = (t != 0) & (t.abs() < torch.finfo(t.dtype).tiny)
        assert denormal.float().mean() < 1e-3


def test_a_closed_forget_gate_drops_the_state():
    sizes = Sizes(1, 2, 32, 4, 4)
    args = draw(sizes, torch.float64)
    args[4][0, 0, 13] = args[4][0, 1, 0] = args[4][0, 1, 16] = -torch.inf
    assert_close(whole(mlstm.segment(*chunked(args, 8), eps=EPS), sizes), exact(args), 1e-12)
    assert_close(whole(emitted(chunked(args, 8)), sizes), exact(args), 1e-12)
    for state in args[5:]:
        state.zero_()
    assert_close(whole(opened(chunked(args, 8)), sizes), exact(args), 1e-12)


def test_padding_is_the_identity():
    sizes = Sizes(1, 2, 24, 4, 4)
    args = draw(sizes, torch.float64)
    args[3][..., 11:], args[4][..., 11:] = -torch.inf, torch.inf
    h, *state = whole(mlstm.segment(*chunked(args, 8), eps=EPS), sizes)
    cut = [t[:, :, :11] for t in args[:5]] + args[5:]
    assert_close([h[:, :, :11], *state], exact(cut), 1e-12)


def test_a_segment_of_padding_keeps_the_state():
    args = draw(Sizes(1, 2, 16, 4, 4), torch.float32)
    args[3][:], args[4][:] = -torch.inf, torch.inf
    for _, *state in (mlstm.segment(*chunked(args, 8), eps=EPS), emitted(chunked(args, 8))):
        for found, given_ in zip(state, args[5:], strict=True):
            assert torch.equal(found, given_.flatten(0, 1))


def test_extreme_gates_stay_finite_with_their_gradients():
    for igate in (-1e4, 1e4):
        for fgate in (-1e4, 1e4):
            args = draw(Sizes(1, 2, 32, 4, 4), torch.float32)
            args[3][:], args[4][:] = igate, fgate
            args = [t.requires_grad_() for t in args]
            results = mlstm.segment(*chunked(args, 8), eps=EPS)
            gradients = torch.autograd.grad(weigh(results), args)
            assert all(t.isfinite().all() for t in (*results, *gradients))


@given(st.integers(0, 2**16), gates)
def test_monoid_is_associative_and_equals_the_state_of_the_whole(seed, gate):
    sizes = Sizes(1, 2, 24, 4, 3)
    args = chunked(draw(sizes, torch.float64, seed=seed, shift=gate[0], spread=gate[1]), 4)
    parts = [mlstm.summarize(*[t[:, a:b] for t in args[1:5]])[:4] for a, b in ((0, 1), (1, 4), (4, 6))]
    left = mlstm.combine(mlstm.combine(parts[0], parts[1]), parts[2])
    right = mlstm.combine(parts[0], mlstm.combine(parts[1], parts[2]))
    assert_close(left, right, 1e-12)
    one_by_one = args[5:]
    for part in parts:
        one_by_one = mlstm.absorb(*part, *one_by_one)
    assert_close(one_by_one, mlstm.absorb(*left, *args[5:]), 1e-12)
    assert_close(one_by_one, mlstm.final_state(*args[1:]), 1e-12)
    assert_close(one_by_one, mlstm.segment(*args, eps=EPS)[1:], 1e-12)


def test_float16_products_over_a_segment_do_not_overflow():
    args = draw(Sizes(1, 1, 4096, 4, 4), torch.float16, gates=torch.float32)
    args[1][:], args[2][:] = 8.0, 8.0
    args[3][:], args[4][:] = 0.0, 40.0  # nothing is forgotten: c sums 4,096 products of 64
    h, *_ = mlstm.segment(*chunked(args, 64), eps=EPS)
    assert error(h.flatten(1, 2)[None], exact(args)[0]) <= TOLERANCE[torch.float16]


def with_infinities(args: list[torch.Tensor], L: int) -> list[torch.Tensor]:
    """Return a segment's arguments with gates of -inf and an empty state in its first row."""
    args = chunked(args, L)
    igate, fgate, m = args[3], args[4], args[7]
    igate[0, 0, 0] = igate[0, 1, 1] = fgate[0, 1, 1] = igate[1, 0, 2] = fgate[1, 1, 0] = -torch.inf
    igate[1, 1, 1], fgate[1, 1, 1] = -torch.inf, torch.inf
    m[0] = -torch.inf
    return args


@pytest.fixture(params=["finite", "with -inf"])
def segment_args(request):
    args = draw(Sizes(1, 2, 6, 2, 3), torch.float64, seed=1)
    return with_infinities(args, 3) if request.param == "with -inf" else chunked(args, 3)


def pure(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return mlstm.segment(*args, eps=EPS)


def test_the_pure_segment_has_exact_first_and_second_derivatives(segment_args):
    args = [t.requires_grad_() for t in segment_args]
    assert torch.autograd.gradcheck(pure, args)
    assert torch.autograd.gradgradcheck(pure, args)


def test_the_pure_segment_has_an_exact_forward_derivative(segment_args):
    g = torch.Generator().manual_seed(2)
    tangents = [torch.randn(t.shape, generator=g, dtype=torch.float64) for t in segment_args]
    results, found = torch.func.jvp(pure, tuple(segment_args), tuple(tangents))
    inputs = [t.clone().requires_grad_() for t in segment_args]
    for number, derivative in enumerate(found):
        weight = torch.randn(derivative.shape, generator=g, dtype=torch.float64)
        gradients = torch.autograd.grad(pure(*inputs)[number], inputs, weight, materialize_grads=True)
        wanted = sum((a * b).sum() for a, b in zip(gradients, tangents, strict=True))
        assert_close([(weight * derivative).sum()[None]], [wanted[None]], 1e-9)
    assert_close(results, pure(*segment_args), 1e-12)


def test_the_pure_segment_maps(segment_args):
    many = [torch.stack([t, t * 0.5]) for t in segment_args]
    mapped = torch.func.vmap(pure)(*many)
    looped = [pure(*[t[i] for t in many]) for i in range(2)]
    assert_close(mapped, [torch.stack(ts) for ts in zip(*looped, strict=True)], 1e-12)


@pytest.mark.parametrize("L", [2, 3, 6])
def test_minus_infinity_in_every_form_of_a_segment_equals_recurrence(L):
    args = draw(Sizes(1, 2, 12, 2, 3), torch.float64, seed=1)
    for fresh in (False, True):
        parts = with_infinities([t.clone() for t in args], 3)
        for state in parts[5:] if fresh else []:
            state.zero_()
        streams = [t.flatten(1, 2) for t in parts[:5]]
        wanted = mlstm.recurrent(*streams, *parts[5:], eps=EPS)
        parts = [*(t.unflatten(1, (-1, L)) for t in streams), *parts[5:]]
        one_by_one = mlstm.absorb(*mlstm.summarize(*parts[1:5])[:4], *parts[5:])
        found = [pure(*parts), emitted(parts), *([opened(parts)] if fresh else [])]
        for h, *state in found:
            assert_close([h.flatten(1, 2), *state], wanted, 1e-12)
            assert_close(one_by_one, state, 1e-12)
        if fresh:
            h, *state = single([*(t.flatten(1, 2)[:, None] for t in parts[:5]), *parts[5:]])
            assert_close([h.flatten(1, 2), *state], wanted, 1e-12)


def test_combine_with_empty_elements_is_the_identity():
    args = chunked(draw(Sizes(1, 2, 12, 2, 3), torch.float64), 3)
    args[3][:, 0], args[4][:, 0, 1] = -torch.inf, -torch.inf
    args[3][0, 1:3], args[4][0, 1] = -torch.inf, -torch.inf
    parts = [mlstm.summarize(*[t[:, a:b] for t in args[1:5]])[:4] for a, b in ((0, 1), (1, 3), (3, 4))]
    found = mlstm.absorb(*mlstm.combine(mlstm.combine(parts[0], parts[1]), parts[2]), *args[5:])
    assert_close(found, pure(*args)[1:], 1e-12)
