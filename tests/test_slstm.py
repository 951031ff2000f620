"""Laws of the sLSTM: of its mathematics in eager mode, and of its operators, compiled, on the CPU."""

from __future__ import annotations

import itertools
import math
import textwrap
from functools import partial

import expecttest
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from tests.oracle import GRADIENT_TOLERANCE, TOLERANCE, assert_close, weigh
from tests.parameters import tail
from torch_xlstm_ops.api import slstm_sequence, slstm_step
from torch_xlstm_ops.kernels.slstm import Kernels, Lengths
from torch_xlstm_ops.maths import slstm
from torch_xlstm_ops.maths.shapes import SLSTMState, state_dtype
from torch_xlstm_ops.maths.slstm import Product
from torch_xlstm_ops.ops.slstm import sequence
from torch_xlstm_ops.schedules.slstm import blocks

B, S, NH, DH = 3, 11, 2, 4  # NH, DH: one pair, as each new one is a compile
ops = torch.ops.xlstm
DTYPES = list(TOLERANCE)
INF = math.inf


def draw(S=S, dtype=torch.float32, *, B=B, seed=0, state="carried"):
    """Return x, r, b and y, c, n, m: carried, fresh (zeros), or mixed (some cells of some rows fresh, m not 0)."""
    g = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=g, dtype=torch.float64)

    streams = [normal(B, S, 4, NH, DH) * 2, normal(4, NH, DH, DH) / DH**0.5]
    cells = [normal(B, NH, DH), normal(B, NH, DH), normal(B, NH, DH).exp(), normal(B, NH, DH)]
    if state != "carried":
        kept = torch.rand(B, NH, DH, generator=g) < (0.5 if state == "mixed" else 0.0)
        cells[:3] = [torch.where(kept, t, 0.0) for t in cells[:3]]
        cells[3] = cells[3] if state == "mixed" else torch.zeros_like(cells[3])
    return [t.to(dtype) for t in streams] + [t.to(state_dtype(dtype)) for t in (normal(4, NH, DH), *cells)]


def draw_reset(S=S, *, B=B, seed=0):
    return torch.rand(B, S, generator=torch.Generator().manual_seed(seed)) < 0.3


def exact(args, reset=None, floor=0.0):
    """Return h, y, c, n, m of the float64 recurrence."""
    return slstm.recurrent(*[t.double() for t in args], reset, floor=floor)


def flat(results):
    h, state = results
    return [h, *state]


def exact_gradients(args, reset=None, floor=0.0):
    leaves = [t.detach().double().requires_grad_() for t in args]
    return torch.autograd.grad(weigh(exact(leaves, reset, floor)), leaves)


# --- the mathematics ---


def test_stabilised_recurrence_is_the_plain_one():
    x, r, b, y, *_ = args = [t.double() for t in draw(state="fresh")]
    c = n = torch.zeros_like(y)
    outputs = []
    for t in range(S):
        i, f, z, o = (x[:, t] + torch.einsum("ghoi,bhi->bgho", r, y) + b).unbind(1)
        c, n = f.sigmoid() * c + i.exp() * z.tanh(), f.sigmoid() * n + i.exp()
        y = o.sigmoid() * c / n
        outputs.append(y)
    h, _, c_found, n_found, m = exact(args)
    assert_close([h, c_found * m.exp(), n_found * m.exp()], [torch.stack(outputs, 1), c, n], TOLERANCE[torch.float64])


def eager_kernels(product, lengths, floor):
    def lookup(fn, **static):
        return lambda args: lambda args: fn(*args, floor=floor, **static)

    return Kernels(
        lengths=lengths, block=lookup(slstm.block_, product=product), activate=lambda args: slstm.activate_(*args),
        replay=lookup(slstm.replay_), backward=lookup(slstm.block_backward_, product=product),
        products=slstm.recurrent_products,
        operand_gradient=lambda gates, r: slstm.operand_gradient(gates, r, torch.float64, product),
        weight_gradients=slstm.weight_gradients,
    )


