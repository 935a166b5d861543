"""What workers' events do to the prefix index: blocks are added, and whoever has them is marked."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence

from router.cache.index_nodes import HASH, ROOT
from router.cache.index_tree import IndexTree
from tandem.kv import BlockHash

Change = Callable[[int, int], tuple[int, int]]
"""(stored, promised) masks -> the masks after an event."""


class IndexEdits:
    """Changes a tree as events tell."""

    def __init__(self, tree: IndexTree) -> None:
        self._tree = tree

    def insert(self, hashes: Sequence[BlockHash], parent: BlockHash, change: Change) -> int:
        """Consecutive blocks after `parent` get the masks that `change` computes; the unknown ones are added.

        Returns how many could not be: the block before them is not (or no longer) known here.
        """
        known, runs = 0, []
        for node, start, end in self._runs(hashes, chained=True):
            runs.append((node, start, end))
            known += end - start
        self._mark_runs(runs, change)
        fresh = list(hashes[known:])
        if fresh:
            place = self._tree.find(hashes[known - 1] if known else parent)
            # A known block after an unknown one cannot be: the event is malformed and would corrupt the tree.
            if place is None or len(set(fresh)) < len(fresh) or self._tree.table.has_any(fresh):
                return len(fresh)
            self._grow(place, fresh, change(0, 0))
        return 0

    def _runs(self, hashes: Sequence[BlockHash], chained: bool) -> Iterator[tuple[int, int, int]]:
        """Where the known ones of `hashes` are, as maximal pieces (node, start, end) of edges.

        chained: the hashes are consecutive; the first one that is unknown, or not after the one before, ends it.
        """
        joined = b"".join(hashes)
        at, before = 0, ROOT
        while at < len(hashes):
            place = self._tree.find(hashes[at])
            if place is None or (chained and before and (self._tree.nodes.parent[place[0]], place[1]) != (before, 1)):
                if chained:
                    return
                at += 1
                continue
            before, start = place[0], place[1] - 1
            count = _common(self._tree.nodes.edge[before], start, joined, at)
            yield before, start, start + count
            at += count

    def mark(self, hashes: Sequence[BlockHash], change: Change) -> None:
        """Gives the known ones of `hashes` the masks that `change` computes."""
        self._mark_runs(list(self._runs(hashes, chained=False)), change)

    def _mark_runs(self, runs: list[tuple[int, int, int]], change: Change) -> None:
        """The same for pieces of edges, splitting edges where needed."""
        tree, nodes = self._tree, self._tree.nodes
        changed: list[int] = []
        for node, pieces in _by_node(runs):
            masks = tree.masks(node)
            after = change(*masks)
            if after == masks:
                continue
            front = node
            # From the end: a split keeps the front whole, so offsets before it stay valid.
            for start, end in reversed(pieces):
                rest = ROOT
                if end < nodes.blocks(front):
                    front, rest = tree.split(front, end)
                piece = front
                if start:
                    front, piece = tree.split(front, start)
                tree.set_workers(piece, *after)
                changed += (rest, piece, front)
        for node in changed:
            if nodes.alive(node):
                tree.settle(node)

    def _grow(self, place: tuple[int, int], fresh: list[BlockHash], masks: tuple[int, int]) -> None:
        """Adds `fresh` after a place, for workers with these masks."""
        tree, nodes, (node, offset) = self._tree, self._tree.nodes, place
        rest = ROOT
        if node and offset < nodes.blocks(node):
            node, rest = tree.split(node, offset)
        tree.clean(node)
        if node and not nodes.has_children(node) and tree.masks(node) == masks:
            nodes.edge[node] += b"".join(fresh)
            tree.table.add(fresh, node)
            tree.touch(node)
            return
        child = nodes.make(
            bytearray(b"".join(fresh)),
            node,
            nodes.depth[node] + nodes.blocks(node),
            tree.sets.take(*masks),
            tree.clock(),
        )
        tree.table.add(fresh, child)
        for each in tree.path(node):
            nodes.last_used[each] = nodes.last_used[child]
        nodes.raise_path(child)
        for changed in (rest, node):
            if nodes.alive(changed):
                tree.settle(changed)


def _common(edge: bytearray, start: int, joined: bytes, at: int) -> int:
    """How many blocks `edge`, from block `start` on, and `joined`, from block `at` on, have in common."""
    length = min(len(edge) - start * HASH, len(joined) - at * HASH) // HASH

    def same(count: int) -> bool:
        return edge.startswith(joined[at * HASH : (at + count) * HASH], start * HASH)

    return length if same(length) else bisect_left(range(1, length), True, key=lambda count: not same(count))


def _by_node(runs: list[tuple[int, int, int]]) -> Iterable[tuple[int, list[tuple[int, int]]]]:
    """The pieces of each node in order, joined where they touch or overlap."""
    if len(runs) == 1:
        node, start, end = runs[0]
        return [(node, [(start, end)])]
    found: dict[int, list[tuple[int, int]]] = {}
    for node, start, end in sorted(runs):
        pieces = found.setdefault(node, [])
        if pieces and start <= pieces[-1][1]:
            pieces[-1] = (pieces[-1][0], max(end, pieces[-1][1]))
        else:
            pieces.append((start, end))
    return found.items()
