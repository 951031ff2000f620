"""Laws of the radix tree over the tokens of kept states."""

from __future__ import annotations

from array import array

from hypothesis import given, settings
from hypothesis import strategies as st

from torch_xlstm_ops.context.pool.tree import RadixTree, common_length

SEQUENCES = st.lists(st.lists(st.integers(0, 2), max_size=8).map(lambda tokens: array("i", tokens)), max_size=12)


@settings(deadline=None)
@given(SEQUENCES, SEQUENCES, st.lists(st.integers(0, 2), max_size=10))
def test_the_tree_finds_every_beginning_that_is_kept(
    kept: list[array[int]], gone: list[array[int]], tokens: list[int]
) -> None:
    tree: RadixTree[bytes] = RadixTree()
    for sequence in kept + gone:
        tree.node(sequence).values[None] = sequence.tobytes()
    for sequence in gone:
        node = tree.node(sequence)
        node.values.clear()
        tree.prune(node)
    left = {sequence.tobytes() for sequence in kept} - {sequence.tobytes() for sequence in gone}
    path = list(tree.path(array("i", tokens)))
    expected = [tokens[:end] for end in range(len(tokens) + 1) if array("i", tokens[:end]).tobytes() in left]
    assert [node.values[None] for node in path if node.values] == [array("i", tokens).tobytes() for tokens in expected]
    for node in path[1:]:
        assert node.values or len(node.children) > 1, "a node that holds nothing and parts nothing"


@settings(deadline=None)
@given(st.lists(st.integers(0, 1), max_size=40), st.lists(st.integers(0, 1), max_size=40), st.integers(0, 5))
def test_what_an_edge_shares_is_counted(edge: list[int], tokens: list[int], at: int) -> None:
    at = min(at, len(tokens))
    expected = 0
    for a, b in zip(edge, tokens[at:], strict=False):
        if a != b:
            break
        expected += 1
    assert common_length(array("i", edge), array("i", tokens), at) == expected
