"""KV memory as sequences see it: pages of their own, pages shared with the prefix cache, and the way between them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

from tandem.engine.pages import PagePool
from tandem.engine.prefix_cache import Match, PrefixCache
from tandem.engine.protocols import PoolLike
from tandem.engine.radix import NO_PAGE, Node, pack
from tandem.engine.sequence import Seq
from tandem.engine.verification import PageChecks
from tandem.engine.windows import kept_from, most_pages, running_pages

log = logging.getLogger(__name__)


class KvMemory:
    """Page pools and prefix cache of one worker. Changes what a sequence says of its memory, never its state.

    A sequence is closed (no pages, no handle) or open (a handle in `node`; its first `shared_pages` pages are the
    cache's). Each layer group has a pool of its own. Of groups with a window a sequence has only the pages that it
    still needs, and those for its next step; it changes the former for the latter when it grows.
    """

    def __init__(
        self, pool: PoolLike, caching: bool, chunk: int, verify_share: float = 0.0, tenant_share: float = 1.0
    ) -> None:
        """caching: whether anything outlives its sequence; without it nothing is ever matched.

        chunk: tokens that a sequence computes in one step at most. verify_share: see `PageChecks`.
        tenant_share: see `PrefixCache`.
        """
        self.page_size = pool.page_size
        self.matched_tokens = 0
        """Prompt tokens found in the cache when their sequences were first opened."""
        self.prompt_tokens = 0
        """Prompt tokens of those sequences."""
        self.groups = pool.layout.groups
        self.pools = [PagePool(count) for count in pool.group_pages]
        self.cache = PrefixCache(self.pools, self.groups, pool.page_size, tenant_share)
        self.checks = PageChecks(pool, verify_share)
        self.slides = 0
        """How often a sequence gave up more than it took, so that others may find pages."""
        self.windowed = tuple(number for number, group in enumerate(self.groups) if group.window is not None)
        """Groups with a window."""
        self.on_close: Callable[[Seq], None] | None = None
        """Told of every open sequence before it is closed."""
        self._pool = pool
        self._caching = caching
        self._most_running = [running_pages(group, chunk, pool.page_size) for group in self.groups]
        self._most = [most_pages(group, chunk, pool.page_size) for group in self.groups]
        wide = [(group.window is None, group.window or 0, -number) for number, group in enumerate(self.groups)]
        self._main = -max(wide)[2]

    # Sizes.

    def available(self, group: int) -> int:
        """Pages of a group that are free or can be evicted."""
        return self.pools[group].free_count + self.cache.evictable(group)

    @property
    def total_pages(self) -> int:
        """Pages of the group that remembers most: one of full attention, else the one with the widest window."""
        return self.pools[self._main].num_pages

    @property
    def cached_pages(self) -> int:
        """Pages of that group in the cache."""
        return self.cache.cached(self._main)

    @property
    def free_pages(self) -> int:
        """Pages available, in the group that has the least share of its own left, as a part of `total_pages`."""
        total = self.total_pages
        return min(self.available(number) * total // pool.num_pages for number, pool in enumerate(self.pools))

    @property
    def capacity_tokens(self) -> int:
        """Tokens that one sequence can have. A group whose window fits at its largest sets no limit."""
        limits = [
            pool.num_pages * self.page_size
            for pool, most in zip(self.pools, self._most, strict=True)
            if most is None or pool.num_pages < most
        ]
        return min(limits, default=sys.maxsize)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.page_size)

    def covered(self, seq: Seq) -> int:
        """Tokens that the pages of an open sequence reach to in every group."""
        return min(map(len, seq.pages)) * self.page_size

    def _stops(self, computed: int, tokens: int, at_once: bool) -> list[int]:
        """Per group, the pages that a sequence must have to go on from `computed` to `tokens`.

        at_once: it gets them all, and not in steps of a chunk.
        """
        whole = self.pages_for(tokens)
        stops = [whole] * len(self.groups)
        for group in self.windowed:
            most = self._most_running[group]
            if most is not None and not at_once:
                stops[group] = min(whole, kept_from(self.groups[group], computed, self.page_size) + most)
        return stops

    # Opening.

    def match_len(self, root: bytes, tokens: Sequence[int] | bytes, limit: int) -> int:
        """Cached tokens of a run (ids, or packed), at most `limit`. Changes nothing."""
        packed = tokens if isinstance(tokens, bytes) else pack(tokens)
        return self.cache.match(root, packed, limit).tokens

    def match(self, seq: Seq, packed: bytes, limit: int | None = None) -> Match:
        """What is cached of a sequence's tokens that it can use: a prefill-only one, which is moved, needs more."""
        total = len(seq.tokens) if seq.prefill_only else None
        return self.cache.match(seq.root, packed, match_limit(seq) if limit is None else limit, total)

    def open(self, seq: Seq, packed: bytes, cover: int, spare: Sequence[int] = (), landing: bool = False) -> bool:
        """Gives a closed sequence its cached prefix and pages for `cover` tokens (0: for the prefix alone).

        Returns False, with the sequence still closed, when that would leave fewer than `spare` pages of a group
        available. A partly matching page is copied where the copy does not cost the sequence its place. Sets
        `computed`. landing: KV of all tokens but the last will land, so pages are for that which moves alone.
        """
        match = self._sound(seq, packed)
        if self._try(seq, match, cover, spare, landing):
            return True
        # Without the copy windows end, and so begin, earlier: what they need is looked up anew.
        return match.partial is not None and self._try(
            seq, self.match(seq, packed, match.whole * self.page_size), cover, spare, landing
        )

    def _sound(self, seq: Seq, packed: bytes) -> Match:
        """The match, none of whose pages that are looked at has changed: one that has goes, and all behind it.

        Raises CorruptKv when sequences are computing with it.
        """
        match = self.match(seq, packed)
        while (place := self._changed(match)) is not None:
            log.error("KV of cached tokens from %d on has changed in memory; it is dropped", place * self.page_size)
            self.cache.drop(match, place)
            match = self.match(seq, packed)
        return match

    def _changed(self, match: Match) -> int | None:
        if (found := self.checks.spoiled(match.pages)) is not None:
            return found[1]
        partly = [[page] for page in match.partial_pages]
        return None if self.checks.spoiled(partly) is None else match.whole

    def reopen(self, seq: Seq, packed: bytes, cover: int) -> bool:
        """Opens an open sequence anew with what is cached now, its own computed pages among it. False: it is closed."""
        if seq.retractions == 0:
            self.matched_tokens -= seq.cached_tokens
            self.prompt_tokens -= len(seq.tokens)
        self.close(seq)
        return self.open(seq, packed, cover)

    def _try(self, seq: Seq, match: Match, cover: int, spare: Sequence[int], landing: bool) -> bool:
        """Opens a sequence with a fresh match."""
        firsts = [0] * len(self.groups)
        if landing:
            firsts = [group.moved_from(len(seq.tokens) - 1) // self.page_size for group in self.groups]
            match = replace(match, pages=[_without(run, first) for run, first in zip(match.pages, firsts, strict=True)])
        node = self.cache.acquire(match, seq.tenant)
        source, held = match.partial, [[page] for page in match.partial_pages]
        if source is not None:
            self.cache.hold(source, held)
        stops = self._stops(match.tokens, cover or match.tokens, landing)
        opened = self._take(seq, match, node, firsts, stops, spare)
        if not opened:
            self.cache.release(node, match.pages)
        if source is not None:
            if opened:
                self._copy(seq, match)
            self.cache.release(source, held)
        return opened

    def _take(
        self, seq: Seq, match: Match, node: Node, firsts: Sequence[int], stops: Sequence[int], spare: Sequence[int]
    ) -> bool:
        """Gives a sequence a held match and, per group, its own pages behind it from `firsts` to `stops`.

        False changes nothing.
        """
        needs = [max(stop - max(first, match.whole), 0) for stop, first in zip(stops, firsts, strict=True)]
        extra = spare or [0] * len(needs)
        if any(need + extra[group] > self.available(group) for group, need in enumerate(needs)):
            return False
        seq.node, seq.shared_pages, seq.computed = node, match.whole, match.tokens
        seq.pages = [
            [*run, *[NO_PAGE] * (min(first, stop) - match.whole)]
            for run, first, stop in zip(match.pages, firsts, stops, strict=True)
        ]
        seq.slid = [0] * len(self.groups)
        self._allocate(seq, needs)
        if seq.retractions == 0:
            seq.cached_tokens = match.tokens
            self.matched_tokens += match.tokens
            self.prompt_tokens += len(seq.tokens)
        return True

    def _copy(self, seq: Seq, match: Match) -> None:
        """Copies the tokens of a partly matching page to the sequence's own."""
        for group, source in enumerate(match.partial_pages):
            target = seq.pages[group][match.whole]
            if target != NO_PAGE:
                self._pool.copy_tokens(group, source, target, match.partial_tokens)

    def _allocate(self, seq: Seq, needs: Sequence[int]) -> None:
        for group, need in enumerate(needs):
            if need > 0:
                pool = self.pools[group]
                if not pool.can_allocate(need):
                    self.cache.evict(group, need - pool.free_count)
                seq.pages[group] += pool.allocate(need)

    # Open sequences.

    def grow(self, seq: Seq, tokens: int) -> bool:
        """Makes an open sequence's pages cover `tokens` tokens, evicting cache where needed. False takes nothing.

        Of groups with a window they cover at least its next step.
        """
        if min(map(len, seq.pages)) * self.page_size >= tokens:
            return True
        gone = self.slide(seq)
        stops = self._stops(seq.computed, tokens, at_once=False)
        needs = [max(stop - len(run), 0) for stop, run in zip(stops, seq.pages, strict=True)]
        if any(need > self.available(group) for group, need in enumerate(needs)):
            self.slides += gone > 0
            return False
        self.slides += gone > sum(needs[group] for group in self.windowed)
        self._allocate(seq, needs)
        return True

    def trim(self, seq: Seq) -> None:
        """Gives back the pages of an open sequence that none of its tokens needs: a draft had them."""
        stop = max(self.pages_for(len(seq.tokens)), seq.shared_pages)
        for pool, run in zip(self.pools, seq.pages, strict=True):
            pool.free(run[stop:])
            del run[stop:]

    def straighten(self, seq: Seq, path: Sequence[int], first: int) -> None:
        """Moves the KV of a draft's accepted nodes, which lie from position `first` on, to where their tokens are."""
        moved = [(first + node, first + place) for place, node in enumerate(path) if node != place]
        if moved:
            sources, targets = zip(*moved, strict=True)
            self._pool.move_tokens(seq.pages, sources, targets)

    def slide(self, seq: Seq) -> int:
        """Gives up the pages that no window of an open sequence reaches any more; returns how many."""
        count = 0
        for group in self.windowed:
            run, start = seq.pages[group], seq.slid[group]
            stop = min(self._kept_from(seq, group), len(run))
            if stop <= start:
                continue
            border = max(start, min(stop, seq.shared_pages))
            own = [page for page in run[border:stop] if page != NO_PAGE]
            self.cache.let_go(group, run[start:border])
            self.pools[group].free(own)
            count += stop - start - run[start:stop].count(NO_PAGE)
            run[start:stop] = [NO_PAGE] * (stop - start)
            seq.slid[group] = stop
        return count

    def _kept_from(self, seq: Seq, group: int) -> int:
        """First page of a group with a window that a sequence keeps: for itself, and for those it is handed over to."""
        first = kept_from(self.groups[group], seq.computed, self.page_size)
        if seq.prefill_only:
            first = min(first, self.groups[group].moved_from(len(seq.tokens)) // self.page_size)
        return first

    def sees(self, seq: Seq, position: int) -> bool:
        """Whether an open sequence has the pages of all tokens before `position` that it sees."""
        return all(
            NO_PAGE not in seq.pages[group][self.groups[group].seen_from(position) // self.page_size :]
            for group in self.windowed
        )

    def share(self, seq: Seq, limit: int | None = None) -> None:
        """Inserts the computed whole pages into the cache, so that others find them while the sequence goes on.

        limit: tokens of these at most.
        """
        whole = (seq.computed if limit is None else min(seq.computed, limit)) // self.page_size
        if not self._caching or whole <= seq.shared_pages:
            return
        start = seq.shared_pages
        run = pack(seq.tokens[start * self.page_size : whole * self.page_size])
        seq.node, owned = self.cache.extend(_handle(seq), run, [pages[start:whole] for pages in seq.pages])
        for group, (pages, own) in enumerate(zip(seq.pages, owned, strict=True)):
            given = zip(own, pages[start:whole], strict=True)
            self.checks.entered(group, [page for page, mine in given if page == mine])
            pages[start:whole] = own
        seq.shared_pages = whole

    def close(self, seq: Seq) -> None:
        """Leaves computed whole pages to the cache and frees the rest. A closed sequence stays as it is."""
        if seq.node is None:
            return
        if self.on_close is not None:
            self.on_close(seq)
        self.share(seq)
        for pool, pages in zip(self.pools, seq.pages, strict=True):
            pool.free(page for page in pages[seq.shared_pages :] if page != NO_PAGE)
        self.cache.release(_handle(seq), [pages[: seq.shared_pages] for pages in seq.pages])
        seq.node, seq.shared_pages, seq.computed, seq.pages, seq.slid = None, 0, 0, [], []


def match_limit(seq: Seq) -> int:
    """Tokens a sequence may take from the cache: all but the one it samples from.

    None while prompt log-probabilities are due: each needs its position computed.
    """
    if seq.prefill_only:
        return len(seq.tokens)
    if seq.sampling.prompt_logprobs is not None and len(seq.prompt_logprobs) < seq.prompt_len:
        return 0
    return len(seq.tokens) - 1


def _handle(seq: Seq) -> Node:
    assert isinstance(seq.node, Node), f"{seq.seq_id} has no pages"
    return seq.node


def _without(run: Sequence[int], first: int) -> list[int]:
    """A match's pages of a group without those before the `first`."""
    gone = min(first, len(run))
    return [NO_PAGE] * gone + list(run[gone:])
