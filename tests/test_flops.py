"""Laws of counted work: what torch's counter finds for an operator is what its matrix products take."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.operator_cases import SIZES, SLSTM, mlstm_sequence, mlstm_token, ops, slstm_sequence, slstm_token
from torch_xlstm_ops.ops.table import OPERATORS
from torch_xlstm_ops.registrations import schemas

pytestmark = pytest.mark.usefixtures("one_thread", "small_chunks")


def count(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def learning(call, args):
    args = [t.requires_grad_() for t in args]
    return lambda: sum(t.sum() for t in call(*args)).backward()


def products_by_chunks(q, k, v, c, L):
    """Multiply what the chunkwise form multiplies; what stands between the products takes none."""
    for start in range(0, q.shape[2], L):
        q_chunk, k_chunk, v_chunk = (t[:, :, start:start + L].flatten(0, 1) for t in (q, k, v))
        scores = torch.bmm(q_chunk, k_chunk.mT)
        torch.bmm(scores, v_chunk), torch.bmm(q_chunk, c.flatten(0, 1)), torch.bmm(k_chunk.mT, v_chunk)


@pytest.mark.parametrize("L", [2, 4, 5])
def test_a_sequence_counts_the_products_of_its_chunks(L):
    args = mlstm_sequence()
    q, k, v, c = (args[at] for at in (0, 1, 2, 5))
    found = count(lambda: ops.mlstm_chunkwise(*args, chunk_size=L, schedule="recurrent"))
    assert found == count(lambda: products_by_chunks(q, k, v, c, L))


@pytest.mark.slow
def test_a_sequence_by_hand():
    B, NH, S, DHQK, DHHV = SIZES
    assert (B, NH, S, DHQK, DHHV) == (2, 2, 5, 8, 16)
    forward = 4 * ((16 + 1) * (8 + 16) * 2 + 5 * 8 * 16 * 2 * 2)  # 4 heads, chunks of 4 and 1 tokens
    backward = 4 * ((16 + 1) * (8 * 3 + 16 * 2) * 2 + 5 * 8 * 16 * 5 * 2)

    def call(*args):
        return ops.mlstm_chunkwise(*args, chunk_size=4, schedule="recurrent")

    assert count(lambda: call(*mlstm_sequence())) == forward
    assert count(learning(call, mlstm_sequence())) == forward + backward


def test_a_step_by_hand():
    for op in (ops.mlstm_step, ops.mlstm_step_):
        assert count(lambda op=op: op(*mlstm_token())) == 4 * (8 * 16 * 2 * 2)
    backward = 4 * ((8 * 3 + 16 * 2) * 2 + 8 * 16 * 5 * 2)
    assert count(learning(ops.mlstm_step, mlstm_token())) == 4 * (8 * 16 * 2 * 2) + backward


def test_an_slstm_by_hand():
    B, S, NH, DH = SLSTM
    step = B * NH * 4 * DH * DH * 2
    assert count(lambda: ops.slstm_step(*slstm_token())) == step
    assert count(lambda: ops.slstm_sequence(*slstm_sequence())) == S * step
    assert count(learning(ops.slstm_step, slstm_token())) == 4 * step
    assert count(learning(ops.slstm_sequence, slstm_sequence())) == 4 * S * step


def test_every_operator_has_a_description():
    assert OPERATORS.keys() == schemas.SCHEMAS.keys()
