"""KV memory as sequences see it: pages of their own, pages shared with the prefix cache, and the way between them."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.engine.pages import PagePool
from tandem.engine.prefix_cache import Match, PrefixCache
from tandem.engine.protocols import PoolLike
from tandem.engine.radix import Node, pack
from tandem.engine.sequence import Seq


class KvMemory:
    """Page pool and prefix cache of one worker. Changes what a sequence says of its memory, never its state.

    A sequence is closed (no pages, no handle) or open (a handle in `node`; its first `shared_pages` pages are the
    cache's).
    """

    def __init__(self, pool: PoolLike, caching: bool) -> None:
        """caching: whether anything outlives its sequence; without it nothing is ever matched."""
        self.page_size = pool.page_size
        self.matched_tokens = 0
        """Prompt tokens found in the cache when their sequences were first opened."""
        self.prompt_tokens = 0
        """Prompt tokens of those sequences."""
        self.pages = PagePool(pool.num_pages)
        self.cache = PrefixCache(self.pages, pool.page_size)
        self._pool = pool
        self._caching = caching

    @property
    def available(self) -> int:
        """Pages that are free or can be evicted."""
        return self.pages.free_count + self.cache.evictable_pages

    def pages_for(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.page_size)

    def match_len(self, root: bytes, tokens: Sequence[int] | bytes, limit: int) -> int:
        """Cached tokens of a run (ids, or packed), at most `limit`. Changes nothing."""
        packed = tokens if isinstance(tokens, bytes) else pack(tokens)
        return self.cache.match(root, packed, limit).tokens

    def open(self, seq: Seq, packed: bytes, cover: int, spare: int = 0) -> bool:
        """Gives a closed sequence its cached prefix and pages for `cover` tokens (0: for the prefix alone).

        Returns False, with the sequence still closed, when that would leave fewer than `spare` pages available. A
        partly matching page is copied where the copy does not cost the sequence its place. Sets `computed`.
        """
        match = self.cache.match(seq.root, packed, match_limit(seq))
        node = self.cache.acquire(match)
        source = match.partial
        if source is not None:
            self.cache.hold(source)
            if not self._affords(match, cover or match.tokens, spare):
                self.cache.release(source)
                source = None
        whole = len(match.pages) * self.page_size
        tokens = match.tokens if source is not None else whole
        if not self._affords(match, cover or tokens, spare):
            self.cache.release(node)
            return False
        seq.node, seq.shared_pages = node, len(match.pages)
        seq.pages, seq.computed = list(match.pages), tokens
        self.grow(seq, cover or tokens)
        if source is not None:
            self._pool.copy_tokens(match.partial_page, seq.pages[seq.shared_pages], match.partial_tokens)
            self.cache.release(source)
        if seq.retractions == 0:
            seq.cached_tokens = tokens
            self.matched_tokens += tokens
            self.prompt_tokens += len(seq.tokens)
        return True

    def _affords(self, match: Match, tokens: int, spare: int) -> bool:
        return self.pages_for(tokens) - len(match.pages) + spare <= self.available

    def grow(self, seq: Seq, tokens: int) -> bool:
        """Makes an open sequence's pages cover `tokens` tokens, evicting cache where needed. False changes nothing."""
        need = self.pages_for(tokens) - len(seq.pages)
        if need <= 0:
            return True
        if need > self.available:
            return False
        if not self.pages.can_allocate(need):
            self.cache.evict(need - self.pages.free_count)
        seq.pages += self.pages.allocate(need)
        return True

    def share(self, seq: Seq) -> None:
        """Inserts the computed whole pages into the cache, so that others find them while the sequence goes on."""
        whole = seq.computed // self.page_size
        if not self._caching or whole <= seq.shared_pages:
            return
        start = seq.shared_pages
        run = pack(seq.tokens[start * self.page_size : whole * self.page_size])
        seq.node, owned = self.cache.extend(_handle(seq), run, seq.pages[start:whole])
        seq.pages[start:whole] = owned
        seq.shared_pages = whole

    def close(self, seq: Seq) -> None:
        """Leaves computed whole pages to the cache and frees the rest. A closed sequence stays as it is."""
        if seq.node is None:
            return
        self.share(seq)
        self.pages.free(seq.pages[seq.shared_pages :])
        self.cache.release(_handle(seq))
        seq.node, seq.shared_pages, seq.computed, seq.pages = None, 0, 0, []


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
