"""Laws of derivatives, for every operator: whatever asks for them gets those of the recurrence."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch_xlstm_ops.registrations.derivatives import _filled

from tests.operator_cases import CASES, ops
from tests.oracle import weigh

pytestmark = pytest.mark.usefixtures("one_thread", "small_chunks")
every_operator = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


def tangents(args):
    return [torch.randn_like(t) for t in args]


def loss(function):
    return lambda *args: weigh(function(*args))


@every_operator
def test_reverse_mode_passes_gradcheck_and_gradgradcheck(case):
    args = [t.requires_grad_() for t in case.args()]
    assert gradcheck(case.op, args, fast_mode=True)
    assert gradgradcheck(case.op, args, fast_mode=True)


@every_operator
def test_forward_mode_passes_gradcheck_and_is_linearised_right_under_reverse_mode(case):
    args = [t.requires_grad_() for t in case.args()]
    assert gradcheck(case.op, args, fast_mode=True, check_forward_ad=True, check_backward_ad=False)
    assert gradgradcheck(case.op, args, fast_mode=True, check_fwd_over_rev=True, check_rev_over_rev=False,
                         check_undefined_grad=False)


@pytest.mark.smoke
@every_operator
def test_jvp_without_any_gradient_required_equals_that_of_the_recurrence(case):
    args = tuple(case.args())
    directions = tuple(tangents(args))
    _, found = torch.func.jvp(case.op, args, directions)
    _, wanted = torch.func.jvp(case.aten, args, directions)
    torch.testing.assert_close(found, wanted)


@every_operator
def test_dual_numbers_carry_their_tangents_through(case):
    args = case.args()
    directions = tangents(args)
    _, wanted = torch.func.jvp(case.aten, tuple(args), tuple(directions))
    with forward_ad.dual_level():
        out = case.op(*[forward_ad.make_dual(t, d) for t, d in zip(args, directions, strict=True)])
        found = [forward_ad.unpack_dual(t).tangent for t in out]
    torch.testing.assert_close(found, list(wanted))


@every_operator
def test_transforms_of_torch_func_equal_those_of_the_recurrence(case):
    args = tuple(case.args())
    every = tuple(range(len(args)))
    for transform in (torch.func.grad, lambda f, argnums: torch.func.jacrev(f, argnums)):
        found = transform(loss(case.op), argnums=every)(*args)
        torch.testing.assert_close(found, transform(loss(case.aten), argnums=every)(*args))
    torch.testing.assert_close(torch.func.jacfwd(loss(case.op))(*args), torch.func.jacrev(loss(case.op))(*args))


@every_operator
def test_gradients_of_each_sample_equal_a_loop(case):
    args = case.args()
    many = torch.stack([args[0], args[0] * 0.5, args[0] - 1.0])
    mapped = torch.func.vmap(torch.func.grad(loss(case.op)), (0, *[None] * (len(args) - 1)))(many, *args[1:])
    looped = [torch.func.grad(loss(case.aten))(one, *args[1:]) for one in many]
    torch.testing.assert_close(mapped, torch.stack(looped))


@every_operator
def test_a_gradient_penalty_trains(case):
    args = [t.requires_grad_() for t in case.args()]

    def penalised(function):
        total = loss(function)(*args)
        (first,) = torch.autograd.grad(total, args[:1], create_graph=True)
        return torch.autograd.grad(total + first.square().sum(), args)

    torch.testing.assert_close(penalised(case.op), penalised(case.aten))


@every_operator
def test_third_derivatives_equal_those_of_the_recurrence(case):
    x, *rest = case.args()
    direction = torch.randn_like(x)

    def third(function):
        def along(step):
            return loss(function)(x + step * direction, *rest)

        return torch.func.grad(torch.func.grad(torch.func.grad(along)))(x.new_zeros(()))

    torch.testing.assert_close(third(case.op), third(case.aten))


@pytest.mark.parametrize("name", ["mlstm_chunkwise", "slstm_sequence"])
def test_derivatives_with_resets_and_without_a_state_equal_those_of_the_recurrence(name):
    case = CASES[name]
    args = case.args()[: 5 if name == "mlstm_chunkwise" else 3]
    B, S = (args[0].shape[0], args[0].shape[2]) if name == "mlstm_chunkwise" else args[0].shape[:2]
    reset = torch.zeros(B, S, dtype=torch.bool)
    reset[0, 2] = reset[1, 0] = True
    op = getattr(ops, name)

    def of(*tensors):
        return op(*tensors, reset=reset)

    leaves = [t.requires_grad_() for t in args]
    assert gradcheck(of, leaves, fast_mode=True, check_forward_ad=True)
    assert gradgradcheck(of, leaves, fast_mode=True)


def test_a_compiled_jvp_equals_an_eager_one():
    case = CASES["mlstm_step"]
    args = tuple(case.args())
    directions = tuple(tangents(args))

    def jvp(args, directions):
        return torch.func.jvp(case.op, args, directions)

    found = torch.compile(jvp, backend="aot_eager")(args, directions)
    torch.testing.assert_close(found, jvp(args, directions))


def test_bad_arguments_are_told_under_transforms_too():
    q, *rest = CASES["mlstm_chunkwise"].args()
    with pytest.raises(ValueError, match=r"k must be \(B, NH, S, DHQK\)"):
        torch.func.jvp(lambda q: ops.mlstm_chunkwise(q[:, :, :2], *rest)[0], (q,), (q,))


def test_gradients_that_nobody_asked_for_are_zeros_at_aligned_addresses():
    shapes = [((2, 3), torch.float32), ((5, 7), torch.float64), ((3,), torch.float64), ((), torch.float32)]
    h, results = torch.randn(2, 3), [(torch.Size(shape), dtype) for shape, dtype in shapes]
    found = _filled([h, None, None, None], results, h)
    assert found[0] is h
    for zeros, (shape, dtype) in zip(found[1:], results[1:], strict=True):
        torch.testing.assert_close(zeros, torch.zeros(shape, dtype=dtype))
        assert zeros.data_ptr() % 16 == 0
        assert zeros.is_contiguous()
    found[1].fill_(1)
    assert (found[2] == 0).all()
