"""The states before all shards of a layer by a tree of sums, in about 2 log2(workers) hops instead of one a worker.

Each worker has the monoid element F, M, dC, dn of its shard. In round r of the way up a worker receives the sum of the
2**r shards before its own block, and on the way down the sum of all shards before that: a Blelloch scan. This is for
workers simulated in one process; `Workers` hands states on in a chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from torch_xlstm_ops.maths import mlstm

Element = tuple[Tensor, Tensor, Tensor, Tensor]  # F, M (B, NH, 1), dC (B, NH, DHQK, DHHV), dn (B, NH, DHQK)
State = tuple[Tensor, Tensor, Tensor]  # c, n, m


class Hop(NamedTuple):
    """A sum that goes from one worker to another."""

    sender: int
    receiver: int


def rounds(workers: int) -> tuple[list[list[Hop]], list[list[Hop]]]:
    """Return the hops of the way up and of the way down; those of a round take place at once."""
    up, step = [], 1
    while step < workers:
        up.append([Hop(end - step, end) for end in range(2 * step - 1, workers, 2 * step)])
        step *= 2
    down = []
    while step > 1:
        step //= 2
        down.append([Hop(end, end + step) for end in range(2 * step - 1, workers - step, 2 * step)])
    return [hops for hops in up if hops], [hops for hops in down if hops]


def states_by_chain(elements: Sequence[Element], first: State) -> list[State]:
    """Return the state after each shard: each worker absorbs its shard into the state of the one before."""
    states, state = [], first
    for element in elements:
        state = mlstm.absorb(*element, *state)
        states.append(state)
    return states


def states_by_tree(elements: Sequence[Element], first: State) -> list[State]:
    """Return the state after each shard: sums of shards go up and down a tree, then all absorb theirs at once."""
    sums = list(elements)
    for direction in rounds(len(elements)):
        for hops in direction:
            sent = {hop.receiver: sums[hop.sender] for hop in hops}
            for receiver, before in sent.items():
                sums[receiver] = mlstm.combine(before, sums[receiver])
    return [mlstm.absorb(*element, *first) for element in sums]
