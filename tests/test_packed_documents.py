"""Laws of packed documents with a state each: they equal the documents one by one, gradients included."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests import oracle
from tests.operator_cases import SLSTM
from torch_xlstm_ops import mlstm_chunkwise, slstm_sequence
from torch_xlstm_ops.maths.shapes import MLSTMState

L = 16
Run = Callable[..., tuple[Tensor, Sequence[Tensor]]]


def mlstm(counts: list[int], seed: int) -> tuple[Run, list[Tensor], list[Tensor], int]:
    """Return the operator, its streams for one row of all documents, a state for each, and the dimension of tokens."""
    sizes = oracle.Sizes(B=1, NH=2, S=sum(counts))
    streams = oracle.draw(sizes, torch.float64, state=False, seed=seed)
    state = oracle.draw(oracle.Sizes(B=len(counts), NH=2, S=1), torch.float64, seed=seed)[5:]
    return functools.partial(mlstm_chunkwise, chunk_size=L), streams, state, 2


def slstm(counts: list[int], seed: int) -> tuple[Run, list[Tensor], list[Tensor], int]:
    """Return the same for the sLSTM."""
    _, _, NH, DH = SLSTM
    generator = torch.Generator().manual_seed(seed)
    x, r, b, *state = (torch.randn(size, dtype=torch.float64, generator=generator) for size in (
        (1, sum(counts), 4, NH, DH), (4, NH, DH, DH), (4, NH, DH), *[(len(counts), NH, DH)] * 4))
    state[2] = state[2].abs() + 0.1
    return (lambda x, *state, **options: slstm_sequence(x, r, b, *state, **options)), [x], state, 1


def one_by_one(run: Run, streams: list[Tensor], state: list[Tensor], dim: int, counts: list[int]) -> list[Tensor]:
    parts = zip(*(t.split(counts, dim) for t in streams), strict=True)
    found = [run(*part, *(t[d : d + 1] for t in state)) for d, part in enumerate(parts)]
    return [torch.cat([h for h, _ in found], dim), *map(torch.cat, zip(*(after for _, after in found), strict=True))]


@pytest.mark.parametrize("layer", [mlstm, slstm])
@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=6), with_state=st.booleans(), seed=st.integers(0, 99))
def test_documents_with_a_state_each_equal_them_one_by_one(layer, counts, with_state, seed):
    run, streams, state, dim = layer(counts, seed)
    state = state if with_state else []
    inputs = [t.requires_grad_() for t in (*streams, *state)]
    ends = torch.tensor([0, *itertools.accumulate(counts)])
    h, after = run(*streams, *state, cu_seqlens=ends)
    found, wanted = [h, *after], one_by_one(run, streams, state, dim, counts)
    weights = [torch.randn_like(t) for t in wanted]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    if not sum(counts):
        return
    gradients = [torch.autograd.grad(sum((t * w).sum() for t, w in zip(ts, weights, strict=True)), inputs,
                                     materialize_grads=True) for ts in (found, wanted)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


def test_states_go_in_and_out():
    run, streams, state, _ = mlstm([5, 9], 0)
    ends = torch.tensor([0, 5, 14], dtype=torch.int32)
    h, whole = run(*streams, *state, cu_seqlens=ends)
    take = [*range(3), *range(5, 12)], [3, 4, 12, 13]
    first, middle = run(*(t[:, :, take[0]] for t in streams), *state, cu_seqlens=torch.tensor([0, 3, 10]))
    second, last = run(*(t[:, :, take[1]] for t in streams), *middle, cu_seqlens=torch.tensor([0, 2, 4]))
    assert isinstance(last, MLSTMState)
    torch.testing.assert_close(torch.cat([first, second], 2), h[:, :, [*take[0], *take[1]]], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(tuple(last), tuple(whole), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("ends", "error", "message"), [
    ([0, 3], ValueError, r"cu_seqlens must rise from 0 to S = 5, got \[0, 3\]"),
    ([0, 4, 3, 5], ValueError, "must rise"),
    ([0], ValueError, r"must be \(documents \+ 1,\), for at least one document"),
    ([0.0, 5.0], TypeError, "cu_seqlens must be integers, got torch.float32"),
    ([0, 2, 5], ValueError, "c must have a row for each of 2 documents"),
])
def test_wrong_ends_are_refused(ends, error, message):
    run, streams, state, _ = mlstm([5], 0)
    with pytest.raises(error, match=message):
        run(*streams, *state, cu_seqlens=torch.tensor(ends))


def test_a_reset_and_ends_are_refused():
    run, streams, _, _ = mlstm([5], 0)
    with pytest.raises(ValueError, match="reset must be None where cu_seqlens is given"):
        run(*streams, reset=torch.zeros(1, 5, dtype=torch.bool), cu_seqlens=torch.tensor([0, 5]))
