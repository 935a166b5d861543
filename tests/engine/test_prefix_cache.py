from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import takewhile
from unittest import TestCase

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tandem.cluster import CacheEvent, EventKind
from tandem.engine.pages import PagePool
from tandem.engine.prefix_cache import PrefixCache
from tandem.engine.radix import Node, common_bytes, pack, unpack
from tandem.kv import BLOCK_TOKENS, BlockHash, block_hashes

Tokens = tuple[int, ...]
Key = tuple[bytes, Tokens]
ROOT = b"root"


# By example -----------------------------------------------------------------------------------------------------------


def store(cache: PrefixCache, pool: PagePool, page_size: int, tokens: list[int], root: bytes = ROOT) -> list[int]:
    """Puts whole pages of `tokens` into the cache, unreferenced, and returns the pages that hold them."""
    whole = len(tokens) // page_size
    packed = pack(tokens[: whole * page_size])
    match = cache.match(root, packed, len(tokens))
    handle = cache.acquire(match)
    start = len(match.pages)
    run = packed[start * page_size * 4 :]
    handle, pages = cache.extend(handle, run, pool.allocate(whole - start))
    cache.release(handle)
    return [*match.pages, *pages]


def make(page_size: int, num_pages: int = 32) -> tuple[PrefixCache, PagePool]:
    pool = PagePool(num_pages)
    return PrefixCache(pool, page_size), pool


def test_matches_down_to_one_token() -> None:
    cache, pool = make(page_size=4)
    pages = store(cache, pool, 4, [1, 2, 3, 4, 5, 6, 7, 8])
    match = cache.match(ROOT, pack([1, 2, 3, 4, 5, 6, 9]), 100)
    assert match.pages == (pages[0],)
    assert (match.tokens, match.partial_page, match.partial_tokens) == (6, pages[1], 2)


def test_a_limit_turns_a_whole_page_into_a_partial_one() -> None:
    cache, pool = make(page_size=4)
    pages = store(cache, pool, 4, list(range(8)))
    match = cache.match(ROOT, pack(list(range(8))), 7)
    assert (match.pages, match.tokens) == ((pages[0],), 7)
    assert (match.partial_page, match.partial_tokens) == (pages[1], 3)


def test_the_partial_page_is_the_longest_among_many_children() -> None:
    cache, pool = make(page_size=4)
    store(cache, pool, 4, [1, 9, 9, 9])
    best = store(cache, pool, 4, [1, 5, 5, 9])
    store(cache, pool, 4, [1, 5, 6, 0])
    store(cache, pool, 4, [2, 5, 5, 5])
    match = cache.match(ROOT, pack([1, 5, 5, 5]), 100)
    assert (match.partial_page, match.partial_tokens) == (best[0], 3)


def test_roots_share_nothing() -> None:
    cache, pool = make(page_size=2)
    store(cache, pool, 2, [1, 2, 3, 4], root=b"one")
    assert cache.match(b"one", pack([1, 2, 3, 4]), 100).tokens == 4
    assert cache.match(b"two", pack([1, 2, 3, 4]), 100).tokens == 0


def test_equal_pages_of_two_sequences_become_one() -> None:
    cache, pool = make(page_size=2)
    first = cache.acquire(cache.match(ROOT, b"", 0))
    second = cache.acquire(cache.match(ROOT, b"", 0))
    run = pack([1, 2, 3, 4])
    first, pages = cache.extend(first, run, pool.allocate(2))
    second, same = cache.extend(second, run, pool.allocate(2))
    assert pages == same
    assert pool.free_count == 30
    cache.release(first)
    assert cache.evictable_pages == 0
    cache.release(second)
    assert cache.evictable_pages == 2


def test_eviction_takes_the_least_recently_used_from_its_end() -> None:
    cache, pool = make(page_size=1)
    old = store(cache, pool, 1, [1, 2, 3])
    store(cache, pool, 1, [1, 5, 6])
    assert cache.evict(1) == 1
    assert old[2] not in pool.used()
    assert cache.match(ROOT, pack([1, 2, 3]), 100).tokens == 2
    assert cache.match(ROOT, pack([1, 5, 6]), 100).tokens == 3


