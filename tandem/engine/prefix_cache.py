"""A worker's own prefix cache: RadixAttention (Zheng et al. 2023, arXiv:2312.07104) over pages of KV.

One radix tree for each hash root. Edges are path-compressed runs of whole pages; matching goes on to the single token,
and a partly matching page is named so that its first tokens can be copied. Handles keep a path from being evicted; the
rest is reclaimed a page at a time from the ends of the least recently used leaves.

Of layer groups with a window a path may lack pages. A prefix of L tokens is cached when every group has the pages that
position L sees, so each of these groups is reclaimed apart, page by page, while the tree stays. A model without a group
of full attention has a tree of tokens alone: its ends go when no group has a page there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tandem.cluster import CacheEvent
from tandem.engine.cache_events import BlockJournal
from tandem.engine.eviction import EvictionQueue
from tandem.engine.pages import PagePool
from tandem.engine.radix import NO_PAGE, TOKEN_BYTES, Node, Pages, common_bytes
from tandem.engine.verification import CorruptKv
from tandem.engine.windows import CachedWindow
from tandem.kv import LayerGroup


@dataclass(frozen=True, slots=True)
class Match:
    """What is cached of a token run. Valid until the cache changes."""

    root: bytes
    pages: Pages
    """Whole pages that match, per group; `NO_PAGE` before the window of the next position."""
    tokens: int = 0
    """Matching tokens, those of a partly matching page included."""
    node: Node | None = None
    """Where the last whole page is; None when there is no tree yet."""
    used: int = 0
    """Pages of `node` that match."""
    partial: Node | None = None
    """The node with the partly matching page, first after the whole ones."""
    partial_pages: Sequence[int] = ()
    """That page, per group."""
    partial_tokens: int = 0

    @property
    def whole(self) -> int:
        """Whole pages that match, missing ones included."""
        return len(self.pages[0])

    def whole_only(self) -> Match:
        """The match without its partly matching page."""
        return replace(self, tokens=self.tokens - self.partial_tokens, partial=None, partial_pages=(), partial_tokens=0)


class PrefixCache:
    """The trees and the pages in them. Inserted pages belong to it; evicted and duplicate ones go back to `pools`."""

    def __init__(
        self, pools: Sequence[PagePool], groups: Sequence[LayerGroup], page_size: int, tenant_share: float = 1.0
    ) -> None:
        """tenant_share: of the pages of full attention, beyond which a tenant's own are evicted first."""
        self.num_pages = 0
        """Pages of a group in the tree, missing ones included."""
        self.version = 0
        """Raised whenever a match may have become longer, or a duplicate may have been freed."""
        self._groups = tuple(groups)
        self._windows = {
            number: CachedWindow(pool, page_size)
            for number, (group, pool) in enumerate(zip(groups, pools, strict=True))
            if group.window is not None
        }
        self._full = {number: pool for number, pool in enumerate(pools) if number not in self._windows}
        self._loose_pages = 0
        self._page_size = page_size
        self._page_bytes = page_size * TOKEN_BYTES
        self._roots: dict[bytes, Node] = {}
        self._names: dict[Node, bytes] = {}
        self._journal = BlockJournal()
        counts = [pool.num_pages for pool in self._full.values()]
        self._leaves = EvictionQueue(tenant_share * max(counts, default=0))
        self._owners: dict[Node, str] = {}
        """The tenant of each tree: whose salt is in its root."""
        self._tick = 0

    def cached(self, group: int) -> int:
        """Pages of a group that are in the tree."""
        return self.num_pages if group in self._full else self._windows[group].num_pages

    def evictable(self, group: int) -> int:
        """Those of them that no handle keeps."""
        return self._loose_pages if group in self._full else self._windows[group].evictable

    def match(self, root: bytes, packed: bytes, limit: int, total: int | None = None) -> Match:
        """The longest cached prefix of a packed token run, at most `limit` tokens. Changes nothing.

        total: the prefix is handed over as the first part of `[0, total)`: what moves of it must be there, too.
        """
        node = self._roots.get(root)
        if node is None:
            return Match(root, tuple(() for _ in self._groups))
        packed = packed[: limit * TOKEN_BYTES]
        steps: list[tuple[Node, int]] = [(node, 0)]
        at = 0
        while child := node.children.get(packed[at : at + self._page_bytes]):
            shared = common_bytes(child.key, packed[at:])
            used = shared // self._page_bytes
            steps.append((child, used))
            at += used * self._page_bytes
            node = child
            if used < child.num_pages:
                rest = (shared - used * self._page_bytes) // TOKEN_BYTES
                return self._found(root, steps, child if rest else None, used, rest, total)
        near, rest = node.nearest(packed[at : at + self._page_bytes])
        return self._found(root, steps, near, 0, rest, total)

    def _found(
        self, root: bytes, steps: list[tuple[Node, int]], near: Node | None, place: int, rest: int, total: int | None
    ) -> Match:
        """The match along `steps`, then `rest` tokens of the page at `place` of `near`, as far as windows allow."""
        runs: list[list[int]] = [[] for _ in self._groups]
        for group, run in enumerate(runs):
            for node, used in steps:
                run += node.pages[group][:used]
        node, used = steps[-1]
        partial = [run[place] for run in near.pages] if near else ()
        match = Match(root, runs, len(runs[0]) * self._page_size + rest, node, used, near, partial, rest)
        return self._usable(match, steps, total) if self._windows else match

    def _usable(self, match: Match, steps: list[tuple[Node, int]], total: int | None) -> Match:
        """The match, shortened until each window is covered, without what lies before the windows."""
        if match.partial is not None and not self._covered(match, total):
            match = match.whole_only()
        if match.partial is None:
            match = self._shortened(match, steps, total)
        pages = [list(run) for run in match.pages]
        for group in self._windows:
            first = min(self._needed_from(group, match.tokens, total), match.whole)
            pages[group][:first] = [NO_PAGE] * first
        return replace(match, pages=pages)

    def _needed_from(self, group: int, tokens: int, total: int | None) -> int:
        """First page of a group with a window that a prefix of `tokens` tokens needs."""
        first = self._groups[group].seen_from(tokens)
        if total is not None:
            first = min(first, self._groups[group].moved_from(total))
        return first // self._page_size

    def _covered(self, match: Match, total: int | None) -> bool:
        """Whether the pages that a match needs are there, the partly matching one among them."""
        return all(
            match.partial_pages[group] != NO_PAGE
            and NO_PAGE not in match.pages[group][self._needed_from(group, match.tokens, total) :]
            for group in self._windows
        )

    def _shortened(self, match: Match, steps: list[tuple[Node, int]], total: int | None) -> Match:
        """The longest usable prefix of whole pages. A missing page rules out every end whose window has it."""
        count, unsettled = match.whole, True
        while unsettled:
            unsettled = False
            for group in self._windows:
                first = self._needed_from(group, count * self._page_size, total)
                if NO_PAGE in match.pages[group][first:count]:
                    count = _last_missing(match.pages[group], count)
                    unsettled = True
        if count == match.whole:
            return match
        node = next(node for node, _ in steps if node.end >= count * self._page_size)
        pages = [run[:count] for run in match.pages]
        return Match(match.root, pages, count * self._page_size, node, count - node.depth // self._page_size)

    def acquire(self, match: Match, tenant: str = "") -> Node:
        """A handle that keeps the match's whole pages. The match must be fresh; release it with `release`.

        tenant: whose the tree is, when it is a new one.
        """
        node = match.node
        if node is None:
            node = self._roots[match.root] = Node(None, 0, pages=[[] for _ in self._groups])
            self._names[node] = match.root
            self._owners[node] = tenant
        elif match.used < node.num_pages:
            node = self._split(node, match.used)
        self.hold(node, match.pages)
        return node

    def hold(self, node: Node, pages: Pages) -> None:
        """One more handle on a node's path, and on those of `pages` that are of groups with a window."""
        for group, window in self._windows.items():
            window.hold(pages[group])
        step: Node | None = node
        while step is not None:
            self._hold_one(step)
            step = step.parent

    def _hold_one(self, node: Node) -> None:
        if node.refs == 0:
            self._loose_pages -= node.num_pages
        node.refs += 1

    def let_go(self, group: int, pages: Sequence[int]) -> None:
        """Gives back handles on single pages of a group with a window; the path stays held."""
        self._windows[group].let_go(pages)

    def release(self, node: Node, pages: Pages) -> None:
        """Gives a handle back, with those on `pages` of groups with a window; they may be evicted from now on."""
        for group, window in self._windows.items():
            window.let_go(pages[group])
        self._tick += 1
        step: Node | None = node
        while step is not None:
            assert step.refs > 0, "a handle was released twice"
            step.refs -= 1
            if step.refs == 0:
                self._loose_pages += step.num_pages
            step.last_used = self._tick
            step = step.parent
        self._offer(node)

    def extend(self, handle: Node, packed: bytes, pages: Pages) -> tuple[Node, list[list[int]]]:
        """Inserts whole pages after a handle's path. Returns the handle in its place, and the pages that hold the run.

        packed: their tokens. Where the tree has them already, its own pages are returned and the given ones freed;
        where it lacks one of a group with a window, it takes it. Pages of these groups are held once from then on.
        """
        self.version += 1
        node, at, done = handle, 0, 0
        owned: list[list[int]] = [[] for _ in pages]
        while at < len(packed):
            child = node.children.get(packed[at : at + self._page_bytes])
            if child is None:
                rest = [list(run[done:]) for run in pages]
                node = self._append(node, packed[at:], rest)
                owned = [mine + run for mine, run in zip(owned, rest, strict=True)]
                break
            used = common_bytes(child.key, packed[at:]) // self._page_bytes
            if used < child.num_pages:
                child = self._split(child, used)
            for group, run in enumerate(pages):
                owned[group] += self._merge(group, child, run[done : done + used])
            done += used
            at += used * self._page_bytes
            self._hold_one(child)
            node = child
        return node, owned

    def _merge(self, group: int, node: Node, given: Sequence[int]) -> list[int]:
        if (pool := self._full.get(group)) is not None:
            pool.free(given)
            return node.pages[group]
        return self._windows[group].merge(node, node.pages[group], given)

    def _append(self, node: Node, packed: bytes, pages: Sequence[list[int]]) -> Node:
        """Adds pages after `node`: to it where nobody else uses it, else as a child with one handle."""
        if node.parent is None or node.children or node.refs > 1:
            child = Node(node, node.end, pages=[[] for _ in pages], refs=1)
            node.attach(packed[: self._page_bytes], child)
            node = child
        node.key += packed
        for mine, run in zip(node.pages, pages, strict=True):
            mine += run
        for group, window in self._windows.items():
            window.adopt(pages[group], node, node.num_pages - len(pages[group]))
        self.num_pages += len(pages[0])
        self._leaves.count(self._owner(node), len(pages[0]))
        self._journal.grew(node)
        return node

    def _split(self, node: Node, count: int) -> Node:
        """Cuts a node after `count` pages; returns the new upper part. Handles on `node` still mean the whole path."""
        parent = node.parent
        assert parent is not None, "a root cannot be split"
        cut = count * self._page_bytes
        runs = [run[:count] for run in node.pages]
        upper = Node(parent, node.depth, node.key[:cut], runs, node.refs, node.last_used)
        parent.attach(upper.key[: self._page_bytes], upper)
        node.key, node.pages, node.depth = node.key[cut:], [run[count:] for run in node.pages], upper.end
        upper.attach(node.key[: self._page_bytes], node)
        for group, window in self._windows.items():
            window.move(upper.pages[group], upper)
        self._journal.split(upper, node)
        return upper

    def evict(self, group: int, count: int) -> int:
        """Frees up to `count` pages of a group, the least recently used first; returns how many.

        With full attention they are the ends of leaves, which other groups lose with them.
        """
        return self._evict_ends(count) if group in self._full else self._evict_single(group, count)

    def _evict_ends(self, count: int) -> int:
        freed = 0
        while freed < count and (node := self._leaves.take()) is not None:
            keep = max(node.num_pages - (count - freed), 0)
            freed += self._cut(node, keep)
            if keep:
                self._offer(node)
        return freed

    def _evict_single(self, group: int, count: int) -> int:
        window, freed = self._windows[group], 0
        while freed < count and (node := window.evict(group)) is not None:
            freed += 1
            if not self._full:
                self._offer(node)
        return freed

    def _cut(self, node: Node, keep: int) -> int:
        """Drops what a leaf without handle has behind its first `keep` pages, and a leaf without any."""
        first, parent, gone = node.key[: self._page_bytes], node.parent, node.num_pages - keep
        for group, run in enumerate(node.pages):
            if group in self._full:
                self._full[group].free(run[keep:])
            else:
                self._windows[group].drop(run[keep:])
            del run[keep:]
        node.key = node.key[: keep * self._page_bytes]
        self._journal.shrank(node)
        self.num_pages -= gone
        self._leaves.count(self._owner(node), -gone)
        self._loose_pages -= gone
        if not keep and parent is not None:
            parent.detach(first)
            self._offer(parent)
        return gone

    def drop(self, match: Match, place: int) -> None:
        """Takes a matched page out, and all behind it. Raises CorruptKv when somebody holds it. Matches are void."""
        node = match.node if place < match.whole else match.partial
        assert node is not None
        while node.depth > place * self._page_size:
            assert node.parent is not None
            node = node.parent
        if count := place - node.depth // self._page_size:
            self._split(node, count)
        if node.refs:
            raise CorruptKv(f"KV from token {node.depth} on has changed while sequences compute with it")
        for below in reversed(list(node.walk())):
            if below.num_pages:
                self._cut(below, 0)

    def _owner(self, node: Node) -> str:
        while node.parent is not None:
            node = node.parent
        return self._owners[node]

    def _offer(self, node: Node) -> None:
        """Queues a node for eviction if it is a leaf without handle; an empty root just goes, and so do dead ends."""
        if node.refs or node.children:
            return
        if node.parent is None:
            del self._roots[self._names.pop(node)], self._owners[node]
            return
        if not self._full:
            alive = max(_used_length(run) for run in node.pages)
            if alive < node.num_pages:
                self._cut(node, alive)
            return
        self._leaves.offer(self._owner(node), node)

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

    def page_refs(self, group: int, page: int) -> int:
        """Handles on a page of a group with a window, for checks."""
        return self._windows[group].refs(page)

    def check_integrity(self) -> None:
        """Raises AssertionError when trees, counters, eviction queue, events or the page pools disagree."""
        nodes = [node for _, node in self.nodes()]
        assert self.num_pages == sum(node.num_pages for node in nodes), "pages were miscounted"
        assert self._loose_pages == sum(node.num_pages for node in nodes if not node.refs)
        for group, pool in self._full.items():
            pages = [page for node in nodes for page in node.pages[group]]
            assert len(pages) == len(set(pages)), "a page is in the tree twice"
            assert set(pages) <= pool.used(), "a cached page is free"
        for group, window in self._windows.items():
            window.check_integrity(group, nodes)
        loose = self._leaves.nodes()
        owned: Counter[str] = Counter()
        for node in nodes:
            owned[self._owner(node)] += node.num_pages
        self._leaves.check_integrity(owned)
        for node in nodes:
            self._check_node(node, node in loose)
        self._journal.check_integrity(nodes)

    def _check_node(self, node: Node, queued: bool) -> None:
        node.check_children(self._page_bytes)
        assert all(len(node.key) == len(run) * self._page_bytes for run in node.pages)
        if node.parent is None:
            assert not node.key
            assert node.children or node.refs, "an empty root stays"
            return
        assert node.num_pages, "an empty node stays"
        if not node.refs and not node.children:
            dead = max(_used_length(run) for run in node.pages) < node.num_pages
            assert queued if self._full else not dead, "a leaf can never be evicted, or stays without a page"


def _used_length(run: Sequence[int]) -> int:
    """Length of a run of pages without the missing ones at its end."""
    return next((place + 1 for place in range(len(run) - 1, -1, -1) if run[place] != NO_PAGE), 0)


def _last_missing(run: Sequence[int], end: int) -> int:
    """Place of the last missing page before `end`; there is one."""
    return next(place for place in range(end - 1, -1, -1) if run[place] == NO_PAGE)
