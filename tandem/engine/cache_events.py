"""What a prefix cache tells the cluster: which 64-token blocks became whole, and which no longer are.

Nothing is hashed on the step path. The tree only marks nodes that grew; hashes are computed when the worker drains, and
stay on their nodes, so that an eviction afterwards needs none. A block that came and went between two drains is never
mentioned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tandem.cluster import CacheEvent, EventKind
from tandem.engine.radix import TOKEN_BYTES, Node, unpack
from tandem.kv import BLOCK_TOKENS, BlockHash, block_hashes


class BlockJournal:
    """One STORED for each block that became whole, one EVICTED when it loses a page."""

    def __init__(self) -> None:
        self._grown: dict[Node, None] = {}
        self._evicted: list[BlockHash] = []

    def grew(self, node: Node) -> None:
        """A node was made or became longer."""
        self._grown[node] = None

    def split(self, upper: Node, lower: Node) -> None:
        """`lower` lost its first tokens to `upper`: divides what was announced."""
        count = _blocks_in(upper)
        upper.hashes, lower.hashes = lower.hashes[:count], lower.hashes[count:]
        if lower in self._grown:
            self._grown[upper] = None

    def shrank(self, node: Node) -> None:
        """A node lost tokens at its end, perhaps all."""
        count = _blocks_in(node)
        self._evicted += node.hashes[count:]
        del node.hashes[count:]
        if not node.key:
            self._grown.pop(node, None)

    def drain(self, names: Mapping[Node, bytes]) -> list[CacheEvent]:
        """Events since the last call: evictions first, since a block evicted and stored again is there.

        names: hash root of each tree's top node.
        """
        events = [CacheEvent(EventKind.EVICTED, tuple(self._evicted))] if self._evicted else []
        self._evicted = []
        for node in sorted(self._grown, key=lambda grown: grown.depth):
            known = len(node.hashes)
            parent = self._complete(node, names)
            if len(node.hashes) > known:
                events.append(CacheEvent(EventKind.STORED, tuple(node.hashes[known:]), parent))
        self._grown.clear()
        return events

    def snapshot(self, roots: Iterable[Node]) -> list[CacheEvent]:
        """All announced blocks that are still whole; after `drain`, that is all there are."""
        nodes = [node for root in roots for node in root.walk() if node.hashes]
        return [CacheEvent(EventKind.STORED, tuple(node.hashes), _hash_before(node)) for node in nodes]

    def _complete(self, node: Node, names: Mapping[Node, bytes]) -> BlockHash:
        """Computes a node's missing hashes (its ancestors have theirs); returns the hash before the first of them."""
        parent = node.hashes[-1] if node.hashes else _hash_before(node)
        start = (node.depth // BLOCK_TOKENS + len(node.hashes)) * BLOCK_TOKENS
        run, top = node.key[max(start - node.depth, 0) * TOKEN_BYTES :], node
        while top.parent is not None:
            if top.depth > start:
                above = top.parent
                run = above.key[max(start - above.depth, 0) * TOKEN_BYTES :] + run
            top = top.parent
        node.hashes += block_hashes(names[top], unpack(run), parent=parent)
        return parent

    def check_integrity(self, nodes: Iterable[Node]) -> None:
        """Raises AssertionError unless every node's blocks are announced or will be."""
        alive = set(nodes)
        assert all(node in alive for node in self._grown), "an evicted node would be announced"
        for node in alive:
            missing = _blocks_in(node) - len(node.hashes)
            assert missing == 0 or (missing > 0 and node in self._grown), (missing, node.depth)


def _blocks_in(node: Node) -> int:
    """Blocks whose last token is in the node."""
    return node.end // BLOCK_TOKENS - node.depth // BLOCK_TOKENS


def _hash_before(node: Node) -> BlockHash:
    """Hash of the last whole block before the node; empty when there is none."""
    above = node.parent
    while above is not None and not above.hashes:
        above = above.parent
    return above.hashes[-1] if above is not None else b""