def test_a_held_path_survives_any_pressure() -> None:
    cache, pool = make(page_size=1)
    store(cache, pool, 1, [1, 2, 3, 4])
    handle = cache.acquire(cache.match(ROOT, pack([1, 2]), 2))
    assert cache.evict(100) == 2
    assert cache.match(ROOT, pack([1, 2, 3]), 100).tokens == 2
    cache.release(handle)
    assert cache.evict(100) == 2
    assert pool.free_count == 32
    cache.check_integrity()


def test_packing_is_invertible_and_refuses_what_is_no_token() -> None:
    assert unpack(pack([0, 1, (1 << 32) - 1])) == [0, 1, (1 << 32) - 1]
    for wrong in (-1, 1 << 32):
        with pytest.raises(OverflowError):
            pack([wrong])


@pytest.mark.parametrize("length", [0, 1, 2, 7, 64, 65])
def test_common_bytes(length: int) -> None:
    base = bytes(range(1, 101))
    for tail in (b"", b"\0", b"\0" + base):
        assert common_bytes(base, base[:length] + tail) == length


# Against a naive model ------------------------------------------------------------------------------------------------


@dataclass
class Model:
    """A cache as a dictionary from token prefixes, whole pages long, to pages; slow and obvious."""

    page_size: int
    pages: dict[Key, int] = field(default_factory=dict)
    used_at: dict[Key, int] = field(default_factory=dict)
    refs: defaultdict[Key, int] = field(default_factory=lambda: defaultdict(int))
    tick: int = 0

    def prefixes(self, root: bytes, tokens: Tokens) -> list[Key]:
        return [(root, tokens[:end]) for end in range(self.page_size, len(tokens) + 1, self.page_size)]

    def match(self, root: bytes, tokens: Tokens) -> tuple[list[int], int]:
        """Pages of the longest prefix, and how many tokens of a further page match."""
        path = [key for key in self.prefixes(root, tokens) if key in self.pages]
        start = len(path) * self.page_size
        partial = 0
        for other, prefix in self.pages:
            if other == root and len(prefix) == start + self.page_size and prefix[:start] == tokens[:start]:
                pairs = zip(prefix[start:], tokens[start:], strict=False)
                partial = max(partial, sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)))
        return [self.pages[key] for key in path], partial

    def touch(self, keys: list[Key], refs: int) -> None:
        self.tick += 1
        for key in keys:
            self.used_at[key] = self.tick
            self.refs[key] += refs

    def evict(self, count: int) -> list[int]:
        gone: list[int] = []
        while len(gone) < count:
            parents = {(root, prefix[: -self.page_size]) for root, prefix in self.pages}
            loose = [key for key in self.pages if not self.refs[key] and key not in parents]
            if not loose:
                break
            oldest = min(loose, key=lambda key: self.used_at[key])
            gone.append(self.pages.pop(oldest))
        return gone

    def blocks(self) -> set[BlockHash]:
        whole = [(root, prefix) for root, prefix in self.pages if len(prefix) % BLOCK_TOKENS == 0]
        return {block_hashes(root, prefix)[-1] for root, prefix in whole}


