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
from tandem.engine.prefix_cache import Match, PrefixCache
from tandem.engine.radix import NO_PAGE, Node, common_bytes, pack, unpack
from tandem.kv import BLOCK_TOKENS, BlockHash, LayerGroup, block_hashes

Tokens = tuple[int, ...]
Key = tuple[bytes, Tokens]
ROOT = b"root"


# By example -----------------------------------------------------------------------------------------------------------


FULL = LayerGroup((0,))


def store(cache: PrefixCache, pool: PagePool, page_size: int, tokens: list[int], root: bytes = ROOT) -> list[int]:
    """Puts whole pages of `tokens` into the cache, unreferenced, and returns the pages that hold them."""
    whole = len(tokens) // page_size
    packed = pack(tokens[: whole * page_size])
    match = cache.match(root, packed, len(tokens))
    handle = cache.acquire(match)
    run = packed[match.whole * page_size * 4 :]
    handle, pages = cache.extend(handle, run, [pool.allocate(whole - match.whole)])
    held = [*match.pages[0], *pages[0]]
    cache.release(handle, [held])
    return held


def make(page_size: int, num_pages: int = 32) -> tuple[PrefixCache, PagePool]:
    pool = PagePool(num_pages)
    return PrefixCache([pool], [FULL], page_size), pool


def test_matches_down_to_one_token() -> None:
    cache, pool = make(page_size=4)
    pages = store(cache, pool, 4, [1, 2, 3, 4, 5, 6, 7, 8])
    match = cache.match(ROOT, pack([1, 2, 3, 4, 5, 6, 9]), 100)
    assert match.pages == [[pages[0]]]
    assert (match.tokens, match.partial_pages, match.partial_tokens) == (6, [pages[1]], 2)


def test_a_limit_turns_a_whole_page_into_a_partial_one() -> None:
    cache, pool = make(page_size=4)
    pages = store(cache, pool, 4, list(range(8)))
    match = cache.match(ROOT, pack(list(range(8))), 7)
    assert (match.pages, match.tokens) == ([[pages[0]]], 7)
    assert (match.partial_pages, match.partial_tokens) == ([pages[1]], 3)


def test_the_partial_page_is_the_longest_among_many_children() -> None:
    cache, pool = make(page_size=4)
    store(cache, pool, 4, [1, 9, 9, 9])
    best = store(cache, pool, 4, [1, 5, 5, 9])
    store(cache, pool, 4, [1, 5, 6, 0])
    store(cache, pool, 4, [2, 5, 5, 5])
    match = cache.match(ROOT, pack([1, 5, 5, 5]), 100)
    assert (match.partial_pages, match.partial_tokens) == ([best[0]], 3)


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
    first, pages = cache.extend(first, run, [pool.allocate(2)])
    second, same = cache.extend(second, run, [pool.allocate(2)])
    assert pages == same
    assert pool.free_count == 30
    cache.release(first, pages)
    assert cache.evictable(0) == 0
    cache.release(second, pages)
    assert cache.evictable(0) == 2


def test_eviction_takes_the_least_recently_used_from_its_end() -> None:
    cache, pool = make(page_size=1)
    old = store(cache, pool, 1, [1, 2, 3])
    store(cache, pool, 1, [1, 5, 6])
    assert cache.evict(0, 1) == 1
    assert old[2] not in pool.used()
    assert cache.match(ROOT, pack([1, 2, 3]), 100).tokens == 2
    assert cache.match(ROOT, pack([1, 5, 6]), 100).tokens == 3


def test_a_held_path_survives_any_pressure() -> None:
    cache, pool = make(page_size=1)
    store(cache, pool, 1, [1, 2, 3, 4])
    match = cache.match(ROOT, pack([1, 2]), 2)
    handle = cache.acquire(match)
    assert cache.evict(0, 100) == 2
    assert cache.match(ROOT, pack([1, 2, 3]), 100).tokens == 2
    cache.release(handle, match.pages)
    assert cache.evict(0, 100) == 2
    assert pool.free_count == 32
    cache.check_integrity()


def windowed(*windows: int | None, page_size: int = 2) -> tuple[PrefixCache, list[PagePool]]:
    groups = [LayerGroup((layer,), window) for layer, window in enumerate(windows)]
    pools = [PagePool(32) for _ in groups]
    return PrefixCache(pools, groups, page_size), pools