@given(
    product=st.sampled_from(Product), T=st.integers(1, 5), S=st.integers(1, 9), seed=st.integers(0, 999),
    floor=st.sampled_from([0.0, 1.0]), state=st.sampled_from(["carried", "fresh", "mixed"]), masked=st.booleans(),
)
def test_blocks_and_their_gradient_are_the_recurrence(product, T, S, seed, floor, state, masked):
    x, r, b, y, c, n, m = args = [t.double() for t in draw(S, seed=seed, state=state)]
    reset = draw_reset(S, seed=seed) if masked else None
    mask = () if reset is None else (reset.t().contiguous(),)
    kernels = eager_kernels(product, Lengths(T, T + 1, T), floor)
    x_first = x.transpose(0, 1).contiguous()
    h, *state = blocks.forward(kernels, x_first, slstm.weights(r, product, r.dtype), b, y, c, n, m, *mask)
    wanted = exact(args, reset, floor)
    assert_close([h.transpose(0, 1), *state], wanted, TOLERANCE[torch.float64])

    given_gradients = [torch.randn_like(t) for t in wanted]
    leaves = [t.clone().requires_grad_() for t in args]
    gradients = torch.autograd.grad(exact(leaves, reset, floor), leaves, given_gradients)
    dh, *dstate = given_gradients
    h_before = torch.cat([y[None], h[:-1]])
    if masked:
        h_before = torch.where(mask[0][:, :, None, None], 0.0, h_before)
    laid_out = slstm.weights_backward(r, product, r.dtype)
    dh = dh.transpose(0, 1).contiguous()
    dgates, *rest = blocks.backward(kernels, [dh, *dstate], x_first, h_before, laid_out, r, b, c, n, m, *mask)
    assert_close([dgates.permute(2, 1, 0, 3, 4), *rest], gradients, GRADIENT_TOLERANCE[torch.float64])


@pytest.mark.parametrize("S", range(8))
@pytest.mark.parametrize("T", [1, 2, 3])
def test_blocks_cover_a_sequence_in_two_lengths(S, T):
    lengths = blocks._lengths(S, T)
    assert sum(lengths) == S
    assert set(lengths) <= {T, 1}


# --- the operators against the recurrence ---


@pytest.mark.parametrize("S", [1, 2, 130])
@pytest.mark.parametrize("state", ["carried", "fresh", "mixed"])
def test_sequence_equals_recurrence(S, state):
    args = draw(S, state=state)
    assert_close(flat(slstm_sequence(*args)), exact(args), TOLERANCE[torch.float32])


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", tail(DTYPES, lambda t: t != torch.float16), ids=str)
def test_sequence_and_gradients_equal_recurrence_in_each_dtype(dtype):
    args = [t.requires_grad_() for t in draw(dtype=dtype)]
    results = flat(slstm_sequence(*args))
    assert results[0].dtype == dtype
    assert {t.dtype for t in results[1:]} == {state_dtype(dtype)}
    assert_close(results, exact(args), TOLERANCE[dtype])
    gradients = torch.autograd.grad(weigh(results), args)
    assert [g.dtype for g in gradients] == [t.dtype for t in args]
    assert_close(gradients, exact_gradients(args), GRADIENT_TOLERANCE[dtype])


@given(S=st.integers(1, 40), B=st.integers(1, 5), seed=st.integers(0, 999), state=st.sampled_from(["carried", "mixed"]))
def test_sequence_with_resets_equals_recurrence(S, B, seed, state):
    args = [t.requires_grad_() for t in draw(S, B=B, seed=seed, state=state)]
    reset = draw_reset(S, B=B, seed=seed)
    results = flat(slstm_sequence(*args, reset=reset))
    assert_close(results, exact(args, reset), TOLERANCE[torch.float32])
    gradients = torch.autograd.grad(weigh(results), args)
    assert_close(gradients, exact_gradients(args, reset), GRADIENT_TOLERANCE[torch.float32])


def test_no_state_is_a_fresh_state():
    args = draw(state="fresh")
    for found, wanted in zip(flat(slstm_sequence(*args[:3])), flat(slstm_sequence(*args)), strict=True):
        assert torch.equal(found, wanted)


def test_gradients_pass_gradcheck():
    args = [t.double().requires_grad_() for t in draw(3, B=2)]
    reset = torch.tensor([[False, True, False], [False, False, False]])
    assert torch.autograd.gradcheck(partial(ops.slstm_sequence, reset=reset), args)
    step = [t.detach() for t in args]
    step[0] = step[0][:, 0]
    assert torch.autograd.gradcheck(ops.slstm_step, [t.requires_grad_() for t in step])


