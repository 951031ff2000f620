"""A radix tree of token sequences, to find the values of all prefixes of a sequence."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Node(Generic[T]):
    """The end of a sequence; it stays the same object when nodes around it are added or removed."""

    def __init__(self, edge: array[int], parent: Node[T] | None, position: int) -> None:
        self.edge, self.parent, self.position = edge, parent, position  # tokens since the parent, and since the root
        self.children: dict[int, Node[T]] = {}  # by the first token of their edge
        self.values: dict[int | None, T] = {}  # by the tokens per piece in which the sequence was read


class RadixTree(Generic[T]):
    """A node at every value and at every branch; shared prefixes are stored once."""

    def __init__(self) -> None:
        self._root: Node[T] = Node(array("i"), None, 0)

    def path(self, tokens: array[int], start: Node[T] | None = None) -> Iterator[Node[T]]:
        """Yield the nodes of all prefixes of `tokens`, the shortest first.

        start: a node whose sequence is known to be a prefix; default the root.
        """
        node = start or self._root
        while True:
            yield node
            at = node.position
            child = node.children.get(tokens[at]) if at < len(tokens) else None
            if child is None or common_length(child.edge, tokens, at) < len(child.edge):
                return
            node = child

    def node(self, tokens: array[int], start: Node[T] | None = None) -> Node[T]:
        """Return the node of a whole sequence, a new one if there is none; see `path` for `start`."""
        *_, node = self.path(tokens, start)
        at = node.position
        if at == len(tokens):
            return node
        child = node.children.get(tokens[at])
        if child is not None:
            node = self._split(child, common_length(child.edge, tokens, at))
            at = node.position
        if at < len(tokens):
            added = Node(tokens[at:], node, len(tokens))
            node.children[tokens[at]] = node = added
        return node

    def prune(self, node: Node[T]) -> None:
        """Remove a node, and those above it, if it has no value and is no branch."""
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
        """Insert a node after the first `length` tokens of a node's edge, above that node, and return it."""
        above = node.parent
        assert above is not None
        middle = Node(node.edge[:length], above, above.position + length)
        above.children[node.edge[0]] = middle
        node.edge, node.parent = node.edge[length:], middle
        middle.children[node.edge[0]] = node
        return middle


def common_length(edge: array[int], tokens: array[int], at: int) -> int:
    """Return the length of the common prefix of `edge` and `tokens[at:]`."""
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