def put(cache: PrefixCache, pools: list[PagePool], tokens: list[int], page_size: int = 2) -> list[list[int]]:
    """Caches all pages of `tokens` in every group."""
    count = len(tokens) // page_size
    handle, pages = cache.extend(
        cache.acquire(cache.match(ROOT, b"", 0)), pack(tokens[: count * page_size]), [p.allocate(count) for p in pools]
    )
    cache.release(handle, pages)
    return pages


def cached(cache: PrefixCache, tokens: list[int], total: int | None = None) -> int:
    return cache.match(ROOT, pack(tokens), len(tokens), total).tokens


def test_a_prefix_needs_the_window_at_its_end_alone() -> None:
    """A window of 4 and pages of 2: position 12 sees tokens 9, 10, 11 before it, so pages 4 and 5."""
    cache, pools = windowed(None, 4)
    tokens = list(range(12))
    pages = put(cache, pools, tokens)
    match = cache.match(ROOT, pack([*tokens, 99]), 100)
    assert (match.tokens, match.pages) == (12, [pages[0], [-1, -1, -1, -1, *pages[1][4:]]])
    cache.release(cache.acquire(match), match.pages)
    assert cache.evict(1, 3) == 3, (
        "pages 3, 2 and 1: of pages given back at once the last goes first, but for the matched"
    )
    assert [cached(cache, tokens[:length]) for length in range(13)] == [0, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 11, 12]
    assert cache.match(ROOT, pack(tokens[:11]), 11).partial_tokens == 1
    assert pools[0].free_count == 26
    cache.check_integrity()


def test_what_is_handed_over_must_be_there_too() -> None:
    """A hand-over of 128 tokens moves whole blocks: of a window of 4, tokens from 64 on."""
    cache, pools = windowed(None, 4, page_size=64)
    tokens = list(range(128))
    put(cache, pools, tokens, 64)
    assert cached(cache, tokens, total=128) == 128
    match = cache.match(ROOT, pack(tokens), 128, 200)
    assert match.pages[1][0] == -1
    assert match.tokens == 128
    tokens = list(range(1000, 1192))
    handle, pages = cache.extend(
        cache.acquire(cache.match(ROOT, b"", 0)), pack(tokens), [pools[0].allocate(3), [-1, -1, *pools[1].allocate(1)]]
    )
    cache.release(handle, pages)
    assert cached(cache, tokens) == 192
    assert cached(cache, tokens, total=192) == 192
    assert cached(cache, tokens, total=191) == 0, "tokens from 64 on would be moved, and 64..128 are missing"


def test_a_missing_page_is_filled_by_who_computes_it_again() -> None:
    cache, pools = windowed(None, 4)
    tokens = list(range(8))
    put(cache, pools, tokens)
    cache.evict(1, 4)
    assert cached(cache, tokens) == 0
    assert pools[1].free_count == 32
    pages = put(cache, pools, tokens)
    assert cached(cache, tokens) == 8
    assert pools[0].free_count == pools[1].free_count == 28
    assert pools[1].used() == set(pages[1])
    cache.check_integrity()


