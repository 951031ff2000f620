"""Laws of the mLSTM operators, compiled, on the CPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from tests.oracle import GRADIENT_TOLERANCE, TOLERANCE, Sizes, assert_close, draw, exact, float32_tolerance, weigh
from tests.parameters import tail
from torch_xlstm_ops import config, mlstm_chunkwise, mlstm_step, mlstm_step_, trace
from torch_xlstm_ops.maths import mlstm
from torch_xlstm_ops.ops.mlstm import dispatch
from torch_xlstm_ops.ops.mlstm import step as step_operator
from torch_xlstm_ops.runtime import compiler

L = 16  # one chunk size and one pair of head dimensions: each new one is a compile
ops = torch.ops.xlstm
DTYPES = list(TOLERANCE)


def flat(results):
    h, state = results
    return [h, *state]


def step_args(args, t=0):
    """Return a step's arguments: token t of a sequence, and its initial state."""
    q, k, v, igate, fgate, *state = args
    return [q[:, :, t], k[:, :, t], v[:, :, t], igate[:, :, t, None], fgate[:, :, t, None], *state]


@pytest.mark.parametrize("S", [1, 2, 5, 15, 16, 17, 63, 65, 200])
@pytest.mark.parametrize("state", [True, False], ids=["carried", "fresh"])
def test_chunkwise_equals_recurrence(S, state):
    args = draw(Sizes(S=S), state=state)
    assert_close(flat(mlstm_chunkwise(*args, chunk_size=L)), exact(args), TOLERANCE[torch.float32])


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", tail(DTYPES, lambda t: t == torch.float32), ids=str)
def test_chunkwise_equals_recurrence_in_each_dtype(dtype):
    args = draw(Sizes(S=100), dtype, gates=torch.float32 if dtype == torch.float16 else None)
    h, *state = results = flat(mlstm_chunkwise(*args, chunk_size=L))
    assert h.dtype == dtype
    assert {t.dtype for t in state} == {torch.float64 if dtype == torch.float64 else torch.float32}
    assert_close(results, exact(args), TOLERANCE[dtype])


@given(
    S=st.integers(1, 130), segment=st.integers(1, 100), band=st.integers(1, 7), seed=st.integers(0, 2**16),
    schedule=st.sampled_from(["inductor", "auto"]), gate=st.tuples(st.floats(-8, 8), st.floats(0, 8)),
)
def test_no_plan_changes_the_result(S, segment, band, seed, schedule, gate):
    args = draw(Sizes(S=S), seed=seed, shift=gate[0], spread=gate[1])
    with config.use(segment=segment, heads_per_band=band):
        found = flat(mlstm_chunkwise(*args, chunk_size=L, schedule=schedule))
    wanted = exact(args)
    assert_close(found, wanted, float32_tolerance(args, wanted[0]))