@given(S=st.integers(1, 20), data=st.data())
def test_a_sequence_split_anywhere_is_the_same(S, data):
    cut = data.draw(st.integers(0, S))
    x, r, b, *state = args = draw(S, seed=S)
    h1, state = slstm_sequence(x[:, :cut], r, b, *state)
    h2, state = slstm_sequence(x[:, cut:], r, b, *state)
    for found, wanted in zip([torch.cat([h1, h2], 1), *state], flat(slstm_sequence(*args)), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", tail(DTYPES, lambda t: t != torch.float16), ids=str)
def test_steps_equal_sequence(dtype):
    x, r, b, *state = args = draw(5, dtype, state="mixed")
    h = []
    for t in range(5):
        state = slstm_step(x[:, t], r, b, *state)
        h.append(state.y.to(dtype))
    assert_close([torch.stack(h, 1), *state], exact(args), TOLERANCE[dtype])


def test_floor_holds_n_up():
    args = draw(state="carried")
    args[5] = args[5] * 1e-3
    args[6] = args[6] + 20  # the state outweighs the tokens, and its n is small
    results = flat(slstm_sequence(*args, floor=1.0))
    assert results[3].min() >= 1
    assert_close(results, exact(args, floor=1.0), TOLERANCE[torch.float32])
    state = slstm_step(args[0][:, 0], *args[1:], floor=1.0)
    assert_close(state, exact([args[0][:, :1], *args[1:]], floor=1.0)[1:], TOLERANCE[torch.float32])


# --- resets and fresh cells ---


def test_a_reset_is_the_start_of_another_sequence():
    x, r, b, *state = draw(10)
    reset = torch.zeros(B, 10, dtype=torch.bool)
    reset[:, 4] = reset[:, 7] = True
    h, last = slstm_sequence(x, r, b, *state, reset=reset)
    first, _ = slstm_sequence(x[:, :4], r, b, *state)
    second, _ = slstm_sequence(x[:, 4:7], r, b)
    third, wanted = slstm_sequence(x[:, 7:], r, b)
    assert_close([h, *last], [torch.cat([first, second, third], 1), *wanted], TOLERANCE[torch.float32])


def test_nothing_crosses_a_reset():
    args = draw(6)
    reset = torch.zeros(B, 6, dtype=torch.bool)
    reset[:, 3] = True
    spoilt = [args[0].clone(), *args[1:3], *[torch.full_like(t, math.nan) for t in args[3:]]]
    spoilt[0][:, :3] = math.nan
    h, last = slstm_sequence(*spoilt, reset=reset)
    wanted, wanted_last = slstm_sequence(args[0][:, 3:], *args[1:3])
    assert_close([h[:, 3:], *last], [wanted, *wanted_last], TOLERANCE[torch.float32])


def test_a_fresh_cell_is_told_from_its_neighbours():
    args = draw(4, state="mixed")
    fresh = args[5] == 0
    assert 0 < fresh.sum() < fresh.numel()
    other = [*args[:6], torch.where(fresh, torch.randn_like(args[6]) * 50, args[6])]
    for found, wanted in zip(flat(slstm_sequence(*other)), flat(slstm_sequence(*args)), strict=True):
        assert torch.equal(found, wanted)


# --- extreme gates ---

EXTREMES = [-INF, -1e4, -90.0, 0.0, 90.0, 1e4]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("state", ["carried", "fresh", "mixed"])
def test_extreme_gates_give_numbers_and_the_right_ones(state, dtype):
    pairs = torch.tensor(list(itertools.product(EXTREMES, [*EXTREMES, INF])), dtype=dtype)  # igate, fgate
    S = len(pairs)
    args = draw(S, dtype, state=state)
    order = torch.stack([torch.randperm(S) for _ in range(B)])
    args[0][:, :, :2] = pairs[order][..., None, None]
    args[0][0, :, 2] = INF
    args[0][1, :, 3] = -INF
    args = [t.requires_grad_() for t in args]
    results = flat(slstm_sequence(*args))
    gradients = torch.autograd.grad(weigh(results), args)
    assert all(t.isfinite().all() for t in (*results, *gradients))
    if dtype == torch.float64:  # an exponent of 1e4 leaves float32 three digits
        assert_close(results, exact(args), TOLERANCE[dtype])
        assert_close(gradients, exact_gradients(args), GRADIENT_TOLERANCE[dtype])


def test_a_cell_that_keeps_and_takes_nothing_is_fresh_again():
    args = draw(3)
    args[0][:, 1, :2] = -INF
    h, last = slstm_sequence(*args)
    assert not h[:, 1].any()
    wanted, wanted_last = slstm_sequence(args[0][:, 2:], *args[1:3])
    assert_close([h[:, 2:], *last], [wanted, *wanted_last], TOLERANCE[torch.float32])


# --- layouts and sizes ---


@pytest.mark.parametrize("layout", ["S B 4 NH DH", "every second token", "expanded batch", "r in out"])
def test_strides_do_not_matter(layout):
    args = strided = draw(5)
    if layout == "S B 4 NH DH":
        strided = [args[0].transpose(0, 1).contiguous().transpose(0, 1), *args[1:]]
    elif layout == "every second token":
        strided = [args[0].repeat_interleave(2, 1)[:, ::2], *args[1:]]
    elif layout == "expanded batch":
        strided = [t[:1].expand_as(t) if i not in (1, 2) else t for i, t in enumerate(args)]
        args = [t.contiguous() for t in strided]
    else:
        strided = [args[0], args[1].mT.contiguous().mT, *args[2:]]
    wanted = exact(args)
    assert_close(flat(slstm_sequence(*strided)), wanted, TOLERANCE[torch.float32])
    token = [strided[0][:, 0], *strided[1:]]
    assert_close(slstm_step(*token), exact([args[0][:, :1], *args[1:]])[1:], TOLERANCE[torch.float32])
    leaves = [t.requires_grad_() for t in strided]
    gradients = torch.autograd.grad(weigh(flat(slstm_sequence(*leaves))), leaves)
    assert_close(gradients, exact_gradients(args), GRADIENT_TOLERANCE[torch.float32])


def test_no_tokens_give_a_copy_of_the_state():
    args = [t.requires_grad_() for t in draw(0)]
    h, state = slstm_sequence(*args)
    assert h.shape == (B, 0, NH, DH)
    for found, given_ in zip(state, args[3:], strict=True):
        assert torch.equal(found, given_)
        assert found.data_ptr() != given_.data_ptr()
    x_gradient, r_gradient, b_gradient, *of_state = torch.autograd.grad(weigh(state), args)
    assert x_gradient.shape == args[0].shape
    assert not r_gradient.any()
    assert not b_gradient.any()
    assert_close(of_state, torch.autograd.grad(weigh(args[3:]), args[3:]), GRADIENT_TOLERANCE[torch.float32])


def test_an_empty_batch():
    args = draw(B=0)
    assert slstm_sequence(*args)[0].shape == (0, S, NH, DH)
    assert slstm_step(args[0][:, 0], *args[1:]).y.shape == (0, NH, DH)


def test_arguments_are_left_alone():
    args = draw()
    copies = [t.clone() for t in args]
    h, state = slstm_sequence(*args)
    slstm_step(args[0][:, 0], *args[1:])
    assert all(torch.equal(a, b) for a, b in zip(args, copies, strict=True))
    assert len({t.data_ptr() for t in [*args, h, *state]}) == 12


# --- torch's transformations ---


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch 2.14 hides its own
@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    args = [t.requires_grad_() for t in draw(4, dtype)]
    opcheck(ops.slstm_sequence.default, (*args,))
    opcheck(ops.slstm_step.default, (args[0].detach()[:, 0], *[t.detach() for t in args[1:]]))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch 2.14 hides its own
def test_opcheck_of_the_options():
    args = [t.requires_grad_() for t in draw(4)]
    opcheck(ops.slstm_sequence.default, (*args[:3], None, None, None, None, draw_reset(4)))
    results = flat(slstm_sequence(*[t.detach() for t in args]))
    gradients = [torch.randn_like(t) for t in results]
    opcheck(ops.slstm_sequence_backward.default, (*gradients, *[t.detach() for t in args], results[0]))


@pytest.mark.parametrize("mapped", ["x", "r", "all"])
def test_vmap_is_a_loop(mapped):
    many = [torch.stack(ts) for ts in zip(*[draw(3, B=2, seed=seed) for seed in range(2)], strict=True)]
    one = draw(3, B=2)
    use = {"x": [0, 3, 4, 5, 6], "r": [1], "all": range(7)}[mapped]
    args = [many[i] if i in use else one[i] for i in range(7)]
    dims = tuple(0 if i in use else None for i in range(7))
    found = torch.vmap(ops.slstm_sequence, dims)(*args)
    found_step = torch.vmap(ops.slstm_step, dims)(args[0].select(-4, 0), *args[1:])
    for row in range(2):
        of_row = [t[row] if i in use else t for i, t in enumerate(args)]
        assert_close([t[row] for t in found], exact(of_row), TOLERANCE[torch.float32])
        wanted = exact([of_row[0][:, :1], *of_row[1:]])
        assert_close([t[row] for t in found_step], wanted[1:], TOLERANCE[torch.float32])


def test_vmap_over_masks_is_a_loop():
    args, masks = draw(3, B=2), torch.stack([draw_reset(3, B=2, seed=seed) for seed in range(2)])
    found = torch.vmap(lambda reset: ops.slstm_sequence(*args, reset))(masks)
    for row in range(2):
        assert_close([t[row] for t in found], exact(args, masks[row]), TOLERANCE[torch.float32])


def test_batched_gradients_are_a_loop():
    args = [t.requires_grad_() for t in draw(3, B=2)]
    h, *_ = ops.slstm_sequence(*args)
    directions = torch.randn(2, *h.shape)
    found = torch.autograd.grad(h, args, directions, is_grads_batched=True, retain_graph=True)
    for row in range(2):
        wanted = torch.autograd.grad(h, args, directions[row], retain_graph=True)
        assert_close([t[row] for t in found], wanted, GRADIENT_TOLERANCE[torch.float32])


def test_autocast_narrows_the_streams_alone():
    args = draw(4)
    with torch.autocast("cpu", torch.bfloat16):
        h, state = slstm_sequence(*args)
        y = slstm_step(args[0][:, 0], *args[1:]).y
    assert h.dtype == torch.bfloat16
    assert state.c.dtype == y.dtype == torch.float32
    narrow = [args[0].bfloat16(), args[1].bfloat16(), *args[2:]]
    assert_close([h, *state], exact(narrow), TOLERANCE[torch.bfloat16])


def test_export_keeps_the_operator():
    class Model(torch.nn.Module):
        def forward(self, x, r, b):
            return ops.slstm_sequence(x, r, b)[0]

    args = tuple(draw(4)[:3])
    dynamic = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}, None, None)
    program = torch.export.export(Model(), args, dynamic_shapes={"x": dynamic[0], "r": None, "b": None})
    assert "xlstm.slstm_sequence.default" in program.graph_module.code
    longer = draw(7, B=2)[:3]
    assert torch.equal(program.module()(*longer), slstm_sequence(*longer)[0])


