"""Laws of memory: no result is a view, and what is written in place is checked before anything is written."""

from __future__ import annotations

import pytest
import torch

from tests.operator_cases import CASES, mlstm_token, ops

pytestmark = pytest.mark.usefixtures("one_thread", "small_chunks")
MLSTM = (CASES["mlstm_step"].op, CASES["mlstm_chunkwise"].op)
GRADIENTS = {
    "mlstm_chunkwise_backward": lambda args: [*CASES["mlstm_chunkwise"].op(*args), *args],
    "slstm_sequence_backward": lambda args: [*CASES["slstm_sequence"].op(*args), *args, args[0][:, :, 0].contiguous()],
}


@pytest.mark.parametrize("name", [*CASES, *GRADIENTS])
@pytest.mark.parametrize("learning", [True, False])
def test_no_result_is_a_view_or_shares_memory(name, learning):
    args = CASES[name.removesuffix("_backward")].args()
    if name in GRADIENTS:
        op, args = getattr(ops, name), GRADIENTS[name](args)
    else:
        op, args = CASES[name].op, [t.requires_grad_(learning) for t in args]
    results = op(*args)
    pointers = [t.untyped_storage().data_ptr() for t in (*results, *args)]
    assert len(set(pointers)) == len(pointers)
    for t in results:
        assert not t._is_view()
        assert t.is_contiguous()


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_results_can_be_written_in_place_while_autograd_records(case):
    args = [t.requires_grad_() for t in case.args()]
    kept = 0 if case.op in MLSTM else 2  # an sLSTM saves h or y for its gradient, as torch's own functions do
    results = case.op(*args)
    found = [*(t * 2 for t in results[:kept]), *(t.mul_(2) for t in results[kept:])]
    wanted = [t * 2 for t in case.aten(*args)]
    torch.testing.assert_close(
        torch.autograd.grad(sum(t.sum() for t in found), args), torch.autograd.grad(sum(t.sum() for t in wanted), args)
    )


@pytest.mark.parametrize("name", ["slstm_step", "slstm_sequence"])
def test_writing_over_what_an_slstm_saved_is_told_by_autograd(name):
    args = [t.requires_grad_() for t in CASES[name].args()]
    y = CASES[name].op(*args)[0]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.mul_(2).sum().backward()


def wanted_step(args):
    h, *state = CASES["mlstm_step"].aten(*[t.clone() for t in args])
    return [h, *state]


def test_a_stream_that_shares_memory_with_a_state_is_read_before_it_is_written():
    args = mlstm_token()
    args[0] = args[6]  # q is n
    args[1] = args[5][..., 0]  # k lies in c
    wanted = wanted_step(args)
    found = [ops.mlstm_step_(*args), *args[5:]]
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("which", [5, 6, 7], ids=["c", "n", "m"])
def test_a_state_that_overlaps_itself_is_refused_before_anything_is_written(which):
    args = mlstm_token()
    args[which] = args[which][:1].expand_as(args[which])
    before = [t.clone() for t in args]
    with pytest.raises(ValueError, match=f"{'cnm'[which - 5]} must have memory of its own for each element"):
        ops.mlstm_step_(*args)
    assert all(map(torch.equal, args, before))


def test_states_that_share_memory_with_each_other_are_refused_before_anything_is_written():
    args = mlstm_token()
    args[6] = args[5][..., 0]
    before = [t.clone() for t in args]
    with pytest.raises(ValueError, match="c must not share memory with n"):
        ops.mlstm_step_(*args)
    assert all(map(torch.equal, args, before))


def test_states_that_lie_between_each_other_are_written():
    args = mlstm_token()
    B, NH, DHQK, DHHV = args[5].shape
    packed = torch.zeros(B, NH, DHQK, DHHV + 1, dtype=torch.float64)
    packed[..., :DHHV], packed[..., DHHV] = args[5], args[6]
    wanted = wanted_step(args)
    args[5], args[6] = packed[..., :DHHV], packed[..., DHHV]
    torch.testing.assert_close([ops.mlstm_step_(*args), *args[5:]], wanted)


@pytest.mark.parametrize("op", [ops.mlstm_step, ops.mlstm_step_])
def test_negative_views_are_resolved(op):
    args = mlstm_token()
    args[0] = torch.complex(torch.zeros_like(args[0]), -args[0]).conj().imag  # is args[0], by a bit
    args[6] = torch.complex(torch.zeros_like(args[6]), -args[6]).conj().imag
    assert args[0].is_neg()
    wanted = wanted_step([t.resolve_neg() for t in args])
    found = op(*args)
    found = [found, *args[5:]] if op is ops.mlstm_step_ else list(found)
    torch.testing.assert_close([t.resolve_neg() for t in found], wanted)


def test_a_step_in_place_maps_as_a_loop():
    many = [torch.stack([t, t * 0.5], 1) for t in mlstm_token()]
    wanted = [wanted_step([t[:, i] for t in many]) for i in range(2)]
    h = torch.func.vmap(ops.mlstm_step_, in_dims=1)(*many)
    stacked = [torch.stack(ts) for ts in zip(*wanted, strict=True)]
    torch.testing.assert_close([h, *(t.movedim(1, 0) for t in many[5:])], stacked)
    with pytest.raises(ValueError, match="c must be mapped"):
        torch.func.vmap(ops.mlstm_step_, in_dims=(0, *[None] * 7))(many[0], *mlstm_token()[1:])


def test_a_step_in_place_carries_tangents():
    args, directions = mlstm_token(), [torch.randn_like(t) for t in mlstm_token()]
    _, wanted = torch.func.jvp(CASES["mlstm_step"].aten, tuple(args), tuple(directions))

    def step(q, k, v, igate, fgate, c, n, m):
        c, n, m = c.clone(), n.clone(), m.clone()
        return ops.mlstm_step_(q, k, v, igate, fgate, c, n, m), c, n, m

    torch.testing.assert_close(torch.func.jvp(step, tuple(args), tuple(directions))[1], wanted)
