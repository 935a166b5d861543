"""A worker's own prefix cache: RadixAttention (Zheng et al. 2023, arXiv:2312.07104) over pages of KV.

One radix tree for each hash root. Edges are path-compressed runs of whole pages; matching goes on to the single token,
and a partly matching page is named so that its first tokens can be copied. Handles keep a path from being evicted; the
rest is reclaimed a page at a time from the ends of the least recently used leaves.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tandem.cluster import CacheEvent
from tandem.engine.cache_events import BlockJournal
from tandem.engine.pages import PagePool
from tandem.engine.radix import TOKEN_BYTES, Node, common_bytes


@dataclass(frozen=True, slots=True)
class Match:
    """What is cached of a token run. Valid until the cache changes."""

    root: bytes
    pages: tuple[int, ...] = ()
    """Whole pages that match."""
    tokens: int = 0
    """Matching tokens, those of a partly matching page included."""
    node: Node | None = None
    """Where the last whole page is; None when there is no tree yet."""
    used: int = 0
    """Pages of `node` that match."""
    partial: Node | None = None
    """The node with the partly matching page, first after the whole ones."""
    partial_page: int = -1
    partial_tokens: int = 0


class PrefixCache:
    """The trees and the pages in them. Inserted pages belong to it; evicted and duplicate ones go back to `pool`."""

    def __init__(self, pool: PagePool, page_size: int) -> None:
        self.num_pages = 0
        """Pages in the tree."""
        self.evictable_pages = 0
        """Those that no handle keeps."""
        self.version = 0
        """Raised whenever a match may have become longer, or a duplicate may have been freed."""
        self._pool = pool
        self._page_bytes = page_size * TOKEN_BYTES
        self._roots: dict[bytes, Node] = {}
        self._names: dict[Node, bytes] = {}
        self._journal = BlockJournal()
        self._leaves: list[tuple[int, int, Node]] = []
        self._tick = 0
        self._serial = 0

    def match(self, root: bytes, packed: bytes, limit: int) -> Match:
        """The longest cached prefix of a packed token run, at most `limit` tokens. Changes nothing."""
        node = self._roots.get(root)
        if node is None:
            return Match(root)
        packed = packed[: limit * TOKEN_BYTES]
        at, used, pages = 0, 0, list[int]()
        while child := node.children.get(packed[at : at + self._page_bytes]):
            shared = common_bytes(child.key, packed[at:])
            used = shared // self._page_bytes
            pages += child.pages[:used]
            at += used * self._page_bytes
            node = child
            if used < len(child.pages):
                rest = (shared - used * self._page_bytes) // TOKEN_BYTES
                page = child.pages[used] if rest else -1
                return self._found(root, pages, at, node, used, child if rest else None, page, rest)
        near, rest = node.nearest(packed[at : at + self._page_bytes])
        return self._found(root, pages, at, node, used, near, near.pages[0] if near else -1, rest)

    def _found(
        self, root: bytes, pages: list[int], at: int, node: Node, used: int, partial: Node | None, page: int, rest: int
    ) -> Match:
        return Match(root, tuple(pages), at // TOKEN_BYTES + rest, node, used, partial, page, rest)

    def acquire(self, match: Match) -> Node:
        """A handle that keeps the match's whole pages. The match must be fresh; release it with `release`."""
        node = match.node
        if node is None:
            node = self._roots[match.root] = Node(None, 0)
            self._names[node] = match.root
        elif match.used < len(node.pages):
            node = self._split(node, match.used)
        self.hold(node)
        return node

    def hold(self, node: Node) -> None:
        """One more handle on a node's path."""
        step: Node | None = node
        while step is not None:
            self._hold_one(step)
            step = step.parent

    def _hold_one(self, node: Node) -> None:
        if node.refs == 0:
            self.evictable_pages -= len(node.pages)
        node.refs += 1

    def release(self, node: Node) -> None:
        """Gives a handle back; pages without one may be evicted from now on."""
        self._tick += 1
        step: Node | None = node
        while step is not None:
            assert step.refs > 0, "a handle was released twice"
            step.refs -= 1
            if step.refs == 0:
                self.evictable_pages += len(step.pages)
            step.last_used = self._tick
            step = step.parent
        self._offer(node)

    def extend(self, handle: Node, packed: bytes, pages: Sequence[int]) -> tuple[Node, list[int]]:
        """Inserts whole pages after a handle's path. Returns the handle in its place, and the pages that hold the run.

        packed: their tokens. Where the tree has them already, its own pages are returned and the given ones freed.
        """
        self.version += 1
        node, at, owned = handle, 0, list[int]()
        while at < len(packed):
            child = node.children.get(packed[at : at + self._page_bytes])
            if child is None:
                node = self._append(node, packed[at:], list(pages[len(owned) :]))
                owned += pages[len(owned) :]
                break
            used = common_bytes(child.key, packed[at:]) // self._page_bytes
            if used < len(child.pages):
                child = self._split(child, used)
            self._pool.free(pages[len(owned) : len(owned) + used])
            owned += child.pages
            at += used * self._page_bytes
            self._hold_one(child)
            node = child
        return node, owned

    def _append(self, node: Node, packed: bytes, pages: list[int]) -> Node:
        """Adds pages after `node`: to it where nobody else uses it, else as a child with one handle."""
        if node.parent is None or node.children or node.refs > 1:
            child = Node(node, node.end, refs=1)
            node.attach(packed[: self._page_bytes], child)
            node = child
        node.key += packed
        node.pages += pages
        self.num_pages += len(pages)
        self._journal.grew(node)
        return node

    def _split(self, node: Node, count: int) -> Node:
        """Cuts a node after `count` pages; returns the new upper part. Handles on `node` still mean the whole path."""
        parent = node.parent
        assert parent is not None, "a root cannot be split"
        cut = count * self._page_bytes
        upper = Node(parent, node.depth, node.key[:cut], node.pages[:count], node.refs, node.last_used)
        parent.attach(upper.key[: self._page_bytes], upper)
        node.key, node.pages, node.depth = node.key[cut:], node.pages[count:], upper.end
        upper.attach(node.key[: self._page_bytes], node)
        self._journal.split(upper, node)
        return upper

    def evict(self, count: int) -> int:
        """Frees up to `count` pages, least recently used leaves first and from their ends; returns how many."""
        freed = 0
        while freed < count and self._leaves:
            stamp, _, node = heapq.heappop(self._leaves)
            if not self._is_loose(stamp, node):
                continue
            first, parent = node.key[: self._page_bytes], node.parent
            keep = max(len(node.pages) - (count - freed), 0)
            gone = node.pages[keep:]
            node.key, node.pages = node.key[: keep * self._page_bytes], node.pages[:keep]
            self._journal.shrank(node)
            self._pool.free(gone)
            freed += len(gone)
            if keep:
                self._offer(node)
            elif parent is not None:
                parent.detach(first)
                self._offer(parent)
        self.num_pages -= freed
        self.evictable_pages -= freed
        return freed

    def _is_loose(self, stamp: int, node: Node) -> bool:
        """Whether an entry of the queue still means an evictable leaf."""
        return node.parent is not None and not node.refs and not node.children and node.last_used == stamp

    def _offer(self, node: Node) -> None:
        """Queues a node for eviction if it is a leaf without handle; an empty root just goes."""
        if node.refs or node.children:
            return
        if node.parent is None:
            del self._roots[self._names.pop(node)]
            return
        self._serial += 1
        heapq.heappush(self._leaves, (node.last_used, self._serial, node))
        if len(self._leaves) > 64 + 2 * self.num_pages:
            self._leaves = [entry for entry in self._leaves if self._is_loose(entry[0], entry[2])]
            heapq.heapify(self._leaves)

    def drain_events(self) -> list[CacheEvent]:
        """Blocks stored and evicted since the last call. Hashes here, and nowhere else: call it between steps."""
        return self._journal.drain(self._names)

    def snapshot_events(self) -> list[CacheEvent]:
        """The whole cache as STORED events, as of the last `drain_events`."""
        return self._journal.snapshot(self._roots.values())

    def nodes(self) -> Iterator[tuple[bytes, Node]]:
        """All (root, node), parents first; for checks."""
        for root, top in self._roots.items():
            for node in top.walk():
                yield root, node

    def check_integrity(self) -> None:
        """Raises AssertionError when trees, counters, eviction queue, events or the page pool disagree."""
        nodes = [node for _, node in self.nodes()]
        pages = [page for node in nodes for page in node.pages]
        assert len(pages) == len(set(pages)) == self.num_pages, "a page is in the tree twice, or was miscounted"
        assert set(pages) <= self._pool.used(), "a cached page is free"
        assert self.evictable_pages == sum(len(node.pages) for node in nodes if not node.refs)
        loose = {node for stamp, _, node in self._leaves if self._is_loose(stamp, node)}
        for node in nodes:
            node.check_children(self._page_bytes)
            assert len(node.key) == len(node.pages) * self._page_bytes
            if node.parent is None:
                assert not node.key
                assert node.children or node.refs, "an empty root stays"
            else:
                assert node.pages, "an empty node stays"
                assert node.refs or node.children or node in loose, "a leaf can never be evicted"
        self._journal.check_integrity(nodes)