@given(S=st.integers(2, 80), data=st.data())
def test_a_sequence_split_anywhere_is_the_same(S, data):
    cut = data.draw(st.integers(0, S))
    args = draw(Sizes(S=S), torch.float64, seed=S)
    first = [t[:, :, :cut] for t in args[:5]]
    rest = [t[:, :, cut:] for t in args[:5]]
    h1, state = mlstm_chunkwise(*first, *args[5:], chunk_size=L)
    h2, state = mlstm_chunkwise(*rest, *state, chunk_size=L)
    assert_close([torch.cat([h1, h2], 2), *state], exact(args), TOLERANCE[torch.float64])


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Let calls begin as on CUDA, with uninitialised memory full of NaN."""
    monkeypatch.setattr(mlstm, "prefers_zero_state", lambda device: True)
    dispatch.forget()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    dispatch.forget()


@pytest.mark.slow
@pytest.mark.parametrize("S", [65, 1, 16, 200])
@pytest.mark.parametrize("schedule", ["inductor", "queued", "recurrent"])
def test_a_call_that_opens_equals_recurrence(as_on_cuda, S, schedule):
    args = draw(Sizes(S=S), state=False)
    for settings in ({}, {"segment": 32, "heads_per_band": 1}):
        with config.use(**settings):
            found = flat(mlstm_chunkwise(*args, chunk_size=L, schedule=schedule))
            again = flat(mlstm_chunkwise(*args, *found[1:], chunk_size=L, schedule=schedule))
        wanted = exact(args)
        assert_close(found, wanted, TOLERANCE[torch.float32])
        assert_close(again, exact([*args, *wanted[1:]]), TOLERANCE[torch.float32])


@pytest.mark.parametrize("sizes", [Sizes(S=0), Sizes(B=0, S=16)], ids=str)
def test_a_call_without_tokens_opens_nothing(as_on_cuda, sizes):
    for state in flat(mlstm_chunkwise(*draw(sizes, state=False), chunk_size=L))[1:]:
        assert torch.equal(state, torch.zeros_like(state))


@pytest.mark.smoke
def test_schedules_agree():
    args = draw(Sizes(S=40))
    by_chunks = flat(mlstm_chunkwise(*args, chunk_size=L, schedule="inductor"))
    by_steps = flat(mlstm_chunkwise(*args, schedule="recurrent"))
    assert_close(by_chunks, by_steps, TOLERANCE[torch.float32])


def apart(args, reset):
    """Run the documents of each row one by one, the first from the given state."""
    rows = []
    for b, row_reset in enumerate(reset):
        streams, state, h = [t[b:b + 1] for t in args[:5]], [t[b:b + 1] for t in args[5:]], []
        cuts = [0, *row_reset.nonzero()[:, 0].tolist(), len(row_reset)]
        for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
            state = [torch.zeros_like(t) for t in state] if number else state
            if stop > start:
                part, *state = exact([*(t[:, :, start:stop] for t in streams), *state])
                h.append(part)
        rows.append([torch.cat(h, 2), *state])
    return [torch.cat(ts) for ts in zip(*rows, strict=True)]


@pytest.mark.slow
@given(S=st.integers(1, 80), seed=st.integers(0, 2**16), rate=st.sampled_from([0.05, 0.5, 1.0]))
def test_a_reset_starts_afresh(S, seed, rate):
    args = [t.requires_grad_() for t in draw(Sizes(S=S), torch.float64, seed=seed)]
    reset = torch.rand(args[0].shape[0], S, generator=torch.Generator().manual_seed(seed)) < rate
    found, wanted = flat(mlstm_chunkwise(*args, reset=reset, chunk_size=L)), apart(args, reset)
    assert_close(found, wanted, TOLERANCE[torch.float64])
    gradients = torch.autograd.grad(weigh(found), args)
    expected = torch.autograd.grad(weigh(wanted), args, materialize_grads=True)
    assert_close(gradients, expected, GRADIENT_TOLERANCE[torch.float64])


def test_a_mask_without_resets_changes_nothing():
    args = draw(Sizes(S=40))
    reset = torch.zeros(args[0].shape[0], 40, dtype=torch.bool)
    found = flat(mlstm_chunkwise(*args, reset=reset, chunk_size=L))
    assert all(map(torch.equal, found, flat(mlstm_chunkwise(*args, chunk_size=L))))


@pytest.mark.parametrize("layout", ["B S NH D", "every second token", "expanded batch"])
def test_strides_do_not_matter(layout):
    args = draw(Sizes(S=40))
    if layout == "B S NH D":
        strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in args[:3]] + args[3:]
    elif layout == "every second token":
        strided = [t.repeat_interleave(2, 2)[:, :, ::2] for t in args[:5]] + args[5:]
    else:
        strided = [t[:1].expand_as(t) for t in args]
        args = [t.contiguous() for t in strided]
    assert_close(flat(mlstm_chunkwise(*strided, chunk_size=L)), exact(args), TOLERANCE[torch.float32])
    assert_close(flat(mlstm_step(*step_args(strided))), _one_token(args), TOLERANCE[torch.float32])


def _one_token(args):
    h, *state = exact([t[:, :, :1] for t in args[:5]] + args[5:])
    return [h[:, :, 0], *state]


@pytest.mark.parametrize("dtype", tail(DTYPES, lambda t: t != torch.float16), ids=str)
def test_step_equals_recurrence(dtype):
    args = draw(Sizes(S=1), dtype)
    assert_close(flat(mlstm_step(*step_args(args))), _one_token(args), TOLERANCE[dtype])


@pytest.mark.smoke
def test_prefill_then_steps_equals_prefill():
    args = draw(Sizes(S=24))
    h, state = mlstm_chunkwise(*[t[:, :, :20] for t in args[:5]], *args[5:], chunk_size=L)
    outputs = [h]
    for t in range(20, 24):
        h, state = mlstm_step(*step_args([*args[:5], *state], t))
        outputs.append(h[:, :, None])
    assert_close([torch.cat(outputs, 2), *state], exact(args), TOLERANCE[torch.float32])


@pytest.mark.smoke
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
def test_step_in_place_equals_step(contiguous):
    args = step_args(draw(Sizes(S=1)))
    if not contiguous:
        args[5] = args[5].mT.contiguous().mT
    h, state = mlstm_step(*args)
    versions = [t._version for t in args[5:]]
    assert torch.equal(mlstm_step_(*args), h)
    for written, wanted in zip(args[5:], state, strict=True):
        assert torch.equal(written, wanted)
    assert all(t._version > v for t, v in zip(args[5:], versions, strict=True))


def test_no_tokens_give_a_copy_of_the_state():
    args = draw(Sizes(S=0))
    h, state = mlstm_chunkwise(*args)
    assert h.shape == (2, 3, 0, 16)
    for found, given_ in zip(state, args[5:], strict=True):
        assert torch.equal(found, given_)
        assert found.data_ptr() != given_.data_ptr()
    _, state = mlstm_chunkwise(*args[:5])
    assert all(not t.any() for t in state)


@pytest.mark.parametrize("sizes", [Sizes(B=0), Sizes(NH=0)], ids=["B", "NH"])
def test_empty_axes(sizes):
    args = draw(sizes)
    h, state = mlstm_chunkwise(*args, chunk_size=L)
    assert h.shape == args[2].shape
    assert [t.shape for t in state] == [t.shape for t in args[5:]]


@pytest.mark.parametrize("stream", range(5), ids=["q", "k", "v", "igate", "fgate"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("fresh", [False, True], ids=["three chunks", "one chunk from nothing"])
def test_what_is_not_finite_spreads_as_in_the_recurrence(stream, value, fresh):
    args, at = draw(Sizes(S=L if fresh else 40)), L // 2 if fresh else 22
    for state in args[5:] if fresh else []:
        state.zero_()
    args[stream][0, 1, at] = value
    found = flat(mlstm_chunkwise(*args[: 5 if fresh else 8], chunk_size=L, schedule="inductor"))
    for a, b in zip(found, exact(args), strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())
    assert found[0][:, 0].isfinite().all()
    assert found[0][0, 1, :at].isfinite().all()


def test_a_closed_forget_gate_and_extreme_gates():
    args = draw(Sizes(S=40))
    args[4][0, 0, 11] = -torch.inf
    assert_close(flat(mlstm_chunkwise(*args, chunk_size=L)), exact(args), TOLERANCE[torch.float32])
    for igate, fgate in itertools.product((-1e4, 1e4), repeat=2):
        args[3][:], args[4][:] = igate, fgate
        assert all(t.isfinite().all() for t in flat(mlstm_chunkwise(*args, chunk_size=L)))


# Gradients


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", tail(DTYPES, lambda t: t == torch.float32), ids=str)
def test_gradients_equal_those_of_the_recurrence(dtype):
    args = draw(Sizes(S=50), dtype, gates=torch.float32 if dtype == torch.float16 else None)
    args = [t.requires_grad_() for t in args]
    with config.use(segment=2 * L, heads_per_band=4):
        found = torch.autograd.grad(weigh(flat(mlstm_chunkwise(*args, chunk_size=L))), args)
    wide = [t.detach().double().requires_grad_() for t in args]
    wanted = torch.autograd.grad(weigh(exact(wide)), wide)
    assert [g.dtype for g in found] == [t.dtype for t in args]
    assert_close(found, wanted, GRADIENT_TOLERANCE[dtype])


def test_gradients_of_a_band_whose_padding_makes_it_as_large_as_the_whole():
    args = [t.requires_grad_() for t in draw(Sizes(B=2, NH=4, S=L // 2))]
    with config.use(heads_per_band=4):
        found = torch.autograd.grad(weigh(flat(mlstm_chunkwise(*args, chunk_size=L))), args)
    wide = [t.detach().double().requires_grad_() for t in args]
    assert_close(found, torch.autograd.grad(weigh(exact(wide)), wide), GRADIENT_TOLERANCE[torch.float32])


@pytest.mark.parametrize("shift", [-10.0, -30.0])
def test_gradients_of_gates_that_are_nearly_closed_are_as_exact(shift):
    args = [t.requires_grad_() for t in draw(Sizes(S=50), shift=shift)]
    found = torch.autograd.grad(weigh(flat(mlstm_chunkwise(*args, chunk_size=L))), args)
    wide = [t.detach().double().requires_grad_() for t in args]
    assert_close(found, torch.autograd.grad(weigh(exact(wide)), wide), GRADIENT_TOLERANCE[torch.float32])


@pytest.mark.parametrize("state", [True, False], ids=["carried", "fresh"])
def test_gradcheck(state):
    args = [t.requires_grad_() for t in draw(Sizes(B=1, NH=2, S=20), torch.float64, state=state)]
    with config.use(segment=L):
        assert torch.autograd.gradcheck(lambda *a: ops.mlstm_chunkwise(*a, chunk_size=L), args, fast_mode=True)


def test_step_has_the_gradients_of_a_sequence_of_one():
    args = [t.requires_grad_() for t in step_args(draw(Sizes(S=1), torch.float64))]
    with config.use(chunk_size=L):
        assert torch.autograd.gradcheck(lambda *a: ops.mlstm_step(*a), args, fast_mode=True)


def test_gradients_of_some_inputs_only():
    args = draw(Sizes(S=20))
    args[1].requires_grad_()
    h, _ = mlstm_chunkwise(*args, chunk_size=L)
    h.sum().backward()
    assert args[1].grad is not None
    assert args[0].grad is None


def test_step_in_place_refuses_gradients():
    args = step_args(draw(Sizes(S=1)))
    before = [t.clone() for t in args]
    args[0].requires_grad_()
    with pytest.raises(RuntimeError, match="mlstm_step_ is in place and not differentiable"):
        mlstm_step_(*args)
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))
    with torch.no_grad():
        mlstm_step_(*args)


# The dispatcher


def _cases():
    step = step_args(draw(Sizes(S=1)))
    sequence = draw(Sizes(S=20))
    results = [torch.randn_like(t) for t in exact(sequence)]
    results = [results[0].float(), *[t.float() for t in results[1:]]]
    return {
        "mlstm_step": (step, {}),
        "mlstm_step_": (step, {}),
        "mlstm_chunkwise": (sequence, {"chunk_size": L}),
        "mlstm_chunkwise-fresh": (sequence[:5], {"chunk_size": L}),
        "mlstm_chunkwise-recurrent": (sequence, {"schedule": "recurrent"}),
        "mlstm_chunkwise_backward": ([*results, *sequence], {"chunk_size": L}),
    }


CASES = _cases()


@pytest.mark.smoke
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:.*mutated.*")
def test_opcheck(case):
    args, kwargs = CASES[case]
    opcheck(getattr(ops, case.partition("-")[0]).default, tuple(t.clone() for t in args), kwargs)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch 2.14 hides its own
def test_opcheck_learning():
    args = tuple(t.requires_grad_() for t in draw(Sizes(S=20)))
    opcheck(ops.mlstm_chunkwise.default, args, {"chunk_size": L})
    reset = torch.arange(20).expand(args[0].shape[0], 20) % 7 == 3
    opcheck(ops.mlstm_chunkwise.default, (*args, reset), {"chunk_size": L})


@pytest.mark.smoke
@pytest.mark.parametrize("case", ["mlstm_step", "mlstm_chunkwise", "mlstm_chunkwise_backward"])
def test_vmap_equals_a_loop(case):
    args, kwargs = CASES[case]
    op = getattr(ops, case)
    many = [torch.stack([t, t * 0.5, t * 0.25], 1) for t in args]  # mapped over the second axis
    mapped = torch.func.vmap(lambda *a: op(*a, **kwargs), in_dims=1)(*many)
    looped = [op(*[t[:, i] for t in many], **kwargs) for i in range(3)]
    assert_close(mapped, [torch.stack(ts) for ts in zip(*looped, strict=True)], 1e-6)


def test_vmap_over_some_arguments():
    args = draw(Sizes(S=20))
    mapped = torch.func.vmap(lambda q: ops.mlstm_chunkwise(q, *args[1:], chunk_size=L)[0])(torch.stack([args[0]] * 2))
    assert_close([mapped[1]], [exact(args)[0]], TOLERANCE[torch.float32])


@pytest.mark.slow
def test_autocast_casts_the_streams_alone():
    args = draw(Sizes(S=20))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h, state = mlstm_chunkwise(*args, chunk_size=L)
        one, _ = mlstm_step(*step_args(args))
    assert (h.dtype, one.dtype, state.c.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    narrow = [t.bfloat16() for t in args[:3]] + args[3:]
    assert torch.equal(h, mlstm_chunkwise(*narrow, chunk_size=L)[0])


@pytest.mark.smoke
def test_export_keeps_the_operator_for_any_length():
    class Model(torch.nn.Module):
        def forward(self, *args):
            return ops.mlstm_chunkwise(*args, chunk_size=L)

    S = torch.export.Dim("S", min=2, max=4096)
    exported = torch.export.export(Model(), tuple(draw(Sizes(S=20), state=False)), dynamic_shapes=(({2: S},) * 5,))
    assert next(n.target for n in exported.graph.nodes if n.op == "call_function") == ops.mlstm_chunkwise.default
    args = draw(Sizes(S=33), state=False)
    assert_close(exported.module()(*args), exact(args), TOLERANCE[torch.float32])


@pytest.mark.smoke
def test_inside_an_outer_compile_with_gradients():
    def loss(*args):
        h, c, n, m = ops.mlstm_chunkwise(*args, chunk_size=L)
        return (h * 2).sum() + c.sum() + n.sum() + m.sum()

    args = [t.requires_grad_() for t in draw(Sizes(S=20))]
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*args), args)
    assert_close(found, torch.autograd.grad(loss(*args), args), 1e-6)


def test_inference_mode_and_no_grad():
    args = draw(Sizes(S=20))
    wanted = flat(mlstm_chunkwise(*args, chunk_size=L))
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            found = flat(mlstm_chunkwise(*args, chunk_size=L))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_an_auto_schedule_as_an_argument_wins_over_the_configured_one():
    args = draw(Sizes(S=20))
    with config.use(schedule="recurrent"), trace.record() as recording:
        mlstm_chunkwise(*args, chunk_size=L)
        mlstm_chunkwise(*args, chunk_size=L, schedule="auto")
    assert [entry.schedule for entry in recording.entries()] == ["recurrent", "inductor"]


def test_clear_forgets_what_calls_found():
    step = step_args(draw(Sizes(S=1)))
    wanted = flat(mlstm_step(*step))
    compiler.clear()
    assert step_operator._calls.hit(tuple(step), mlstm.advance, 1e-6) is None
    assert all(map(torch.equal, flat(mlstm_step(*step)), wanted))
