"""The nodes of the prefix index as columns of numbers: no object for the garbage collector, some 110 bytes a node.

A node is an edge of the tree, with the blocks on it as one byte string, and the place at its end. Node 0 is the root.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from router.cache.worker_sets import EMPTY
from tandem.kv import BlockHash

HASH = 16
"""Bytes of a block's hash."""
ROOT = 0


class IndexNodes:
    """Nodes by number: their edges, their family, and the order in which they were used.

    The order is a ring through the root: its `younger` is the oldest node, its `older` the youngest.
    """

    def __init__(self) -> None:
        self.edge: list[bytearray] = [bytearray()]
        """The hashes of a node's blocks, one after the other; empty for the root and for numbers that are free."""
        self.parent = array("i", [ROOT])
        self.depth = array("i", [0])
        """Blocks before the edge."""
        self.workers = array("i", [EMPTY])
        """Who has all blocks of the edge: a number of `WorkerSets`."""
        self.last_used = array("d", [0.0])
        self._child = array("i", [ROOT])
        self._next = array("i", [ROOT])
        self._previous = array("i", [ROOT])
        self._older = array("i", [ROOT])
        self._younger = array("i", [ROOT])
        self._free: list[int] = []

    def __len__(self) -> int:
        """Nodes, the root apart."""
        return len(self.edge) - len(self._free) - 1

    @property
    def numbers(self) -> int:
        """All numbers given out so far are below this."""
        return len(self.edge)

    def alive(self, node: int) -> bool:
        """Whether a number is a node's, other than the root's."""
        return bool(self.edge[node])

    def blocks(self, node: int) -> int:
        """Blocks on a node's edge."""
        return len(self.edge[node]) // HASH

    def hashes(self, node: int, start: int = 0, end: int | None = None) -> list[BlockHash]:
        """The hashes of an edge's blocks `[start, end)`."""
        data = bytes(self.edge[node][start * HASH : None if end is None else end * HASH])
        return [data[at : at + HASH] for at in range(0, len(data), HASH)]

    def make(self, edge: bytearray, parent: int, depth: int, workers: int, last_used: float) -> int:
        """A new node, the youngest. The use of `workers` passes to it."""
        if self._free:
            node = self._free.pop()
        else:
            node = len(self.edge)
            self.edge.append(edge)
            self.last_used.append(0.0)
            for column in (self.parent, self.depth, self.workers, self._child, self._next, self._previous):
                column.append(ROOT)
            self._older.append(ROOT)
            self._younger.append(ROOT)
        self.edge[node] = edge
        self.depth[node] = depth
        self.workers[node] = workers
        self.last_used[node] = last_used
        self._child[node] = ROOT
        self._link(node, parent)
        self._enter(node)
        return node

    def free(self, node: int) -> None:
        """Removes a node without children."""
        assert not self._child[node]
        self._unlink(node)
        self._leave(node)
        self.edge[node] = self.edge[ROOT]
        self.workers[node] = EMPTY
        self._free.append(node)

    # Family ---------------------------------------------------------------------------------------------------------

    def has_children(self, node: int) -> bool:
        """Whether any edge begins at the node."""
        return self._child[node] != ROOT

    def only_child(self, node: int) -> int:
        """The only child; ROOT if there is none, or are several."""
        child = self._child[node]
        return ROOT if child and self._next[child] else child

    def children(self, node: int) -> Iterator[int]:
        """All children. The family must not change meanwhile."""
        child = self._child[node]
        while child:
            yield child
            child = self._next[child]

    def few_children(self, node: int, limit: int) -> bool:
        """Whether there are at most `limit`; looks at no more than that."""
        child = self._child[node]
        while child and limit:
            child, limit = self._next[child], limit - 1
        return not child

    def put_above(self, upper: int, node: int) -> None:
        """`upper`, a new child of the node's parent, becomes the node's parent."""
        self._unlink(node)
        self._link(node, upper)

    def adopt(self, node: int, source: int) -> None:
        """Gives all children of `source` to `node`, which has none."""
        assert not self._child[node]
        self._child[node], self._child[source] = self._child[source], ROOT
        for child in self.children(node):
            self.parent[child] = node

    def lift(self, node: int) -> None:
        """A node becomes a child of its parent's parent."""
        above = self.parent[self.parent[node]]
        self._unlink(node)
        self._link(node, above)

    def _link(self, node: int, parent: int) -> None:
        first = self._child[parent]
        self.parent[node] = parent
        self._next[node], self._previous[node] = first, ROOT
        if first:
            self._previous[first] = node
        self._child[parent] = node

    def _unlink(self, node: int) -> None:
        before, after = self._previous[node], self._next[node]
        if before:
            self._next[before] = after
        else:
            self._child[self.parent[node]] = after
        if after:
            self._previous[after] = before

    # Order ----------------------------------------------------------------------------------------------------------

    @property
    def oldest(self) -> int:
        """The node that was used least recently; ROOT if there is none."""
        return self._younger[ROOT]

    def raise_path(self, node: int) -> None:
        """Makes a node and then its ancestors the youngest: an ancestor is always younger than its descendants."""
        while node:
            self._leave(node)
            self._enter(node)
            node = self.parent[node]

    def _enter(self, node: int) -> None:
        youngest = self._older[ROOT]
        self._older[node], self._younger[node] = youngest, ROOT
        self._younger[youngest] = self._older[ROOT] = node

    def _leave(self, node: int) -> None:
        older, younger = self._older[node], self._younger[node]
        self._younger[older], self._older[younger] = younger, older

    def in_order(self) -> list[int]:
        """All nodes, oldest first; for tests."""
        found, node = [], self._younger[ROOT]
        while node:
            found.append(node)
            node = self._younger[node]
        return found