def test_compiled_model_equals_eager():
    args = [t.requires_grad_() for t in draw(4)]

    def model(*args):
        return weigh(ops.slstm_sequence(*args))

    compiled = torch.autograd.grad(torch.compile(model, fullgraph=True)(*args), args)
    assert_close(compiled, torch.autograd.grad(model(*args), args), GRADIENT_TOLERANCE[torch.float32])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_change_nothing():
    for seed in range(4):  # plain, recorded, replayed, replayed
        args = [t.cuda().requires_grad_() for t in draw(40, torch.bfloat16, seed=seed)]
        results = flat(slstm_sequence(*args))
        gradients = torch.autograd.grad(weigh([t.cpu() for t in results]), args)
        assert_close([t.cpu() for t in results], exact([t.cpu() for t in args]), TOLERANCE[torch.bfloat16])
        wanted = exact_gradients([t.cpu() for t in args])
        assert_close([t.cpu() for t in gradients], wanted, GRADIENT_TOLERANCE[torch.bfloat16])
    assert sequence.graphs._graphs


# --- interface ---


class Interface(expecttest.TestCase):
    def test_schemas(self):
        names = ("slstm_step", "slstm_sequence", "slstm_sequence_backward")
        schemas = [textwrap.fill(str(getattr(ops, name).default._schema), 110) for name in names]
        self.assertExpectedInline("\n".join(schemas), """\
xlstm::slstm_step(Tensor x, Tensor r, Tensor b, Tensor y, Tensor c, Tensor n, Tensor m, *, float floor=0.) ->
(Tensor, Tensor, Tensor, Tensor)
xlstm::slstm_sequence(Tensor x, Tensor r, Tensor b, Tensor? y=None, Tensor? c=None, Tensor? n=None, Tensor?
m=None, Tensor? reset=None, *, float floor=0., str? schedule=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)
xlstm::slstm_sequence_backward(Tensor dh, Tensor dy, Tensor dc, Tensor dn, Tensor dm, Tensor x, Tensor r,
Tensor b, Tensor? y, Tensor? c, Tensor? n, Tensor? m, Tensor h, Tensor? reset=None, *, float floor=0., str?
schedule=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)""")

    def test_errors(self):
        x, r, b, *state = draw(5)
        wrong = torch.zeros(B, 4, dtype=torch.bool)
        calls = {
            "rank": (x[0], r, b),
            "gate axis": (x[:, :, :3], r, b),
            "r not square": (x, r[..., :3], b),
            "r of other heads": (x, r[:, :1], b),
            "b": (x, r, b[:3]),
            "dtype of r": (x, r.double(), b),
            "dtype of x": (x.int(), r, b),
            "dtype of b": (x, r, b.int()),
            "part of a state": (x, r, b, state[0]),
            "shape of a state": (x, r, b, *state[:3], state[3][:1]),
            "dtype of a state": (x, r, b, *state[:3], state[3].double()),
            "shape of reset": (x, r, b, *state, wrong),
            "dtype of reset": (x, r, b, *state, torch.zeros(B, 5)),
            "device": (x, r, b.to("meta")),
        }
        said = [f"{name}: {self._error(ops.slstm_sequence, *args)}" for name, args in calls.items()]
        said.append(f"floor: {self._error(ops.slstm_sequence, x, r, b, floor=-1.0)}")
        said.append(f"step: {self._error(ops.slstm_step, x, r, b, *state)}")
        said.append(f"step: {self._error(ops.slstm_step, x[:, 0], r, b, *state[:3], state[3][:1])}")
        self.assertExpectedInline("\n".join(said), """\
rank: ValueError: x must be (B, S, 4, NH, DH), got (5, 4, 2, 4)
gate axis: ValueError: x must be (B, S, 4, NH, DH) = (3, 5, 4, 2, 4), got (3, 5, 3, 2, 4)
r not square: ValueError: r must be (4, NH, DH, DH) = (4, 2, 4, 4), got (4, 2, 4, 3)
r of other heads: ValueError: r must be (4, NH, DH, DH) = (4, 2, 4, 4), got (4, 1, 4, 4)
b: ValueError: b must be (4, NH, DH) = (4, 2, 4), got (3, 2, 4)
dtype of r: TypeError: r must have x's dtype float32, got float64
dtype of x: TypeError: x must be float32, float16, bfloat16 or float64, got int32
dtype of b: TypeError: b must have a floating dtype, got int32
part of a state: ValueError: y, c, n, m must be given together or not at all, got y without c, n, m
shape of a state: ValueError: m must be (B, NH, DH) = (3, 2, 4), got (1, 2, 4)
dtype of a state: TypeError: m must be float32 beside float32 inputs, got float64
shape of reset: ValueError: reset must be (B, S) = (3, 5), got (3, 4)
dtype of reset: TypeError: reset must be bool, got float32
device: ValueError: b must be on x's device cpu, got meta
floor: ValueError: floor must be at least 0, got -1.0
step: ValueError: x must be (B, 4, NH, DH), got (3, 5, 4, 2, 4)
step: ValueError: m must be (B, NH, DH) = (3, 2, 4), got (1, 2, 4)""")

    def _error(self, op, *args, **how):
        with pytest.raises((ValueError, TypeError)) as caught:
            op(*args, **how)
        return f"{caught.type.__name__}: {caught.value}"


def test_results_are_named():
    args = draw(2)
    assert isinstance(slstm_sequence(*args)[1], SLSTMState)
    assert isinstance(slstm_step(args[0][:, 0], *args[1:]), SLSTMState)
