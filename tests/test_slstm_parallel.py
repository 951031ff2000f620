"""Laws of the sLSTM parallel in time: its result equals the recurrence, or the sequential schedule computes it."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.oracle import GRADIENT_TOLERANCE, TOLERANCE, assert_close, error, weigh
from tests.test_slstm import DH, NH, draw, draw_reset, exact
from torch_xlstm_ops import config, slstm_sequence, trace
from torch_xlstm_ops.kernels import slstm_parallel as kernels
from torch_xlstm_ops.kernels.slstm_parallel import compile_call
from torch_xlstm_ops.maths import slstm
from torch_xlstm_ops.maths.slstm.parallel.certificate import judge
from torch_xlstm_ops.ops.slstm import layout, sequence
from torch_xlstm_ops.ops.slstm import parallel as operators
from torch_xlstm_ops.schedules.slstm import parallel as windows
from torch_xlstm_ops.schedules.slstm import rounds

INF, NAN = math.inf, math.nan
CHUNK, GROUP, WINDOW = 2, 4, 48  # more chunks than two levels of groups hold
KIND, TOLERATED = "kind", 1e-3


def eager_call(fn, **static):
    """Return what calls a function of the maths without compiling it."""
    return torch.no_grad()(lambda args: fn(*args, **static))


def sequential(x, r, b, state, reset, floor):
    return slstm.recurrent(x, r, b, *state, reset, floor=floor)


def sequential_backward(dh, dstate, x, r, b, state, h, reset, floor):
    leaves = [t.detach().requires_grad_() for t in (x, r, b, *state)]
    with torch.enable_grad():
        results = slstm.recurrent(*leaves, reset, floor=floor)
        return torch.autograd.grad(results, leaves, [dh.to(results[0].dtype), *dstate])


@pytest.fixture(autouse=True, params=[pytest.param(False, id="scan"), pytest.param(True, id="walk")])
def short_chunks(monkeypatch, request):
    """Have short chunks, few in a group, whose cells come of a scan, or of a walk in the kernel that needs them."""
    monkeypatch.setattr(layout, "CHUNK", CHUNK)
    for module in (kernels, windows):
        monkeypatch.setattr(module, "GROUP", GROUP)
    monkeypatch.setattr(kernels, "WALKING", {"cpu"} if request.param else set())


def solver(most=64, caller=eager_call):
    limits = {dtype: rounds.Limits(WINDOW, most, 8) for dtype in operators.LIMITS}
    return operators.Parallel(sequential, sequential_backward, caller=caller, limits=limits)


def run(args, reset=None, floor=0.0, most=64):
    """Return h, y, c, n, m and the report."""
    x, r, b, *state = args
    parallel = solver(most)
    with torch.no_grad():
        return parallel.forward(x, r, b, state, reset, floor), parallel.report


def scaled(args, gain=1.0, inputs=1.0, forget=0.0):
    x, r, b, *state = args
    b = b.clone()
    b[1] += forget
    return [x * inputs, r * gain, b, *state]


# --- the recurrence ---


@given(
    S=st.integers(1, 40), seed=st.integers(0, 999), floor=st.sampled_from([0.0, 1.0, 1.7]),
    state=st.sampled_from(["carried", "fresh", "mixed"]), masked=st.booleans(),
)
def test_rounds_and_their_gradient_are_the_recurrence(S, seed, floor, state, masked):
    layout.CHUNK = CHUNK
    x, r, b, *before = args = [t.double() for t in draw(S, seed=seed, state=state)]
    reset = draw_reset(S, seed=seed) if masked else None
    parallel = solver()
    with torch.no_grad():
        found = parallel.forward(x, r, b, before, reset, floor)
    wanted = exact(args, reset, floor)
    assert_close(found, wanted, TOLERANCE[torch.float64])
    given_gradients = [torch.randn_like(t) for t in wanted]
    leaves = [t.clone().requires_grad_() for t in args]
    gradients = torch.autograd.grad(exact(leaves, reset, floor), leaves, given_gradients)
    dh, *dstate = given_gradients
    with torch.no_grad():
        found = parallel.backward(dh, dstate, x, r, b, before, found[0], reset, floor)
    assert_close(found, gradients, GRADIENT_TOLERANCE[torch.float64])


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("S", [1, 37])
def test_rounds_are_the_recurrence_in_each_dtype(dtype, S):
    args = draw(S, dtype, seed=S)
    found, _ = run(args)
    assert found[0].dtype == dtype
    assert_close(found, exact(args), TOLERANCE[dtype])


def test_results_are_tensors_of_their_own():
    x, *others = draw(16)
    (h, *_), _ = run([x[:1].clone(), others[0], others[1], *(t[:1].clone() for t in others[2:])])
    assert not h._is_view()
    h.mul_(2)


def test_as_many_rounds_as_tokens_are_exact():
    x, r, b, *state = args = [t.double() for t in scaled(draw(8), gain=8.0)]
    parallel = solver()
    parallel._known[torch.float64] = rounds.KnownRounds(10)
    with torch.no_grad():
        found = parallel.forward(x, r, b, state, None, 0.0)
    assert_close(found, exact(args), 1e-12)
    assert parallel.report._replace(error=0.0, residual=0.0) == rounds.Report(10, 0.0, 0.0, 1, 0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compiled_rounds_that_change_nothing_leave_no_residual(dtype):
    x, r, b, *state = draw(8, dtype)
    parallel = solver(caller=compile_call)
    parallel._known[dtype] = rounds.KnownRounds(10)
    with torch.no_grad():
        h, *_ = parallel.forward(x, r, b, state, None, 0.0)
        assert parallel.report == rounds.Report(10, 0.0, 0.0, 1, 0)
        parallel.backward(torch.ones_like(h), [torch.ones_like(t) for t in state], x, r, b, state, h, None, 0.0)
    assert parallel.report == rounds.Report(10, 0.0, 0.0, 1, 0)


def test_a_reset_may_be_at_every_token():
    args = draw(9)
    reset = torch.ones(3, 9, dtype=torch.bool)
    assert_close(run(args, reset)[0], exact(args, reset), TOLERANCE[torch.float32])
    for t in range(9):
        one = torch.zeros_like(reset)
        one[1, t] = True
        assert_close(run(args, one)[0], exact(args, one), TOLERANCE[torch.float32])


@pytest.mark.parametrize("gate", range(4))
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("masked", [False, True])
def test_what_is_not_finite_spreads_as_in_the_recurrence(gate, value, masked):
    args = [t.double() for t in draw(40, seed=gate)]
    args[0][1, 17, gate, 0, 2] = value
    args[0][2, 39, gate, 1, 1] = value  # the last token
    reset = draw_reset(40, seed=gate) if masked else None
    found, wanted = run(args, reset)[0], exact(args, reset)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
    assert_close(found, wanted, TOLERANCE[torch.float64])


@pytest.mark.parametrize("floor", [0.0, 1.0])
@pytest.mark.parametrize("state", ["fresh", "carried"])
def test_closed_gates_are_those_of_the_recurrence(floor, state):
    args = [t.double() for t in draw(41, state=state)]
    args[0][0, :7, 0] = -INF  # nothing is added
    args[0][1, 3:9, :2] = -INF  # nor kept
    args[0][2, 5:, 1] = INF  # all is kept
    assert_close(run(args, floor=floor)[0], exact(args, floor=floor), TOLERANCE[torch.float64])


@pytest.mark.parametrize("floor", [0.0, 1.0])
@pytest.mark.parametrize("later", [False, True], ids=["earlier", "later"])
def test_the_gradient_of_a_document_ignores_what_is_not_finite_in_another(later, floor):
    x, r, b, *state = args = [t.double() for t in draw(40, state="fresh")]
    reset = torch.zeros(3, 40, dtype=torch.bool)
    reset[:, 20] = True
    dh = torch.randn(3, 40, NH, DH, dtype=torch.float64)
    if later:
        dh[:, 29] = NAN
        kept = slice(0, 20)
    else:
        x[:, 11], dh[:, :20] = NAN, 0
        kept = slice(0, 40)
    parallel, dstate = solver(), [torch.zeros_like(s) for s in state]
    with torch.no_grad():
        h, *_ = parallel.forward(x, r, b, state, reset, floor)
        dx, *rest = parallel.backward(dh, dstate, x, r, b, state, h, reset, floor)
    assert dx[:, kept].isfinite().all()
    assert not parallel.report.fell_back
    if later:
        leaves = [t.requires_grad_() for t in args]
        whole = exact(leaves, reset, floor)[0]
        (wanted,) = torch.autograd.grad(whole[:, :20], leaves[0], dh[:, :20])
        assert_close(dx[:, :20], wanted[:, :20], GRADIENT_TOLERANCE[torch.float64])
    else:
        assert not dx[:, :20].any()
        assert all(t.isfinite().all() for t in rest)


# --- the certificate ---


@pytest.mark.parametrize("inputs", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("gain", [1.0, 8.0])
@pytest.mark.parametrize("forget", [0.0, 3.0])
def test_what_is_certified_is_right(gain, forget, inputs):
    args = scaled(draw(40, state="fresh"), gain, inputs, forget)
    found, report = run(args, most=24)
    reference = error(slstm.recurrent(*args)[0], exact(args)[0])  # where it is unstable, both feel the rounding
    assert error(found[0], exact(args)[0]) <= max(TOLERANCE[torch.float32], 20 * reference)
    assert report.fell_back or report.error <= operators.TOLERANCE[torch.float32]


def test_a_window_that_does_not_converge_is_run_sequentially():
    args = scaled(draw(100, state="fresh"), gain=16.0)
    found, report = run(args, most=8)
    assert report.windows == 3
    assert report.fell_back > 0
    assert_close(found, slstm.recurrent(*args), TOLERANCE[torch.float32])


def test_the_estimate_is_a_geometric_series():
    size = torch.ones(3, 2, 2, 4)
    error, residual = judge(size * 1e-6, size * 4e-6, size, unit=1e-9, noise=1e-9, tolerance=1e-2)
    assert residual.item() == pytest.approx(1e-3)
    assert error.item() == pytest.approx(1e-3)  # rho = 1/2


@pytest.mark.parametrize("where", [slice(None), slice(0, 1)])
def test_a_residual_that_grows_certifies_nothing(where):
    size, change = torch.ones(3, 2, 2, 4), torch.full((3, 2, 2, 4), 1e-8)
    change[where] = 1e-5
    before = change / 4
    error, _ = judge(change, before, size, unit=1e-9, noise=1e-9, tolerance=1e-2)
    assert error.item() == INF
    change[0, 0, 0, 0] = NAN
    assert judge(change, before, size, unit=1e-9, noise=1e-9, tolerance=1e-2)[0].isnan()


# --- rounds ---


def test_rounds_are_remembered_and_reluctantly_taken_off():
    memory = rounds.KnownRounds(8)
    for _ in range(memory.PATIENCE):
        assert memory.rounds(KIND, 32) == 8
        memory.passed(KIND, 8, 1e-6, 1e-4, TOLERATED)
    assert memory.rounds(KIND, 32) == 7
    memory.passed(KIND, 8, 1e-6, 1e-4, TOLERATED)  # 7 did not do
    for _ in range(memory.PATIENCE):
        memory.passed(KIND, 8, 1e-6, 1e-4, TOLERATED)
        assert memory.rounds(KIND, 32) == 8
    assert memory.rounds("another", 32) == 8
    assert memory.rounds(KIND, 5) == 5


@pytest.mark.parametrize("figures", [(NAN, 1.0), (INF, 1.0), (INF, INF), (1.0, 0.0)])
def test_what_has_no_rate_doubles_the_rounds(figures):
    assert rounds.more_rounds(6, *figures, TOLERATED) == 12


def test_more_rounds_follow_the_rate():
    assert rounds.more_rounds(6, 8e-3, 8e-3, TOLERATED) == 9  # halved three times


# --- the operator ---


@pytest.fixture
def eager_rounds(monkeypatch):
    """Have the operator run rounds without compiling them."""
    limits = {dtype: rounds.Limits(WINDOW, 32, 8) for dtype in operators.LIMITS}
    parallel = operators.Parallel(sequence._forward, sequence._backward, caller=eager_call, limits=limits)
    monkeypatch.setattr(sequence, "parallel", parallel)
    return parallel


@pytest.mark.parametrize("masked", [False, True])
def test_the_operator_and_its_gradient_are_those_of_the_sequential_schedule(eager_rounds, masked):
    args = draw(11)
    reset = draw_reset(11) if masked else None
    found = []
    for schedule in ("sequential", "parallel"):
        leaves = [t.clone().requires_grad_() for t in args]
        h, state = slstm_sequence(*leaves, reset=reset, schedule=schedule)
        found.append([h, *state, *torch.autograd.grad(weigh([h, *state]), leaves)])
    assert eager_rounds.report.rounds > 0
    assert_close(found[1], found[0], GRADIENT_TOLERANCE[torch.float32])


def test_the_setting_chooses_and_the_trace_shows_it(eager_rounds):
    args = draw(11)
    for name, chosen in (("auto", "sequential"), ("sequential", "sequential"), ("parallel", "parallel")):
        with config.use(slstm_schedule=name), trace.record() as recording:
            slstm_sequence(*args)
        assert {span.schedule for span in recording.entries()} == {chosen}
    with config.use(slstm_schedule="parallel"), trace.record() as recording:
        slstm_sequence(*args, schedule="sequential")
    assert {span.schedule for span in recording.entries()} == {"sequential"}


def test_the_trace_shows_rounds_and_residual_forward_and_backward(eager_rounds):
    args = [t.requires_grad_() for t in draw(11)]
    with trace.record() as recording:
        h, _ = slstm_sequence(*args, schedule="parallel")
        h.sum().backward()
    forward, backward = recording.entries()
    for span in (forward, backward):
        assert re.fullmatch(r"rounds \d+, estimated error \S+, residual \S+, 0 of 1 windows sequential", span.details)


def test_an_unknown_schedule_is_an_error():
    with pytest.raises(ValueError, match="schedule must be one of auto, sequential, parallel, got 'queued'"):
        slstm_sequence(*draw(2), schedule="queued")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_compiled_rounds_are_the_eager_ones():
    x, r, b, *state = draw(7)
    results = []
    for caller in (eager_call, compile_call):
        with torch.no_grad():
            results.append(solver(caller=caller).forward(x, r, b, state, draw_reset(7), 1.0))
    assert_close(results[1], results[0], 1e-5)
