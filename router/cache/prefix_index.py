"""The router's approximate radix tree of what every worker has cached.

Block hashes are chained, so a hash names its whole prefix: one table finds any block, one comparison covers an edge,
and the longest known prefix of a prompt is found by bisection. Sources are the workers' events; the router's own
predictions lie beside the tree until the worker's answer replaces them. After the radix tree of RadixAttention (Zheng
et al. 2024), over all workers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from router.cache.index_edits import Change, IndexEdits
from router.cache.index_nodes import HASH
from router.cache.index_tree import IndexTree
from router.cache.predictions import Predictions
from router.cache.worker_sets import EMPTY
from tandem.cluster import CacheEvent, EventKind, Incarnation
from tandem.kv import BlockHash

DEVICE_TIER = "device"
"""The only tier counted: blocks elsewhere cannot be used without a cost that plans do not know yet."""


class PrefixIndex:
    """Which worker has which prefix. Bounded by blocks and by age; evicts the least recently used leaf first.

    max_blocks: blocks kept at most. max_age_s: seconds an unused block is kept. clock: seconds, monotonic.
    """

    def __init__(self, max_blocks: int, max_age_s: float, clock: Callable[[], float]) -> None:
        self.max_blocks = max_blocks
        self._max_age_s = max_age_s
        self._clock = clock
        self._tree = IndexTree(clock)
        self._edits = IndexEdits(self._tree)
        self.sweep_nodes = 64
        """Nodes cleared of retired workers in each call, so that forgetting a worker never stops the event loop."""
        self._sweeping = 0
        """Retired bits that the current pass over the nodes clears."""
        self._swept = 0
        """Numbers below this have been passed."""
        self.predictions = Predictions(clock)
        """The router's own, beside the tree."""
        self.unplaced = 0
        """Blocks of events ignored so far, because the block before them is not (or no longer) known here."""

    def __len__(self) -> int:
        """Blocks in the tree."""
        return len(self._tree.table)

    @property
    def nodes(self) -> int:
        """Edges in the tree."""
        return len(self._tree.nodes)

    def match(self, hashes: Sequence[BlockHash]) -> dict[Incarnation, int]:
        """For each worker with any: how many blocks at the front of `hashes` it holds, promised or should soon hold."""
        self._bound()
        found: dict[Incarnation, int] = {}
        tree = self._tree
        length = tree.known_prefix(hashes)
        place = tree.find(hashes[length - 1]) if length else None
        if place is not None:
            self._collect(found, place[0], length)
            tree.touch(place[0])
        for incarnation, predicted in self.predictions.match(hashes).items():
            if predicted > found.get(incarnation, 0):
                found[incarnation] = predicted
        return found

    def apply(self, incarnation: Incarnation, event: CacheEvent) -> None:
        """Takes one event of a worker; a worker not heard of before is added."""
        self._sweep()
        if event.tier != DEVICE_TIER or not event.hashes:
            return
        bit = self._tree.bits.of(incarnation)
        if event.kind is EventKind.STORED:
            self._insert(event, lambda stored, promised: (stored | bit, promised & ~bit))
        elif event.kind is EventKind.PROMISED:
            self._insert(event, lambda stored, promised: (stored, promised | (bit & ~stored)))
        elif event.kind is EventKind.EVICTED:
            # A promise by a request that found the block there would otherwise stay: nothing stores it again.
            self._edits.mark(event.hashes, lambda stored, promised: (stored & ~bit, promised & ~bit))
        else:
            self._edits.mark(event.hashes, lambda stored, promised: (stored, promised & ~bit))

    def snapshot(self, incarnation: Incarnation, events: Iterable[CacheEvent]) -> None:
        """Replaces all that is known of a worker, predictions apart, by `events`."""
        self._tree.bits.retire(incarnation)
        self._tree.bits.of(incarnation)
        for event in events:
            self.apply(incarnation, event)

    def drop(self, incarnation: Incarnation) -> None:
        """Forgets a worker at once: no later match names it. Its bits are swept out of the tree bit by bit."""
        self._tree.bits.retire(incarnation)
        self.predictions.drop(incarnation)
        self._sweep()

    def _insert(self, event: CacheEvent, change: Change) -> None:
        self.unplaced += self._edits.insert(event.hashes, event.parent, change)
        self._bound()

    def _collect(self, found: dict[Incarnation, int], node: int, length: int) -> None:
        """Notes how many of the `length` blocks up to `node` each worker has from the root on."""
        tree = self._tree
        nodes, bits, either = tree.nodes, tree.bits, tree.sets.either
        depth, workers = nodes.depth, nodes.workers
        alive = bits.live
        for each in reversed(tree.path(node)):
            holders = alive & either[workers[each]]
            if holders != alive:
                if depth[each]:
                    bits.note(found, alive ^ holders, depth[each])
                if not holders:
                    return
                alive = holders
        bits.note(found, alive, length)

    # Bounds ---------------------------------------------------------------------------------------------------------

    def _sweep(self) -> None:
        """Clears retired bits from some nodes. They are taken again after a whole pass only: no stale one misleads."""
        tree = self._tree
        if not self._sweeping:
            if not tree.bits.retired:
                return
            self._sweeping, self._swept = tree.bits.retired, 1
        end = min(self._swept + self.sweep_nodes, self._tree.nodes.numbers)
        for node in range(self._swept, end):
            workers = tree.nodes.workers[node]
            if tree.nodes.alive(node) and (workers == EMPTY or tree.sets.either[workers] & self._sweeping):
                tree.settle(node)
        self._swept = end
        if end == self._tree.nodes.numbers:
            tree.bits.release(self._sweeping)
            self._sweeping = 0

    def _bound(self) -> None:
        """Trims the oldest leaves until size and age are within their limits."""
        nodes = self._tree.nodes
        excess = len(self._tree.table) - self.max_blocks
        while excess > 0:
            leaf = nodes.oldest
            count = nodes.blocks(leaf)
            if count > excess:
                self._tree.table.remove(nodes.hashes(leaf, count - excess))
                del nodes.edge[leaf][(count - excess) * HASH :]
                return
            excess -= count
            self._evict(leaf)
        oldest = self._clock() - self._max_age_s
        while (leaf := nodes.oldest) and nodes.last_used[leaf] < oldest:
            self._evict(leaf)

    def _evict(self, leaf: int) -> None:
        parent = self._tree.nodes.parent[leaf]
        self._tree.remove(leaf)
        if parent:
            self._tree.settle(parent)

    def check_integrity(self) -> None:
        """Raises AssertionError if an invariant does not hold; for tests."""
        assert len(self) <= self.max_blocks
        assert not self._sweeping & ~self._tree.bits.retired
        self._tree.check_integrity()
        self.predictions.check_integrity()
