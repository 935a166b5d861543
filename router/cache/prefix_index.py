"""The router's approximate radix tree of what every worker has cached.

Block hashes are chained, so a hash names its whole prefix: comparing an edge's last hash compares the edge, and one
dictionary finds any block. Sources are the workers' events; the router's own predictions lie beside the tree until the
worker's answer replaces them. After the radix tree of RadixAttention (Zheng et al. 2024), over all workers at once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import takewhile
from typing import Protocol

from router.cache.predictions import Predictions
from tandem.cluster import CacheEvent, EventKind, Incarnation
from tandem.kv import BlockHash

SWEEP_NODES = 64
"""Nodes cleared of retired slots in each call, so that forgetting a worker never stops the event loop."""
DEVICE_TIER = "device"
"""The only tier counted: blocks elsewhere cannot be used without a cost that plans do not know yet."""


class _Node:
    """An edge of the tree and the node at its end: blocks that exactly the same workers hold or promise."""

    __slots__ = ("children", "hashes", "last_used", "parent", "promised", "stored")

    def __init__(
        self, hashes: list[BlockHash], parent: _Node | None, stored: int, promised: int, last_used: float
    ) -> None:
        self.hashes = hashes
        self.parent = parent
        self.children: dict[BlockHash, _Node] = {}
        self.stored = stored
        self.promised = promised
        self.last_used = last_used


class _Change(Protocol):
    def __call__(self, node: _Node) -> tuple[int, int]: ...


class PrefixIndex:
    """Which worker has which prefix. Bounded by blocks and by age; evicts the least recently used leaf first.

    max_blocks: blocks kept at most. max_age_s: seconds an unused block is kept. clock: seconds, monotonic.
    """

    def __init__(self, max_blocks: int, max_age_s: float, clock: Callable[[], float]) -> None:
        self._max_blocks = max_blocks
        self._max_age_s = max_age_s
        self._clock = clock
        self._root = _Node([], None, 0, 0, 0.0)
        self._where: dict[BlockHash, _Node] = {}
        # Least recently used first; an ancestor always comes after its descendants, so the first node is a leaf.
        self._order: OrderedDict[_Node, None] = OrderedDict()
        self._slots: dict[Incarnation, int] = {}
        self._names: dict[int, Incarnation] = {}
        self._free_slots: list[int] = []
        self._next_slot = 0
        self._live = 0
        self._retired = 0
        self._sweeping = 0
        self._sweep_queue: list[_Node] = []
        self.predictions = Predictions(clock)
        """The router's own, beside the tree."""
        self.unplaced = 0
        """Blocks of events ignored so far, because the block before them is not (or no longer) known here."""

    def __len__(self) -> int:
        """Blocks in the tree."""
        return len(self._where)

    @property
    def nodes(self) -> int:
        """Edges in the tree."""
        return len(self._order)

    def match(self, hashes: Sequence[BlockHash]) -> dict[Incarnation, int]:
        """For each worker with any: how many blocks at the front of `hashes` it holds, promised or should soon hold."""
        self._bound()
        found: dict[Incarnation, int] = {}
        node, matched, alive = self._root, 0, self._live
        while matched < len(hashes) and alive:
            child = node.children.get(hashes[matched])
            if child is None:
                break
            holders = alive & (child.stored | child.promised)
            self._record(found, alive & ~holders, matched)
            alive = holders
            if not alive:
                break
            common = _common(child.hashes, hashes, matched)
            matched += common
            node = child
            if common < len(child.hashes):
                break
        self._record(found, alive, matched)
        self._touch(node)
        for incarnation, length in self.predictions.match(hashes):
            if length > found.get(incarnation, 0):
                found[incarnation] = length
        return found

    def apply(self, incarnation: Incarnation, event: CacheEvent) -> None:
        """Takes one event of a worker; a worker not heard of before is added."""
        self._sweep()
        if event.tier != DEVICE_TIER or not event.hashes:
            return
        bit = 1 << self._slot(incarnation)
        if event.kind is EventKind.STORED:
            self._insert(event, lambda node: (node.stored | bit, node.promised & ~bit), bit, 0)
        elif event.kind is EventKind.PROMISED:
            self._insert(event, lambda node: (node.stored, node.promised | (bit & ~node.stored)), 0, bit)
        elif event.kind is EventKind.EVICTED:
            self._mark(event.hashes, lambda node: (node.stored & ~bit, node.promised))
        else:
            self._mark(event.hashes, lambda node: (node.stored, node.promised & ~bit))

    def snapshot(self, incarnation: Incarnation, events: Iterable[CacheEvent]) -> None:
        """Replaces all that is known of a worker, predictions apart, by `events`."""
        self._retire(incarnation)
        self._slot(incarnation)
        for event in events:
            self.apply(incarnation, event)

    def drop(self, incarnation: Incarnation) -> None:
        """Forgets a worker at once: no later match names it. Its bits are swept out of the tree bit by bit."""
        self._retire(incarnation)
        self.predictions.drop(incarnation)
        self._sweep()

    def _record(self, found: dict[Incarnation, int], mask: int, blocks: int) -> None:
        if blocks:
            for slot in _bits(mask):
                found[self._names[slot]] = blocks

    def _slot(self, incarnation: Incarnation) -> int:
        slot = self._slots.get(incarnation)
        if slot is None:
            if self._free_slots:
                slot = self._free_slots.pop()
            else:
                slot = self._next_slot
                self._next_slot += 1
            self._slots[incarnation] = slot
            self._names[slot] = incarnation
            self._live |= 1 << slot
        return slot

    def _retire(self, incarnation: Incarnation) -> None:
        slot = self._slots.pop(incarnation, None)
        if slot is not None:
            del self._names[slot]
            self._live &= ~(1 << slot)
            self._retired |= 1 << slot

    def _sweep(self) -> None:
        """Clears retired slots from some nodes. Slots are reused after a whole pass only, so no stale bit misleads."""
        if not self._sweeping:
            if not self._retired:
                return
            self._sweeping, self._retired = self._retired, 0
            self._sweep_queue = list(self._order)
        for _ in range(min(SWEEP_NODES, len(self._sweep_queue))):
            node = self._sweep_queue.pop()
            if node in self._order:
                self._settle(node)
        if not self._sweep_queue:
            self._free_slots.extend(_bits(self._sweeping))
            self._sweeping = 0

    def _insert(self, event: CacheEvent, change: _Change, stored: int, promised: int) -> None:
        hashes = event.hashes
        known = sum(1 for _ in takewhile(self._where.__contains__, hashes))
        fresh = list(hashes[known:])
        self._mark(hashes[:known], change)
        if fresh:
            parent = self._find(hashes[known - 1] if known else event.parent)
            # A known block after an unknown one cannot be: the event is malformed and would corrupt the tree.
            if parent is None or len(set(fresh)) < len(fresh) or not self._where.keys().isdisjoint(fresh):
                self.unplaced += len(fresh)
            else:
                self._grow(parent, fresh, stored, promised)
        self._bound()

    def _find(self, block: BlockHash) -> tuple[_Node, int] | None:
        """The node of a block and how many of the node's blocks end with it; the root for the empty hash."""
        if not block:
            return self._root, 0
        node = self._where.get(block)
        return None if node is None else (node, node.hashes.index(block) + 1)

    def _grow(self, place: tuple[_Node, int], fresh: list[BlockHash], stored: int, promised: int) -> None:
        node, offset = place
        if offset < len(node.hashes):
            self._split(node, offset)
        self._clean(node)
        if node is not self._root and not node.children and (node.stored, node.promised) == (stored, promised):
            node.hashes.extend(fresh)
        else:
            child = _Node(fresh, node, stored, promised, self._clock())
            node.children[fresh[0]] = child
            self._order[child] = None
            if node is not self._root:
                self._settle(node)
            node = child
        for block in fresh:
            self._where[block] = node
        self._touch(node)

    def _mark(self, hashes: Iterable[BlockHash], change: _Change) -> None:
        """Gives the known ones of `hashes` the masks that `change` computes, splitting edges where needed."""
        groups: dict[_Node, list[BlockHash]] = {}
        for block in hashes:
            node = self._where.get(block)
            if node is not None:
                groups.setdefault(node, []).append(block)
        changed: list[_Node] = []
        for node, blocks in groups.items():
            if change(node) == (node.stored, node.promised):
                continue
            # From the end: a split keeps the front in `node`, so offsets before it stay valid.
            for start, end in reversed(_runs(node.hashes, blocks)):
                piece = self._isolate(node, start, end)
                piece.stored, piece.promised = change(piece)
                changed.append(piece)
            changed.append(node)
        for node in changed:
            if node in self._order:
                self._settle(node)

    def _isolate(self, node: _Node, start: int, end: int) -> _Node:
        if end < len(node.hashes):
            self._split(node, end)
        return self._split(node, start) if start else node

    def _split(self, node: _Node, offset: int) -> _Node:
        """Cuts an edge: `node` keeps the blocks before `offset`, the node returned has the rest and the children."""
        tail = _Node(node.hashes[offset:], node, node.stored, node.promised, node.last_used)
        del node.hashes[offset:]
        tail.children, node.children = node.children, {tail.hashes[0]: tail}
        for child in tail.children.values():
            child.parent = tail
        for block in tail.hashes:
            self._where[block] = tail
        if self._sweeping:
            self._sweep_queue.append(tail)
        self._order[tail] = None
        self._raise(node)
        return tail

    def _clean(self, node: _Node) -> None:
        node.stored &= self._live
        node.promised &= self._live

    def _settle(self, node: _Node) -> None:
        """Restores the shape around a changed node: no empty leaf, no edge that could be one with its only child."""
        self._clean(node)
        while node is not self._root and not node.children and not node.stored | node.promised:
            parent = node.parent
            assert parent is not None
            self._remove(node)
            node = parent
            self._clean(node)
        if node is self._root:
            return
        self._join(node)
        if node.parent is not None and node.parent is not self._root:
            self._join(node.parent)

    def _join(self, node: _Node) -> None:
        """Makes one edge of `node` and its only child when the same workers have both."""
        if len(node.children) != 1:
            return
        (child,) = node.children.values()
        self._clean(node)
        masks = (child.stored & self._live, child.promised & self._live)
        # An empty leaf still waits for its sweep, which removes it.
        if masks != (node.stored, node.promised) or not (any(masks) or child.children):
            return
        for block in child.hashes:
            self._where[block] = node
        node.hashes.extend(child.hashes)
        node.children = child.children
        for grandchild in node.children.values():
            grandchild.parent = node
        node.last_used = max(node.last_used, child.last_used)
        del self._order[child]

    def _remove(self, node: _Node) -> None:
        assert node.parent is not None
        del node.parent.children[node.hashes[0]]
        del self._order[node]
        for block in node.hashes:
            del self._where[block]

    def _touch(self, node: _Node) -> None:
        now = self._clock()
        at: _Node | None = node
        while at is not None and at is not self._root:
            at.last_used = now
            at = at.parent
        self._raise(node)

    def _raise(self, node: _Node) -> None:
        """Moves a node and its ancestors to the young end, ancestors last."""
        at: _Node | None = node
        while at is not None and at is not self._root:
            self._order.move_to_end(at)
            at = at.parent

    def _bound(self) -> None:
        """Trims the oldest leaves until size and age are within their limits."""
        excess = len(self._where) - self._max_blocks
        while excess > 0:
            leaf = next(iter(self._order))
            if len(leaf.hashes) > excess:
                for block in leaf.hashes[-excess:]:
                    del self._where[block]
                del leaf.hashes[-excess:]
                return
            excess -= len(leaf.hashes)
            self._evict(leaf)
        oldest = self._clock() - self._max_age_s
        while self._order and (leaf := next(iter(self._order))).last_used < oldest:
            self._evict(leaf)

    def _evict(self, leaf: _Node) -> None:
        parent = leaf.parent
        self._remove(leaf)
        if parent is not None and parent is not self._root:
            self._settle(parent)

    def check_integrity(self) -> None:
        """Raises AssertionError if an invariant does not hold; for tests."""
        seen: dict[BlockHash, _Node] = {}
        position = {node: place for place, node in enumerate(self._order)}
        stack = [self._root]
        while stack:
            node = stack.pop()
            for first, child in node.children.items():
                assert child.parent is node
                assert child.hashes[0] == first
                assert node is self._root or position[child] < position[node]
                assert not (child.stored & child.promised & self._live)
                for block in child.hashes:
                    assert block not in seen
                    seen[block] = child
                stack.append(child)
            self._check_shape(node)
        assert seen == self._where
        assert position.keys() == set(seen.values())
        assert len(self._where) <= self._max_blocks
        assert self._live == sum(1 << slot for slot in self._slots.values())
        assert {name: slot for slot, name in self._names.items()} == self._slots
        taken = self._live | self._retired | self._sweeping
        assert not any(taken >> slot & 1 for slot in self._free_slots)
        self.predictions.check_integrity()

    def _check_shape(self, node: _Node) -> None:
        pending = self._retired | self._sweeping
        if node is self._root or (node.stored | node.promised) & pending:
            return
        masks = (node.stored, node.promised)
        assert any(masks) or node.children, "an empty leaf"
        if len(node.children) == 1:
            (child,) = node.children.values()
            if not (child.stored | child.promised) & pending:
                assert masks != (child.stored, child.promised), "an edge in two pieces"


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def _common(edge: list[BlockHash], hashes: Sequence[BlockHash], start: int) -> int:
    """Blocks of `edge` that `hashes[start:]` begins with. Chained hashes: equal at the end means equal all along."""
    length = min(len(edge), len(hashes) - start)
    if edge[length - 1] == hashes[start + length - 1]:
        return length
    low, high = 0, length - 1
    while low < high:
        middle = (low + high) // 2
        if edge[middle] == hashes[start + middle]:
            low = middle + 1
        else:
            high = middle
    return low


def _runs(edge: list[BlockHash], blocks: list[BlockHash]) -> list[tuple[int, int]]:
    """The maximal ranges [start, end) of `edge` that `blocks`, in any order, covers."""
    if len(blocks) == len(edge):
        return [(0, len(edge))]
    place = {block: offset for offset, block in enumerate(edge)}
    runs: list[tuple[int, int]] = []
    for offset in sorted({place[block] for block in blocks}):
        if runs and runs[-1][1] == offset:
            runs[-1] = (runs[-1][0], offset + 1)
        else:
            runs.append((offset, offset + 1))
    return runs
