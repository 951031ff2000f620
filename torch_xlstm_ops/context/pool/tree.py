"""A radix tree of token sequences: what is kept after the longest beginning of a sequence."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Node(Generic[T]):
    """An end of sequences; it stays the same object while others come and go around it."""

    def __init__(self, edge: array[int], parent: Node[T] | None, position: int) -> None:
        self.edge, self.parent, self.position = edge, parent, position  # tokens since the parent, and since the root
        self.children: dict[int, Node[T]] = {}  # by the first token of their edge
        self.values: dict[int | None, T] = {}  # by the size of the pieces that they were read in


class RadixTree(Generic[T]):
    """Nodes where values are or sequences part; beginnings that are shared are stored once."""

    def __init__(self) -> None:
        self._root: Node[T] = Node(array("i"), None, 0)

    def path(self, tokens: array[int]) -> Iterator[Node[T]]:
        """Yield the nodes whose sequences `tokens` begins with, the shortest first."""
        node = self._root
        while True:
            yield node
            at = node.position
            child = node.children.get(tokens[at]) if at < len(tokens) else None
            if child is None or shared(child.edge, tokens, at) < len(child.edge):
                return
            node = child

    def node(self, tokens: array[int]) -> Node[T]:
        """Return the node of a whole sequence, made where there is none."""
        *_, node = self.path(tokens)
        at = node.position
        if at == len(tokens):
            return node
        child = node.children.get(tokens[at])
        if child is not None:
            node = self._split(child, shared(child.edge, tokens, at))
            at = node.position
        if at < len(tokens):
            added = Node(tokens[at:], node, len(tokens))
            node.children[tokens[at]] = node = added
        return node

    def prune(self, node: Node[T]) -> None:
        """Forget a node without values, and those above it, that hold nothing any more."""
        while node.parent is not None and not node.values and len(node.children) < 2:
            above = node.parent
            if not node.children:
                del above.children[node.edge[0]]
                node = above
                continue
            (child,) = node.children.values()
            child.edge, child.parent = node.edge + child.edge, above
            above.children[node.edge[0]] = child
            return

    def _split(self, node: Node[T], length: int) -> Node[T]:
        """Return a new node after the first `length` tokens of a node's edge; the node comes below it."""
        above = node.parent
        assert above is not None
        middle = Node(node.edge[:length], above, above.position + length)
        above.children[node.edge[0]] = middle
        node.edge, node.parent = node.edge[length:], middle
        middle.children[node.edge[0]] = node
        return middle


def shared(edge: array[int], tokens: array[int], at: int) -> int:
    """Return how many tokens of `edge` stand in `tokens` from `at` on."""
    same, most = 0, min(len(edge), len(tokens) - at)
    step = most
    while same < most:
        step = min(step, most - same)
        if edge[same : same + step] == tokens[at + same : at + same + step]:
            same += step
        elif step == 1:
            break
        else:
            step = (step + 1) // 2
    return same
