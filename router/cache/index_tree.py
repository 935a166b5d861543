"""The shape of the prefix index: a path-compressed radix tree whose edges split and join as workers come and go.

Every block is in one edge, and the table says in which; an edge has one set of workers. No leaf is empty, and no edge
could be one with its only child: `settle` restores this around a node that changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from router.cache.block_table import NOWHERE, BlockTable
from router.cache.index_nodes import HASH, ROOT, IndexNodes
from router.cache.worker_sets import EMPTY, WorkerBits, WorkerSets
from tandem.kv import BlockHash

FRESH_S = 0.5
"""A node used within so many seconds is young enough: busy conversations do not pay for the order at each block."""


class IndexTree:
    """Nodes, the table of their blocks, and the sets of workers that have them. clock: seconds, monotonic."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.table = BlockTable()
        self.nodes = IndexNodes()
        self.sets = WorkerSets()
        self.bits = WorkerBits()
        self.clock = clock

    # Places ---------------------------------------------------------------------------------------------------------

    def known_prefix(self, hashes: Sequence[BlockHash]) -> int:
        """Length of the front of `hashes` that is in the tree, which has no block without the one before it."""
        get = self.table.get
        low, high = 0, len(hashes)
        while low < high:
            middle = (low + high) // 2
            if get(hashes[middle]) == NOWHERE:
                high = middle
            else:
                low = middle + 1
        return low

    def find(self, block: BlockHash) -> tuple[int, int] | None:
        """The node of a block and how many of the node's blocks end with it; the root for the empty hash."""
        if not block:
            return ROOT, 0
        node = self.table.get(block)
        if node == NOWHERE:
            return None
        edge = self.nodes.edge[node]
        # Mostly it is the edge's last.
        start = len(edge) - HASH if edge.endswith(block) else edge.find(block)
        while start >= 0 and start % HASH:
            start = edge.find(block, start + 1)
        return None if start < 0 else (node, start // HASH + 1)

    def path(self, node: int) -> list[int]:
        """A node and its ancestors, the root apart."""
        path, parent = [], self.nodes.parent
        while node:
            path.append(node)
            node = parent[node]
        return path

    def touch(self, node: int) -> None:
        """A node is used now, and with it all before it."""
        now, last_used = self.clock(), self.nodes.last_used
        if now - last_used[node] >= FRESH_S:
            for each in self.path(node):
                last_used[each] = now
            self.nodes.raise_path(node)

    # Workers --------------------------------------------------------------------------------------------------------

    def masks(self, node: int) -> tuple[int, int]:
        """Who has a node's blocks: (stored, promised)."""
        number = self.nodes.workers[node]
        return self.sets.stored[number], self.sets.promised[number]

    def set_workers(self, node: int, stored: int, promised: int) -> None:
        """Replaces who has a node's blocks."""
        old = self.nodes.workers[node]
        self.nodes.workers[node] = self.sets.take(stored, promised)
        if old != EMPTY:
            self.sets.drop(old)

    def clean(self, node: int) -> None:
        """Takes workers that are gone off a node."""
        stored, promised = self.masks(node)
        live = self.bits.live
        if (stored | promised) & ~live:
            self.set_workers(node, stored & live, promised & live)

    # Shape ----------------------------------------------------------------------------------------------------------

    def split(self, node: int, offset: int) -> tuple[int, int]:
        """Cuts an edge after `offset` blocks; returns the nodes of the front and of the rest.

        The node keeps the part that would be more work to move.
        """
        nodes = self.nodes
        self.clean(node)  # a new node's number may be one that the sweep has passed
        edge, cut = nodes.edge[node], offset * HASH
        depth, workers = nodes.depth[node], self.sets.use(nodes.workers[node])
        last_used = nodes.last_used[node]
        after = nodes.blocks(node) - offset
        if after < offset and nodes.few_children(node, offset - after):
            rest = nodes.make(edge[cut:], ROOT, depth + offset, workers, last_used)
            del edge[cut:]
            nodes.adopt(rest, node)
            nodes.put_above(node, rest)
            front = node
            self.table.move(nodes.hashes(rest), rest)
        else:
            front, rest = nodes.make(edge[:cut], nodes.parent[node], depth, workers, last_used), node
            nodes.edge[node] = edge[cut:]
            nodes.depth[node] = depth + offset
            nodes.put_above(front, node)
            self.table.move(nodes.hashes(front), front)
        nodes.raise_path(rest)
        return front, rest

    def settle(self, node: int) -> None:
        """Restores the shape around a changed node: no empty leaf, no edge that could be one with its only child."""
        nodes = self.nodes
        self.clean(node)
        while node and not nodes.has_children(node) and nodes.workers[node] == EMPTY:
            parent = nodes.parent[node]
            self.remove(node)
            node = parent
            self.clean(node)
        if node:
            node = self._join(node)
            if nodes.parent[node]:
                self._join(nodes.parent[node])

    def _join(self, node: int) -> int:
        """Makes one edge of `node` and its only child while the same workers have both; returns the node it is then."""
        nodes = self.nodes
        self.clean(node)
        while child := nodes.only_child(node):
            stored, promised = self.masks(child)
            masks = (stored & self.bits.live, promised & self.bits.live)
            # An empty leaf still waits for its sweep, which removes it.
            if masks != self.masks(node) or not (any(masks) or nodes.has_children(child)):
                break
            self.clean(child)
            node = self._merge(node, child)
        return node

    def _merge(self, node: int, child: int) -> int:
        """Makes one edge of a node and its only child; the one that would be more work to move stays."""
        nodes = self.nodes
        last_used = max(nodes.last_used[node], nodes.last_used[child])
        if nodes.blocks(child) < nodes.blocks(node) and nodes.few_children(child, nodes.blocks(node)):
            stays, goes = node, child
            self.table.move(nodes.hashes(child), node)
            nodes.edge[node] += nodes.edge[child]
            for grandchild in list(nodes.children(child)):
                nodes.lift(grandchild)
        else:
            stays, goes = child, node
            self.table.move(nodes.hashes(node), child)
            nodes.edge[child] = nodes.edge[node] + nodes.edge[child]
            nodes.depth[child] = nodes.depth[node]
            nodes.lift(child)
        nodes.last_used[stays] = last_used
        self.sets.drop(nodes.workers[goes])
        nodes.free(goes)
        nodes.raise_path(stays)
        return stays

    def remove(self, node: int) -> None:
        """Forgets a leaf."""
        self.table.remove(self.nodes.hashes(node))
        workers = self.nodes.workers[node]
        if workers != EMPTY:
            self.sets.drop(workers)
        self.nodes.free(node)

    def check_integrity(self) -> None:
        """Raises AssertionError if an invariant does not hold; for tests."""
        nodes = self.nodes
        position = {node: place for place, node in enumerate(nodes.in_order())}
        used: Counter[int] = Counter()
        blocks, stack, seen = 0, [ROOT], 0
        while stack:
            node = stack.pop()
            used[nodes.workers[node]] += 1
            for child in nodes.children(node):
                seen += 1
                assert nodes.parent[child] == node
                assert nodes.depth[child] == nodes.depth[node] + nodes.blocks(node)
                assert nodes.blocks(child) * HASH == len(nodes.edge[child]) > 0
                assert node == ROOT or position[child] < position[node]
                stored, promised = self.masks(child)
                assert not stored & promised & self.bits.live
                assert all(self.table.get(block) == child for block in nodes.hashes(child))
                blocks += nodes.blocks(child)
                stack.append(child)
            self._check_shape(node)
        assert seen == len(nodes) == len(position)
        assert blocks == len(self.table)
        self.table.check_integrity()
        self.sets.check_integrity(used)
        self.bits.check_integrity()

    def _check_shape(self, node: int) -> None:
        masks, retired = self.masks(node), self.bits.retired
        if node == ROOT or (masks[0] | masks[1]) & retired:
            return
        assert any(masks) or self.nodes.has_children(node), "an empty leaf"
        child = self.nodes.only_child(node)
        if child and not self.sets.either[self.nodes.workers[child]] & retired:
            assert masks != self.masks(child), "an edge in two pieces"
