"""Sampled checks that cached KV is still what was computed: a digest when a page enters the cache, compared at hits.

What they find is a page that somebody wrote after it was finished: a transfer that went on when its range was given to
others, a sequence that kept a page which it had given back, torn writes, failing memory. Answers from such KV are wrong
without any error, which is why one page in some is looked at again.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import Protocol

from tandem.engine.radix import NO_PAGE, Pages

MOST_AT_ONCE = 16
"""Pages compared when a sequence is opened: of a long hit, some by chance."""


class Digesting(Protocol):
    """The part of `PoolLike` that is used here."""

    def digest(self, group: int, page: int) -> int:
        """Of all bytes of a group's page."""


class CorruptKv(RuntimeError):
    """A page that sequences are computing with is not what was computed: the engine cannot go on."""


class PageChecks:
    """Digests of a share of the cached pages. The engine thread's alone.

    share: of the pages that enter the cache; 0 digests none, 1 all.
    """

    def __init__(self, pool: Digesting, share: float, seed: int = 0) -> None:
        self._pool = pool
        self._share = share
        self._random = random.Random(seed)
        self._digests: dict[tuple[int, int], int] = {}
        self.checked = 0
        """Pages compared so far."""
        self.corrupt = 0
        """Pages that were not what they had been."""

    def entered(self, group: int, pages: Iterable[int]) -> None:
        """Pages of a group became the cache's. What was known of them is of an earlier life."""
        if not self._share:
            return
        for page in pages:
            if page != NO_PAGE:
                self._digests.pop((group, page), None)
                if self._random.random() < self._share:
                    self._digests[group, page] = self._pool.digest(group, page)

    def spoiled(self, pages: Pages) -> tuple[int, int] | None:
        """(group, place) of a page in a hit that is not what it was; None when none of those looked at is."""
        if not self._digests:
            return None
        known = list(self._known(pages))
        if len(known) > MOST_AT_ONCE:
            known = self._random.sample(known, MOST_AT_ONCE)
        for group, place in known:
            page = pages[group][place]
            self.checked += 1
            if self._pool.digest(group, page) != self._digests[group, page]:
                self.corrupt += 1
                return group, place
        return None

    def _known(self, pages: Pages) -> Iterator[tuple[int, int]]:
        for group, run in enumerate(pages):
            yield from ((group, place) for place, page in enumerate(run) if (group, page) in self._digests)
