"""Laws of the tree of sums: the states of the chain, in a number of rounds that grows with the logarithm."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import parallel_model
from torch_xlstm_ops.parallel import scan

B, NH, DHQK, DHHV = 2, 3, 4, 5


def element(g: torch.Generator, spread: float) -> scan.Element:
    F = -spread * torch.rand(B, NH, 1, generator=g, dtype=torch.float64)
    M, dn = spread * torch.randn(B, NH, 1, generator=g, dtype=torch.float64), torch.randn(
        B, NH, DHQK, generator=g, dtype=torch.float64)
    return F, M, torch.randn(B, NH, DHQK, DHHV, generator=g, dtype=torch.float64), dn


def first(g: torch.Generator, fresh: bool) -> scan.State:
    if fresh:
        zeros = torch.zeros(B, NH, DHQK, DHHV, dtype=torch.float64)
        return zeros, zeros[..., 0], zeros[..., :1, 0]
    _, m, c, n = element(g, 1.0)
    return c, n, m


@settings(max_examples=60, deadline=None)
@given(workers=st.integers(1, 40), seed=st.integers(0, 1000), spread=st.sampled_from([0.1, 3.0, 200.0]),
       fresh=st.booleans())
def test_the_tree_gives_the_states_of_the_chain(workers, seed, spread, fresh):
    g = torch.Generator().manual_seed(seed)
    elements, state = [element(g, spread) for _ in range(workers)], first(g, fresh)
    chain, tree = scan.states_by_chain(elements, state), scan.states_by_tree(elements, state)
    assert len(tree) == len(chain) == workers
    for found, wanted in zip(tree, chain, strict=True):
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@given(workers=st.integers(1, 1100))
def test_a_round_has_no_worker_twice_and_there_are_twice_the_logarithm(workers):
    up, down = scan.rounds(workers)
    assert len(up) + len(down) <= 2 * math.ceil(math.log2(workers)) if workers > 1 else not up + down
    for hops in (*up, *down):
        ends = [end for hop in hops for end in hop]
        assert len(set(ends)) == len(ends)
        assert all(0 <= hop.sender < hop.receiver < workers for hop in hops)


@pytest.mark.parametrize("hop", [1e-4, 3e-3])
def test_the_crossover_is_the_first_number_of_workers_for_which_the_tree_is_faster(hop):
    costs = parallel_model.costs_7b(hop)
    at = parallel_model.crossover(costs, 10_000_000, parallel_model.LAYERS_7B)
    assert at is not None
    fast = {w: parallel_model.tree_seconds(costs, 10_000_000, w, 32) < parallel_model.seconds(costs, 10_000_000, w, 32)
            for w in (at // 2, at)}
    assert fast == {at // 2: False, at: True}