def test_a_tree_of_windows_alone_loses_its_dead_ends() -> None:
    cache, pools = windowed(4, 6)
    base = list(range(8))
    put(cache, pools, [*base, 10, 11, 12, 13])
    put(cache, pools, [*base, 20, 21])
    assert cache.evict(0, 32) == 7
    assert cached(cache, [*base, 20, 21]) == 0
    assert cache.num_pages == 7, "the other group may still be of use, once the first is computed again"
    assert cache.evict(1, 1) == 1
    assert cache.num_pages == 6
    assert cache.evict(1, 32) == 6
    assert not list(cache.nodes())
    assert pools[0].free_count == pools[1].free_count == 32


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
    """A cache as dictionaries from token prefixes, whole pages long, to pages; slow and obvious."""

    page_size: int
    groups: list[LayerGroup]
    pages: list[dict[Key, int]] = field(default_factory=list)
    """Per group; a group with a window may lack some of `known`."""
    known: dict[Key, None] = field(default_factory=dict)
    used_at: dict[Key, int] = field(default_factory=dict)
    refs: defaultdict[Key, int] = field(default_factory=lambda: defaultdict(int))
    page_refs: defaultdict[tuple[int, int], int] = field(default_factory=lambda: defaultdict(int))
    """By group and page; groups with a window only."""
    given_back: list[list[int]] = field(default_factory=list)
    """Per group with a window, its pages without handle in the order in which they were given back."""
    tick: int = 0

    def __post_init__(self) -> None:
        self.pages = [{} for _ in self.groups]
        self.given_back = [[] for _ in self.groups]
        self.windowed = [number for number, group in enumerate(self.groups) if group.window]
        self.full = [number for number, group in enumerate(self.groups) if not group.window]

    def prefixes(self, root: bytes, tokens: Tokens) -> list[Key]:
        return [(root, tokens[:end]) for end in range(self.page_size, len(tokens) + 1, self.page_size)]

    def match(self, root: bytes, tokens: Tokens) -> tuple[list[Key], list[Key], int]:
        """Whole pages that are known, those with most tokens in common after them, and how many these are."""
        path = list(takewhile(lambda key: key in self.known, self.prefixes(root, tokens)))
        start, partial = len(path) * self.page_size, defaultdict[int, list[Key]](list)
        for other, prefix in self.known:
            if other == root and len(prefix) == start + self.page_size and prefix[:start] == tokens[:start]:
                pairs = zip(prefix[start:], tokens[start:], strict=False)
                partial[sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))].append((other, prefix))
        most = max(partial, default=0)
        return path, partial[most] if most else [], most

    def usable(self, keys: list[Key], tokens: int, total: int | None) -> bool:
        """Whether windows have what a prefix needs of these pages, perhaps as the first part of a hand-over."""
        for number in self.windowed:
            first = self.groups[number].seen_from(tokens)
            if total is not None:
                first = min(first, self.groups[number].moved_from(total))
            if any(key not in self.pages[number] for key in keys[first // self.page_size :]):
                return False
        return True

    def longest(self, path: list[Key], total: int | None) -> int:
        """Pages of the longest usable prefix."""
        ends = range(len(path), 0, -1)
        return next((end for end in ends if self.usable(path[:end], end * self.page_size, total)), 0)

    def touch(self, keys: list[Key], refs: int) -> None:
        self.tick += 1
        for key in keys:
            self.used_at[key] = self.tick
            self.refs[key] += refs

    def hold(self, number: int, pages: list[int]) -> None:
        for page in pages:
            if page != NO_PAGE:
                self.page_refs[number, page] += 1
                if page in self.given_back[number]:
                    self.given_back[number].remove(page)

    def let_go(self, number: int, pages: list[int]) -> None:
        for page in reversed(pages):
            if page != NO_PAGE:
                self.page_refs[number, page] -= 1
                if not self.page_refs[number, page]:
                    self.given_back[number].append(page)

    def leaves(self) -> list[Key]:
        parents = {(root, prefix[: -self.page_size]) for root, prefix in self.known}
        return [key for key in self.known if not self.refs[key] and key not in parents]

    def forget(self, key: Key) -> list[tuple[int, int]]:
        """Drops a leaf with its pages, which it returns with their groups."""
        del self.known[key]
        gone = [(number, pages.pop(key)) for number, pages in enumerate(self.pages) if key in pages]
        for number, page in gone:
            if number in self.windowed:
                self.given_back[number].remove(page)
        return gone

    def evict(self, number: int, count: int) -> list[tuple[int, int]]:
        gone: list[tuple[int, int]] = []
        for _ in range(count):
            if number in self.windowed:
                if not self.given_back[number]:
                    break
                page = self.given_back[number].pop(0)
                key = next(key for key, mine in self.pages[number].items() if mine == page)
                gone.append((number, self.pages[number].pop(key)))
            elif loose := self.leaves():
                gone += self.forget(min(loose, key=lambda key: self.used_at[key]))
        return gone

    def prune(self) -> None:
        """Without full attention, an end that has no page in any group is of no use."""
        while not self.full and (dead := [k for k in self.leaves() if not any(k in pages for pages in self.pages)]):
            for key in dead:
                self.forget(key)

    def blocks(self) -> set[BlockHash]:
        whole = [(root, prefix) for root, prefix in self.known if len(prefix) % BLOCK_TOKENS == 0]
        return {block_hashes(root, prefix)[-1] for root, prefix in whole}


@dataclass
class Handle:
    """A path that is held: its tokens, and of each group with a window the pages."""

    root: bytes
    tokens: Tokens
    node: Node
    pages: list[list[int]]


class CacheMachine(RuleBasedStateMachine):
    """PrefixCache against Model, and its events against the blocks that are there."""

    page_size = 1
    num_pages = 40
    windows: tuple[int | None, ...] = (None,)

    @initialize()
    def begin(self) -> None:
        self.groups = [LayerGroup((layer,), window) for layer, window in enumerate(self.windows)]
        self.pools = [PagePool(self.num_pages) for _ in self.groups]
        self.cache = PrefixCache(self.pools, self.groups, self.page_size)
        self.model = Model(self.page_size, self.groups)
        self.handles: list[Handle] = []
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
        total = data.draw(st.sampled_from([None, limit, limit + 80]))
        self.check_match(self.cache.match(root, pack(run), limit, total), root, run[:limit], total)

    def check_match(self, found: Match, root: bytes, run: Tokens, total: int | None) -> None:
        path, near, rest = self.model.match(root, run)
        length = len(path) * self.page_size + rest
        usable = [key for key in near if self.model.usable([*path, key], length, total)]
        if found.partial_tokens:
            whole = len(path)
            assert found.partial_tokens == rest
            candidates = [[mine.get(key, NO_PAGE) for mine in self.model.pages] for key in usable]
            assert list(found.partial_pages) in candidates
        else:
            # Of several pages with equally many tokens in common only one is tried.
            assert not near or len(usable) < len(near)
            whole = self.model.longest(path, total)
        assert found.tokens == whole * self.page_size + found.partial_tokens
        for number, pages in enumerate(found.pages):
            mine = [self.model.pages[number].get(key, NO_PAGE) for key in path[:whole]]
            if number in self.model.windowed:
                first = self.groups[number].seen_from(found.tokens)
                first = min(first, first if total is None else self.groups[number].moved_from(total))
                first = min(first // self.page_size, whole)
                mine[:first] = [NO_PAGE] * first
                assert NO_PAGE not in mine[first:]
            assert list(pages) == mine

    @rule(data=st.data())
    def acquire(self, data: st.DataObject) -> None:
        root, run = self.draw_root(data), self.draw_run(data)
        match = self.cache.match(root, pack(run), len(run))
        held = run[: match.whole * self.page_size]
        pages = [list(mine) for mine in match.pages]
        self.handles.append(Handle(root, held, self.cache.acquire(match), pages))
        self.model.touch(self.model.prefixes(root, held), +1)
        for number in self.model.windowed:
            self.model.hold(number, pages[number])

    @precondition(lambda self: self.handles)
    @rule(data=st.data())
    def extend(self, data: st.DataObject) -> None:
        handle = data.draw(st.sampled_from(self.handles))
        run = self.draw_run(data, most=2)
        need = len(run) // self.page_size
        for number, pool in enumerate(self.pools):
            self.check_evict(number, need - pool.free_count)
        if not all(pool.can_allocate(need) for pool in self.pools):
            return
        mine = [pool.allocate(need) for pool in self.pools]
        for number in self.model.windowed:
            passed = data.draw(st.integers(0, need))
            self.pools[number].free(mine[number][:passed])
            mine[number][:passed] = [NO_PAGE] * passed
        handle.node, pages = self.cache.extend(handle.node, pack(run), [list(given) for given in mine])
        handle.tokens += run
        added = self.model.prefixes(handle.root, handle.tokens)[len(handle.tokens) // self.page_size - need :]
        for number, given in enumerate(mine):
            kept = self.model.pages[number]
            for key, page in zip(added, given, strict=True):
                if page != NO_PAGE:
                    kept.setdefault(key, page)
            expected = [kept[key] if page != NO_PAGE else page for key, page in zip(added, given, strict=True)]
            assert pages[number] == expected
            handle.pages[number] += pages[number]
            if number in self.model.windowed:
                self.model.hold(number, pages[number])
        self.model.known.update(dict.fromkeys(added))
        self.model.touch(added, +1)

    @precondition(lambda self: self.handles and self.model.windowed)
    @rule(data=st.data())
    def slide(self, data: st.DataObject) -> None:
        """A sequence has moved on: it gives up the first pages of a window."""
        handle, number = data.draw(st.sampled_from(self.handles)), data.draw(st.sampled_from(self.model.windowed))
        count = data.draw(st.integers(0, len(handle.pages[number])))
        gone = handle.pages[number][:count]
        handle.pages[number][:count] = [NO_PAGE] * count
        self.cache.let_go(number, gone)
        self.model.let_go(number, gone)

    @precondition(lambda self: self.handles)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        handle = self.handles.pop(data.draw(st.integers(0, len(self.handles) - 1)))
        self.cache.release(handle.node, handle.pages)
        self.model.touch(self.model.prefixes(handle.root, handle.tokens), -1)
        for number in self.model.windowed:
            self.model.let_go(number, handle.pages[number])
        self.model.prune()

    @rule(data=st.data(), count=st.integers(0, 12))
    def evict(self, data: st.DataObject, count: int) -> None:
        self.check_evict(data.draw(st.sampled_from(range(len(self.groups)))), count)

    def check_evict(self, number: int, count: int) -> None:
        before = [pool.used() for pool in self.pools]
        freed = self.cache.evict(number, count)
        gone = self.model.evict(number, count)
        self.model.prune()
        assert freed == sum(group == number for group, _ in gone)
        for group, pool in enumerate(self.pools):
            assert before[group] - pool.used() == {page for other, page in gone if other == group}

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
        assert self.cache.num_pages == len(self.model.known)
        for number, pool in enumerate(self.pools):
            pages = self.model.pages[number]
            assert pool.used() == set(pages.values())
            assert self.cache.cached(number) == len(pages)
            if number in self.model.full:
                assert self.cache.evictable(number) == sum(not self.model.refs[key] for key in pages)
            else:
                assert self.cache.evictable(number) == len(self.model.given_back[number])
                assert all(
                    self.cache.page_refs(number, page) == self.model.page_refs[number, page] for page in pages.values()
                )

    def teardown(self) -> None:
        for handle in self.handles:
            self.cache.release(handle.node, handle.pages)
        for number, pool in enumerate(self.pools):
            self.cache.evict(number, self.num_pages)
            assert pool.free_count == self.num_pages
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


def machine(size: int, pages: int, windows: tuple[int | None, ...] = (None,)) -> type[TestCase]:
    class Sized(CacheMachine):
        page_size = size
        num_pages = pages

    Sized.windows = windows
    case: type[TestCase] = Sized.TestCase
    case.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)  # type: ignore[attr-defined]
    return case


TestPagesOfOne = machine(1, 150)
TestPagesOfFour = machine(4, 40)
TestPagesOfSixteen = machine(16, 14)
TestPagesOfABlock = machine(64, 9)
TestOneWindow = machine(2, 30, (5,))
TestAWindowBesideFullAttention = machine(4, 30, (None, 6))
TestTwoWindows = machine(1, 40, (3, 70))
TestTwoWindowsBesideFullAttention = machine(16, 20, (None, 33, 2))


def keep(cache: PrefixCache, pool: PagePool, tenant: str, salt: bytes, tokens: list[int]) -> None:
    """One sequence of a tenant's that came and went; its pages are cached."""
    match = cache.match(salt, pack(tokens), len(tokens))
    handle, rest = cache.acquire(match, tenant), tokens[match.whole * 2 :]
    need = len(rest) // 2
    cache.evict(0, max(need - pool.free_count, 0))
    handle, owned = cache.extend(handle, pack(rest[: need * 2]), [pool.allocate(need)])
    cache.release(handle, [[*match.pages[0], *owned[0]]])
    cache.check_integrity()


@pytest.mark.parametrize(("share", "left"), [(1.0, 0), (0.75, 8), (0.6, 16)])
def test_a_tenant_that_floods_the_cache_evicts_its_own_first(share: float, left: int) -> None:
    pool = PagePool(40)
    cache = PrefixCache([pool], [FULL], 2, share)
    victims = [[100 + each * 8 + at for at in range(8)] for each in range(5)]
    for each, tokens in enumerate(victims):
        keep(cache, pool, "victim", b"v%d" % (each % 2), tokens)
    for each in range(60):  # under as many salts as it likes
        keep(cache, pool, "flood", b"f%d" % (each % 7), [1000 + each * 8 + at for at in range(8)])
    kept = sum(cache.match(b"v%d" % (each % 2), pack(tokens), 8).whole for each, tokens in enumerate(victims))
    assert kept == left  # less than a leaf below its share


def test_a_tenant_alone_has_the_whole_cache() -> None:
    pool = PagePool(16)
    cache = PrefixCache([pool], [FULL], 2, 0.25)
    for each in range(8):
        keep(cache, pool, "only", ROOT, [each * 10 + at for at in range(4)])
    assert cache.num_pages == 16
    keep(cache, pool, "only", ROOT, [500, 501])
    assert cache.match(ROOT, pack([0, 1, 2, 3]), 4).whole == 1  # the end of the least recently used went
