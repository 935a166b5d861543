"""Blocks that requests under way will leave in the cache, as routers are told: promised, and taken back by the last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from tandem.cluster import CacheEvent, EventKind
from tandem.kv import BlockHash

Announce = Callable[[tuple[CacheEvent, ...]], None]


class Promises:
    """Which requests promise which blocks. A block's promise is taken back when nobody who made it is left."""

    def __init__(self, announce: Announce) -> None:
        self._announce = announce
        self._made: dict[str, tuple[BlockHash, ...]] = {}
        self._counts: Counter[BlockHash] = Counter()

    def make(self, name: str, hashes: tuple[BlockHash, ...]) -> None:
        """A request promises blocks from the root on; it must not have promised any."""
        if hashes:
            self._made[name] = hashes
            self._counts.update(hashes)
            self._announce((CacheEvent(EventKind.PROMISED, hashes),))

    def keep(self, name: str) -> None:
        """The request has ended as it should: what it promised was stored. Nothing if it promised nothing."""
        self._end(name)

    def withdraw(self, name: str) -> None:
        """The request ended before its time: takes back what nobody else promises; what was stored stays so."""
        if alone := self._end(name):
            self._announce((CacheEvent(EventKind.WITHDRAWN, alone),))

    def _end(self, name: str) -> tuple[BlockHash, ...]:
        """Forgets a request's promise; the blocks that only it had promised."""
        hashes = self._made.pop(name, ())
        self._counts.subtract(hashes)
        alone = tuple(block for block in hashes if not self._counts[block])
        for block in alone:
            del self._counts[block]
        return alone

    def check_integrity(self) -> None:
        """Raises AssertionError when the counts are not those of the promises."""
        assert self._counts == Counter(block for hashes in self._made.values() for block in hashes)

    def leaks(self) -> list[str]:
        """Requests whose promise has not ended."""
        return [f"{name} promises {len(hashes)} blocks" for name, hashes in self._made.items()]