class CacheMachine(RuleBasedStateMachine):
    """PrefixCache against Model, and its events against the blocks that are there."""

    page_size = 1
    num_pages = 40

    @initialize()
    def begin(self) -> None:
        self.pool = PagePool(self.num_pages)
        self.cache = PrefixCache(self.pool, self.page_size)
        self.model = Model(self.page_size)
        self.handles: list[tuple[bytes, Tokens, Node]] = []
        self.told: set[BlockHash] = set()

    def draw_run(self, data: st.DataObject, most: int = 5) -> Tokens:
        """Pages of few kinds, some alike in their first half, now and then enough for a block."""
        size, per_block = self.page_size, max(BLOCK_TOKENS // self.page_size, 1)
        kinds = [(7,) * (size // 2) + (kind,) * (size - size // 2) for kind in range(3)]
        times = st.sampled_from([1, 1, 2, 3, per_block - 1 or 1, per_block])
        parts = data.draw(st.lists(st.tuples(st.sampled_from(kinds), times), max_size=most))
        return tuple(token for kind, count in parts for _ in range(count) for token in kind)

    def draw_root(self, data: st.DataObject) -> bytes:
        return data.draw(st.sampled_from([b"a", b"a", b"b"]))

    @rule(data=st.data())
    def match(self, data: st.DataObject) -> None:
        root, run = self.draw_root(data), self.draw_run(data) + data.draw(st.sampled_from([(), (7,), (0, 1)]))
        limit = data.draw(st.integers(0, len(run)))
        found = self.cache.match(root, pack(run), limit)
        pages, partial = self.model.match(root, run[:limit])
        assert list(found.pages) == pages
        assert found.partial_tokens == partial
        assert found.tokens == len(pages) * self.page_size + partial
        if partial:
            start = len(pages) * self.page_size
            assert any(
                page == found.partial_page and prefix[: start + partial] == run[: start + partial]
                for (other, prefix), page in self.model.pages.items()
                if other == root and len(prefix) == start + self.page_size
            )

    @rule(data=st.data())
    def acquire(self, data: st.DataObject) -> None:
        root, run = self.draw_root(data), self.draw_run(data)
        match = self.cache.match(root, pack(run), len(run))
        held = run[: len(match.pages) * self.page_size]
        self.handles.append((root, held, self.cache.acquire(match)))
        self.model.touch(self.model.prefixes(root, held), +1)

    @precondition(lambda self: self.handles)
    @rule(data=st.data())
    def extend(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.handles) - 1))
        root, held, node = self.handles[index]
        run = self.draw_run(data, most=2)
        need = len(run) // self.page_size
        self.check_evict(need - self.pool.free_count)
        if not self.pool.can_allocate(need):
            return
        mine = self.pool.allocate(need)
        node, pages = self.cache.extend(node, pack(run), mine)
        self.handles[index] = (root, held + run, node)
        added = self.model.prefixes(root, held + run)[len(held) // self.page_size :]
        for key, page in zip(added, mine, strict=True):
            self.model.pages.setdefault(key, page)
        self.model.touch(added, +1)
        assert pages == [self.model.pages[key] for key in added]

    @precondition(lambda self: self.handles)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        root, held, node = self.handles.pop(data.draw(st.integers(0, len(self.handles) - 1)))
        self.cache.release(node)
        self.model.touch(self.model.prefixes(root, held), -1)

    @rule(count=st.integers(0, 12))
    def evict(self, count: int) -> None:
        self.check_evict(count)

    def check_evict(self, count: int) -> None:
        before = self.pool.used()
        freed = self.cache.evict(count)
        gone = self.model.evict(count)
        assert freed == len(gone)
        assert before - self.pool.used() == set(gone)

    @rule()
    def drain(self) -> None:
        replay(self.told, self.cache.drain_events())
        assert self.told == self.model.blocks()
        fresh: set[BlockHash] = set()
        replay(fresh, self.cache.snapshot_events())
        assert fresh == self.told

    @invariant()
    def agrees(self) -> None:
        self.cache.check_integrity()
        assert self.cache.num_pages == len(self.model.pages)
        assert self.pool.used() == set(self.model.pages.values())
        assert self.cache.evictable_pages == sum(not self.model.refs[key] for key in self.model.pages)

    def teardown(self) -> None:
        for _, _, node in self.handles:
            self.cache.release(node)
        self.cache.evict(self.num_pages)
        assert self.pool.free_count == self.num_pages
        replay(self.told, self.cache.drain_events())
        assert not self.told
        assert not list(self.cache.nodes())


def replay(blocks: set[BlockHash], events: list[CacheEvent]) -> None:
    """What a router makes of events; each block is told once, after its parent."""
    for event in events:
        assert len(set(event.hashes)) == len(event.hashes) > 0
        if event.kind is EventKind.EVICTED:
            assert blocks >= set(event.hashes)
            blocks -= set(event.hashes)
        else:
            assert event.kind is EventKind.STORED
            assert not event.parent or event.parent in blocks
            assert not blocks & set(event.hashes)
            blocks |= set(event.hashes)


def machine(size: int, pages: int) -> type[TestCase]:
    class Sized(CacheMachine):
        page_size = size
        num_pages = pages

    case: type[TestCase] = Sized.TestCase
    case.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)  # type: ignore[attr-defined]
    return case


TestPagesOfOne = machine(1, 150)
TestPagesOfFour = machine(4, 40)
TestPagesOfSixteen = machine(16, 14)
TestPagesOfABlock = machine(64, 9)
