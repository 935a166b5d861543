"""The router's approximate radix tree of what every worker has cached.

Block hashes are chained, so a hash names its whole prefix: one table finds any block, one comparison covers an edge,
and the longest known prefix of a prompt is found by bisection. Sources are the workers' events; the router's own
predictions lie beside the tree until the worker's answer replaces them. After the radix tree of RadixAttention (Zheng
et al. 2024), over all workers at once.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from router.cache.block_table import NOWHERE, BlockTable
from router.cache.index_nodes import HASH, ROOT, IndexNodes
from router.cache.predictions import Predictions
from router.cache.worker_sets import EMPTY, WorkerBits, WorkerSets
from tandem.cluster import CacheEvent, EventKind, Incarnation
from tandem.kv import BlockHash

FRESH_S = 0.5
"""A node used within so many seconds is young enough: busy conversations do not pay for the order at each block."""
DEVICE_TIER = "device"
"""The only tier counted: blocks elsewhere cannot be used without a cost that plans do not know yet."""

_Change = Callable[[int, int], tuple[int, int]]
"""(stored, promised) masks -> the masks after an event."""


class PrefixIndex:
    """Which worker has which prefix. Bounded by blocks and by age; evicts the least recently used leaf first.

    max_blocks: blocks kept at most. max_age_s: seconds an unused block is kept. clock: seconds, monotonic.
    """

    def __init__(self, max_blocks: int, max_age_s: float, clock: Callable[[], float]) -> None:
        self._max_blocks = max_blocks
        self._max_age_s = max_age_s
        self._clock = clock
        self._table = BlockTable()
        self._nodes = IndexNodes()
        self._sets = WorkerSets()
        self._bits = WorkerBits()
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
        return len(self._table)

    @property
    def nodes(self) -> int:
        """Edges in the tree."""
        return len(self._nodes)

    def match(self, hashes: Sequence[BlockHash]) -> dict[Incarnation, int]:
        """For each worker with any: how many blocks at the front of `hashes` it holds, promised or should soon hold."""
        self._bound()
        found: dict[Incarnation, int] = {}
        length = self._known_prefix(hashes)
        place = self._find(hashes[length - 1]) if length else None
        if place is not None:
            self._collect(found, place[0], length)
            self._touch(place[0])
        for incarnation, predicted in self.predictions.match(hashes).items():
            if predicted > found.get(incarnation, 0):
                found[incarnation] = predicted
        return found

    def apply(self, incarnation: Incarnation, event: CacheEvent) -> None:
        """Takes one event of a worker; a worker not heard of before is added."""
        self._sweep()
        if event.tier != DEVICE_TIER or not event.hashes:
            return
        bit = self._bits.of(incarnation)
        if event.kind is EventKind.STORED:
            self._insert(event, lambda stored, promised: (stored | bit, promised & ~bit))
        elif event.kind is EventKind.PROMISED:
            self._insert(event, lambda stored, promised: (stored, promised | (bit & ~stored)))
        elif event.kind is EventKind.EVICTED:
            self._mark(event.hashes, lambda stored, promised: (stored & ~bit, promised))
        else:
            self._mark(event.hashes, lambda stored, promised: (stored, promised & ~bit))

    def snapshot(self, incarnation: Incarnation, events: Iterable[CacheEvent]) -> None:
        """Replaces all that is known of a worker, predictions apart, by `events`."""
        self._bits.retire(incarnation)
        self._bits.of(incarnation)
        for event in events:
            self.apply(incarnation, event)

    def drop(self, incarnation: Incarnation) -> None:
        """Forgets a worker at once: no later match names it. Its bits are swept out of the tree bit by bit."""
        self._bits.retire(incarnation)
        self.predictions.drop(incarnation)
        self._sweep()

    # Matching -------------------------------------------------------------------------------------------------------

    def _known_prefix(self, hashes: Sequence[BlockHash]) -> int:
        """Length of the front of `hashes` that is in the tree, which has no block without the one before it."""
        get = self._table.get
        low, high = 0, len(hashes)
        while low < high:
            middle = (low + high) // 2
            if get(hashes[middle]) == NOWHERE:
                high = middle
            else:
                low = middle + 1
        return low

    def _collect(self, found: dict[Incarnation, int], node: int, length: int) -> None:
        """Notes how many of the `length` blocks up to `node` each worker has from the root on."""
        nodes, bits, either = self._nodes, self._bits, self._sets.either
        depth, workers = nodes.depth, nodes.workers
        alive = bits.live
        for each in reversed(self._path(node)):
            holders = alive & either[workers[each]]
            if holders != alive:
                if depth[each]:
                    bits.note(found, alive ^ holders, depth[each])
                if not holders:
                    return
                alive = holders
        bits.note(found, alive, length)

    def _find(self, block: BlockHash) -> tuple[int, int] | None:
        """The node of a block and how many of the node's blocks end with it; the root for the empty hash."""
        if not block:
            return ROOT, 0
        node = self._table.get(block)
        if node == NOWHERE:
            return None
        edge = self._nodes.edge[node]
        # Mostly it is the edge's last.
        start = len(edge) - HASH if edge.endswith(block) else edge.find(block)
        while start >= 0 and start % HASH:
            start = edge.find(block, start + 1)
        return None if start < 0 else (node, start // HASH + 1)

    def _path(self, node: int) -> list[int]:
        """A node and its ancestors, the root apart."""
        path, parent = [], self._nodes.parent
        while node:
            path.append(node)
            node = parent[node]
        return path

    def _touch(self, node: int) -> None:
        now, last_used = self._clock(), self._nodes.last_used
        if now - last_used[node] >= FRESH_S:
            for each in self._path(node):
                last_used[each] = now
            self._nodes.raise_path(node)

    # Events ---------------------------------------------------------------------------------------------------------

    def _insert(self, event: CacheEvent, change: _Change) -> None:
        hashes = event.hashes
        known, runs = 0, []
        for node, start, end in self._runs(hashes, chained=True):
            runs.append((node, start, end))
            known += end - start
        self._mark_runs(runs, change)
        fresh = list(hashes[known:])
        if fresh:
            place = self._find(hashes[known - 1] if known else event.parent)
            # A known block after an unknown one cannot be: the event is malformed and would corrupt the tree.
            if place is None or len(set(fresh)) < len(fresh) or self._table.has_any(fresh):
                self.unplaced += len(fresh)
            else:
                self._grow(place, fresh, change(0, 0))
        self._bound()

    def _runs(self, hashes: Sequence[BlockHash], chained: bool) -> Iterator[tuple[int, int, int]]:
        """Where the known ones of `hashes` are, as maximal pieces (node, start, end) of edges.

        chained: the hashes are consecutive; the first one that is unknown, or not after the one before, ends it.
        """
        joined = b"".join(hashes)
        at, before = 0, ROOT
        while at < len(hashes):
            place = self._find(hashes[at])
            if place is None or (chained and before and (self._nodes.parent[place[0]], place[1]) != (before, 1)):
                if chained:
                    return
                at += 1
                continue
            before, start = place[0], place[1] - 1
            count = _common(self._nodes.edge[before], start, joined, at)
            yield before, start, start + count
            at += count

    def _mark(self, hashes: Sequence[BlockHash], change: _Change) -> None:
        """Gives the known ones of `hashes` the masks that `change` computes."""
        self._mark_runs(list(self._runs(hashes, chained=False)), change)

    def _mark_runs(self, runs: list[tuple[int, int, int]], change: _Change) -> None:
        """The same for pieces of edges, splitting edges where needed."""
        nodes, sets = self._nodes, self._sets
        changed: list[int] = []
        for node, pieces in _by_node(runs):
            old = nodes.workers[node]
            masks = (sets.stored[old], sets.promised[old])
            after = change(*masks)
            if after == masks:
                continue
            front = node
            # From the end: a split keeps the front whole, so offsets before it stay valid.
            for start, end in reversed(pieces):
                rest = ROOT
                if end < nodes.blocks(front):
                    front, rest = self._split(front, end)
                piece = front
                if start:
                    front, piece = self._split(front, start)
                self._set_workers(piece, *after)
                changed += (rest, piece, front)
        for node in changed:
            if nodes.alive(node):
                self._settle(node)

    def _grow(self, place: tuple[int, int], fresh: list[BlockHash], masks: tuple[int, int]) -> None:
        """Adds `fresh` after a place, for workers with these masks."""
        nodes, (node, offset) = self._nodes, place
        rest = ROOT
        if node and offset < nodes.blocks(node):
            node, rest = self._split(node, offset)
        self._clean(node)
        if node and not nodes.has_children(node) and self._masks(node) == masks:
            nodes.edge[node] += b"".join(fresh)
            self._table.add(fresh, node)
            self._touch(node)
            return
        child = nodes.make(
            bytearray(b"".join(fresh)),
            node,
            nodes.depth[node] + nodes.blocks(node),
            self._sets.take(*masks),
            self._clock(),
        )
        self._table.add(fresh, child)
        for each in self._path(node):
            nodes.last_used[each] = nodes.last_used[child]
        nodes.raise_path(child)
        for changed in (rest, node):
            if nodes.alive(changed):
                self._settle(changed)

    # Shape ----------------------------------------------------------------------------------------------------------

    def _masks(self, node: int) -> tuple[int, int]:
        number = self._nodes.workers[node]
        return self._sets.stored[number], self._sets.promised[number]

    def _set_workers(self, node: int, stored: int, promised: int) -> None:
        old = self._nodes.workers[node]
        self._nodes.workers[node] = self._sets.take(stored, promised)
        if old != EMPTY:
            self._sets.drop(old)

    def _clean(self, node: int) -> None:
        """Takes workers that are gone off a node."""
        stored, promised = self._masks(node)
        live = self._bits.live
        if (stored | promised) & ~live:
            self._set_workers(node, stored & live, promised & live)

    def _split(self, node: int, offset: int) -> tuple[int, int]:
        """Cuts an edge after `offset` blocks; returns the nodes of the front and of the rest.

        The node keeps the part that would be more work to move.
        """
        nodes = self._nodes
        self._clean(node)  # a new node's number may be one that the sweep has passed
        edge, cut = nodes.edge[node], offset * HASH
        depth, workers = nodes.depth[node], self._sets.use(nodes.workers[node])
        last_used = nodes.last_used[node]
        after = nodes.blocks(node) - offset
        if after < offset and nodes.few_children(node, offset - after):
            rest = nodes.make(edge[cut:], ROOT, depth + offset, workers, last_used)
            del edge[cut:]
            nodes.adopt(rest, node)
            nodes.put_above(node, rest)
            front = node
            self._table.move(nodes.hashes(rest), rest)
        else:
            front, rest = nodes.make(edge[:cut], nodes.parent[node], depth, workers, last_used), node
            nodes.edge[node] = edge[cut:]
            nodes.depth[node] = depth + offset
            nodes.put_above(front, node)
            self._table.move(nodes.hashes(front), front)
        nodes.raise_path(rest)
        return front, rest

    def _settle(self, node: int) -> None:
        """Restores the shape around a changed node: no empty leaf, no edge that could be one with its only child."""
        nodes = self._nodes
        self._clean(node)
        while node and not nodes.has_children(node) and nodes.workers[node] == EMPTY:
            parent = nodes.parent[node]
            self._remove(node)
            node = parent
            self._clean(node)
        if node:
            node = self._join(node)
            if nodes.parent[node]:
                self._join(nodes.parent[node])

    def _join(self, node: int) -> int:
        """Makes one edge of `node` and its only child while the same workers have both; returns the node it is then."""
        nodes = self._nodes
        self._clean(node)
        while child := nodes.only_child(node):
            stored, promised = self._masks(child)
            masks = (stored & self._bits.live, promised & self._bits.live)
            # An empty leaf still waits for its sweep, which removes it.
            if masks != self._masks(node) or not (any(masks) or nodes.has_children(child)):
                break
            self._clean(child)
            node = self._merge(node, child)
        return node

    def _merge(self, node: int, child: int) -> int:
        """Makes one edge of a node and its only child; the one that would be more work to move stays."""
        nodes = self._nodes
        last_used = max(nodes.last_used[node], nodes.last_used[child])
        if nodes.blocks(child) < nodes.blocks(node) and nodes.few_children(child, nodes.blocks(node)):
            stays, goes = node, child
            self._table.move(nodes.hashes(child), node)
            nodes.edge[node] += nodes.edge[child]
            for grandchild in list(nodes.children(child)):
                nodes.lift(grandchild)
        else:
            stays, goes = child, node
            self._table.move(nodes.hashes(node), child)
            nodes.edge[child] = nodes.edge[node] + nodes.edge[child]
            nodes.depth[child] = nodes.depth[node]
            nodes.lift(child)
        nodes.last_used[stays] = last_used
        self._sets.drop(nodes.workers[goes])
        nodes.free(goes)
        nodes.raise_path(stays)
        return stays

    def _remove(self, node: int) -> None:
        """Forgets a leaf."""
        self._table.remove(self._nodes.hashes(node))
        workers = self._nodes.workers[node]
        if workers != EMPTY:
            self._sets.drop(workers)
        self._nodes.free(node)

    # Bounds ---------------------------------------------------------------------------------------------------------

    def _sweep(self) -> None:
        """Clears retired bits from some nodes. They are taken again after a whole pass only: no stale one misleads."""
        if not self._sweeping:
            if not self._bits.retired:
                return
            self._sweeping, self._swept = self._bits.retired, 1
        end = min(self._swept + self.sweep_nodes, self._nodes.numbers)
        for node in range(self._swept, end):
            workers = self._nodes.workers[node]
            if self._nodes.alive(node) and (workers == EMPTY or self._sets.either[workers] & self._sweeping):
                self._settle(node)
        self._swept = end
        if end == self._nodes.numbers:
            self._bits.release(self._sweeping)
            self._sweeping = 0

    def _bound(self) -> None:
        """Trims the oldest leaves until size and age are within their limits."""
        nodes = self._nodes
        excess = len(self._table) - self._max_blocks
        while excess > 0:
            leaf = nodes.oldest
            count = nodes.blocks(leaf)
            if count > excess:
                self._table.remove(nodes.hashes(leaf, count - excess))
                del nodes.edge[leaf][(count - excess) * HASH :]
                return
            excess -= count
            self._evict(leaf)
        oldest = self._clock() - self._max_age_s
        while (leaf := nodes.oldest) and nodes.last_used[leaf] < oldest:
            self._evict(leaf)

    def _evict(self, leaf: int) -> None:
        parent = self._nodes.parent[leaf]
        self._remove(leaf)
        if parent:
            self._settle(parent)

    def check_integrity(self) -> None:
        """Raises AssertionError if an invariant does not hold; for tests."""
        nodes = self._nodes
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
                stored, promised = self._masks(child)
                assert not stored & promised & self._bits.live
                assert all(self._table.get(block) == child for block in nodes.hashes(child))
                blocks += nodes.blocks(child)
                stack.append(child)
            self._check_shape(node)
        assert seen == len(nodes) == len(position)
        assert blocks == len(self._table) <= self._max_blocks
        assert not self._sweeping & ~self._bits.retired
        self._table.check_integrity()
        self._sets.check_integrity(used)
        self._bits.check_integrity()
        self.predictions.check_integrity()

    def _check_shape(self, node: int) -> None:
        masks, retired = self._masks(node), self._bits.retired
        if node == ROOT or (masks[0] | masks[1]) & retired:
            return
        assert any(masks) or self._nodes.has_children(node), "an empty leaf"
        child = self._nodes.only_child(node)
        if child and not self._sets.either[self._nodes.workers[child]] & retired:
            assert masks != self._masks(child), "an edge in two pieces"


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
